"""Fit the views and the network to `data.channels`, the number of channels of the images.

Recipes are written for color images. For other images, the operations that need red, green and
blue are left out, one mean and one divisor apply to all channels, and the network takes that many.
"""

from statistics import fmean
from typing import TYPE_CHECKING

from ssl_pretrain.data.image_values import MAX_CHANNELS
from ssl_pretrain.monitoring import shown_bands
from ssl_pretrain.views.recipe import COLOR_OPERATIONS

if TYPE_CHECKING:
    from ssl_pretrain.config.run_config import RunConfig


def fit(config: "RunConfig") -> None:
    """Change a configuration in place. For images of three channels it stays as it is.

    The number goes to `backbone.args.in_chans`, of timm's networks and of those of the user.

    Raises:
        ValueError: If a setting contradicts `data.channels`.
    """
    channels = config.data.channels
    in_channels = config.backbone.args.get("in_chans", channels)
    if in_channels != channels or type(in_channels) is not int:
        is_possible = type(in_channels) is int and 1 <= in_channels <= MAX_CHANNELS
        remedy = f", or set data.channels={in_channels}" if is_possible else ""
        raise ValueError(
            f"backbone.args.in_chans: {in_channels} is not data.channels {channels}, the number of "
            f"channels of the images; leave it out{remedy}"
        )
    shown_bands.check(config.log.bands, channels)
    for key in ("mean", "std"):
        values = getattr(config.views, key)
        if len(values) not in (1, 3, channels):
            raise ValueError(
                f"views.{key}: {values} must be {channels} numbers, one per channel of the images "
                "(data.channels), or one for all of them"
            )
        if len(values) != channels:
            setattr(config.views, key, [fmean(values)] * channels)
    if channels == 3:
        return
    config.backbone.args = {**config.backbone.args, "in_chans": channels}
    for crop in config.views.crops.values():
        for operation in COLOR_OPERATIONS:
            setattr(crop, operation, 0.0)
        if not (crop.brightness or crop.contrast):
            crop.jitter = 0.0


def describe(config: "RunConfig") -> str:
    """Return what `data.channels` changed, or an empty string for color images."""
    channels = config.data.channels
    if channels == 3:
        return ""
    return (
        f"data.channels: {channels}, so the views have no saturation, hue or grayscale, and the "
        f"network takes {channels} channel{'s' * (channels > 1)}"
    )
