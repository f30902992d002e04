"""Check how timm adapts its published weights to images of other numbers of channels.

For gray images, timm sums the first convolution over its input channels. For other numbers it
repeats the input channels and scales them. It leaves out weights that it cannot adapt, and only
logs that.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ssl_pretrain.models import custom_network
from ssl_pretrain.models.timm_networks import (
    BackboneConfig,
    create,
    create_on_meta,
    input_channels,
    native_size,
    pretrained_cfg,
    timm,
)


def check(config: BackboneConfig) -> None:
    """Raise ValueError if timm cannot adapt the weights of `timm:<tag>` to the channels."""
    if not config.init.startswith("timm:") or custom_network.is_custom(config.name):
        return
    published, channels = _published_channels(config), config.args.get("in_chans", 3)
    if channels == published:
        return
    original = _create_on_meta(config, published)
    expected = _create_on_meta(config, channels).state_dict()
    first_weights = _first_weights(config, original)
    for name, weight in original.state_dict().items():
        adapted = _adapt(weight, channels, published) if name in first_weights else weight
        if adapted is None or adapted.shape != expected[name].shape:
            raise ValueError(
                f"backbone.init: timm cannot adapt {config.init} of {config.name} from images of "
                f"{published} channels to data.channels {channels}, because of {name}; set "
                "backbone.init=random, or choose another network"
            )


def describe(config: BackboneConfig, model: nn.Module) -> list[str]:
    """Return notes on the weights of `timm:<tag>` that timm adapts to the number of channels."""
    published, channels = _published_channels(config), input_channels(model)
    if channels == published or config.stem == "small":  # which has a new first layer
        return []
    change = "summed" if channels == 1 else f"repeated from {published} to {channels}"
    names = " and ".join(_first_weights(config, model))
    return [f"input channels of {names} {change}"]


def _published_channels(config: BackboneConfig) -> int:
    """Return the number of channels of the images that the weights were trained on."""
    return int(_weights_cfg(config).input_size[0])


def _weights_cfg(config: BackboneConfig) -> Any:
    tag = config.init.removeprefix("timm:")
    cfg = timm.models.get_pretrained_cfg(f"{config.name}.{tag}")
    return cfg or pretrained_cfg(config.name)


def _create_on_meta(config: BackboneConfig, channels: int) -> nn.Module:
    args = {**config.args, "in_chans": channels}
    random = replace(config, init="random", stem="imagenet", args=args)
    return create_on_meta(lambda: create(random, native_size(config.name)))


def _first_weights(config: BackboneConfig, model: nn.Module) -> list[str]:
    """Return the names of the weights that timm adapts."""
    layers = timm.models.get_model_traits(model).get("first_conv", _weights_cfg(config).first_conv)
    names = [layers] if isinstance(layers, str) else layers or []
    return [f"{name}.weight" for name in names]


def _adapt(weight: Tensor, channels: int, published: int) -> Tensor | None:
    """Return a first weight for images of other channels, or None if timm leaves it out."""
    try:
        return timm.models.adapt_input_conv(channels, torch.empty_like(weight), published)
    except NotImplementedError:
        return None
