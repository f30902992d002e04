"""Show images with any number of channels as color pictures, by the setting `log.bands`."""

from collections.abc import Sequence

import torch
from torch import Tensor

COLORS = ("red", "green", "blue")


def check(bands: Sequence[int], num_channels: int) -> None:
    """Raise ValueError unless a picture can show these bands.

    Args:
        bands: The setting `log.bands`.
        num_channels: The setting `data.channels`.
    """
    if len(bands) > len(COLORS):
        raise ValueError(
            f"log.bands: {list(bands)} has {len(bands)} bands; give three for red, green and blue, "
            "two for red and green, or one for gray"
        )
    if missing := [band for band in bands if not 0 <= band < num_channels]:
        allowed = "only band 0" if num_channels == 1 else f"bands 0 to {num_channels - 1}"
        raise ValueError(
            f"log.bands: {list(bands)} contains band {missing[0]}, and images of {num_channels} "
            f"channel{'s' if num_channels > 1 else ''} (data.channels) have {allowed}; leave "
            "log.bands empty, or give bands of the images, counted from 0"
        )


def to_rgb(images: Tensor, bands: Sequence[int] = ()) -> Tensor:
    """Return images (..., C, height, width) with three channels, for pictures.

    Three bands are red, green and blue. Two are red and green, with blue at 0. One is gray.

    Args:
        images: Images with C channels.
        bands: The setting `log.bands`. If empty, the first three channels are shown.
    """
    shown = _choose_bands(bands, images.shape[-3])
    chosen = images.index_select(-3, torch.tensor(shown * (3 if len(shown) == 1 else 1)))
    if len(shown) != 2:
        return chosen
    return torch.cat([chosen, torch.zeros_like(chosen.narrow(-3, 0, 1))], dim=-3)


def describe(bands: Sequence[int], num_channels: int) -> str:
    """Describe how a picture shows the bands, or return an empty string for plain gray and RGB."""
    if not bands and num_channels in (1, 3):
        return ""
    shown = _choose_bands(bands, num_channels)
    if len(shown) == 1:
        return f"band {shown[0]} in gray"
    return f"bands {', '.join(map(str, shown))} as {', '.join(COLORS[: len(shown)])}"


def _choose_bands(bands: Sequence[int], num_channels: int) -> list[int]:
    """Return the bands that a picture shows, by default the first three."""
    return list(bands) or list(range(min(len(COLORS), num_channels)))
