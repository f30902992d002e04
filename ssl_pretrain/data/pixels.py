"""Convert the pixel formats of image files to 8 bits, and refuse the ambiguous ones."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

# Values that become black and white: low and high, for all channels or for each one in turn.
ValueRange = tuple[float, ...]


@dataclass(frozen=True)
class PixelFormat:
    """Format in which images are read, uint8 (height, width, num_channels)."""

    num_channels: int = 3  # the setting `data.channels`
    value_range: ValueRange | None = None  # the setting `data.range`


RGB = PixelFormat()


class WrongChannels(ValueError):
    """Error for images that have another number of channels than `data.channels`.

    Args:
        name: Name of the image or of the data set.
        found: Number of its channels.
        expected: The setting `data.channels`.
    """

    def __init__(self, name: str, found: int, expected: int):
        self.name, self.found, self.expected = name, found, expected
        super().__init__(
            f"{name} has {found} channel{'s' if found > 1 else ''}, and data.channels is "
            f"{expected}; set data.channels={found} if all images have that many"
        )


# Most levels that the high byte of 16-bit color can have if the color uses at most 14 bits.
_MAX_14_BIT_LEVELS = 64
_EXTRA_SAMPLES, _PHOTOMETRIC, _SUBFILE, _NUM_BANDS = 338, 262, 254, 277  # TIFF tags
_COLOR_BANDS = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3, 8: 3}  # keyed by photometric interpretation
_RANGE_REMEDY = (
    "give data.range=[low, high] (python -m ssl_pretrain.planning.inspect measures it), or convert "
    "the image to 8 or 16 bits"
)


def check_bands(image: Image.Image) -> None:
    """Raise ValueError if the meaning of a band is unclear or pages would be ignored."""
    if image.format == "TIFF":
        _check_tiff(image)
    elif image.format == "JPEG2000" and len(image.getbands()) == 4:
        raise ValueError(
            "a JPEG 2000 of four bands does not say whether the fourth is alpha; choose three "
            "bands and save them as RGB"
        )
    elif image.format in ("JPEG", "MPO") and image.mode == "CMYK" and "adobe" not in image.info:
        raise ValueError(
            "its four bands are not marked as inks; choose three bands and save them as RGB"
        )


def _check_tiff(image: Image.Image) -> None:
    tags = _tags(image)
    num_bands, extra = tags.get(_NUM_BANDS, 1), tags.get(_EXTRA_SAMPLES, ())
    num_extra = num_bands - _COLOR_BANDS.get(tags.get(_PHOTOMETRIC, 1), num_bands)
    is_alpha = num_extra == 1 and extra and extra[0] in (1, 2)
    if num_extra > 0 and not is_alpha:
        raise ValueError(
            f"the last of its {num_bands} bands is not marked as alpha; choose three bands and "
            "save them as RGB"
        )
    num_pages = getattr(image, "n_frames", 1)
    for page in range(1, num_pages):
        image.seek(page)
        if not _tags(image).get(_SUBFILE, 0) & 1:  # not a smaller copy of the first page
            raise ValueError(
                f"only one of its {num_pages} pages would be read; save each page as a separate "
                "file"
            )
    image.seek(0)


def has_16_bits(image: Image.Image) -> bool:
    """Return True if a file has bands of 16 bits.

    Call it before Pillow loads the pixels, because loading discards `image.tile`.
    """
    tiles = getattr(image, "tile", [])
    if not tiles or len(tiles[0]) < 4:
        return False
    codec, arguments = tiles[0][0], tiles[0][3]
    arguments = arguments if isinstance(arguments, tuple) else (arguments,)
    if codec == "ppm":
        return len(arguments) > 1 and arguments[1] > 255  # the largest value
    if codec == "sgi_rle":
        return arguments[-1] == 2  # bytes per value
    return codec == "SGI16" or ";16" in str(arguments[0])  # the raw mode, such as RGB;16L


def is_wide_mode(mode: str) -> bool:
    """Return True for Pillow's modes with values wider than 8 bits."""
    return mode in ("I", "F") or mode.startswith("I;16")


def to_rgb(image: Image.Image, value_range: ValueRange | None, has_16_bits: bool) -> np.ndarray:
    """Return the pixels of a loaded image, uint8 (height, width, 3).

    Args:
        image: The image.
        value_range: `data.range`, for values wider than 8 bits.
        has_16_bits: True if the file has 16 bits per band.

    Raises:
        ValueError: If there is no agreed conversion, or the conversion would lose most of the
            image.
    """
    if is_wide_mode(image.mode):
        values = np.repeat(np.array(image)[..., None], 3, axis=2)  # the range may be per channel
        levels = to_levels(values, image.mode == "F", value_range)
        is_inverted = image.format == "TIFF" and _tags(image).get(_PHOTOMETRIC) == 0
        return 255 - levels if is_inverted else levels
    if image.mode == "LAB":
        raise ValueError(
            "pixels of mode LAB have no agreed conversion to RGB; convert the image to 8 or 16 bits"
        )
    has_alpha = image.has_transparency_data
    pixels = np.array(image.convert("RGBA" if has_alpha else "RGB"))
    if has_16_bits:
        _check_high_bytes(pixels[..., :3], value_range)
    if not has_alpha:
        return pixels
    if not pixels[..., 3].any():
        raise ValueError(
            "its alpha is 0 everywhere, so nothing is visible; remove the alpha, or the image"
        )
    rgba = pixels.astype(np.uint16)
    return ((rgba[..., :3] * rgba[..., 3:] + 127) // 255).astype(np.uint8)


def _tags(image: Image.Image) -> Mapping[int, Any]:
    """Return the tags of a TIFF, and no tags for other formats."""
    return getattr(image, "tag_v2", {})


def used_range(values: np.ndarray) -> ValueRange:
    """Return the range of the finite values, without the lowest and highest 0.1 %.

    Bands of a satellite or a microscope have different units, so that images (height, width,
    channels) of other than 1 or 3 channels get a range per channel.
    """
    if values.ndim == 3 and values.shape[2] not in (1, 3):
        ranges = [used_range(values[..., channel]) for channel in range(values.shape[2])]
        return tuple(limit for value_range in ranges for limit in value_range)
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0, 0.0
    low, high = np.percentile(finite, [0.1, 99.9], method="nearest")
    return float(low), float(high)


def to_gray(rgb: np.ndarray) -> np.ndarray:
    """Return the luma of RGB pixels by ITU-R BT.601, as Pillow computes it, (height, width, 1).

    A gray image keeps its values.
    """
    weights = np.array([19595, 38470, 7471], np.uint32)  # 1 is 65,536
    return ((rgb @ weights + 0x8000) >> 16).astype(np.uint8)[..., None]


def check_conversion(name: str, found: int, num_channels: int) -> None:
    """Raise WrongChannels unless images can be converted to `data.channels`.

    Args:
        name: Name of the image or of the data set, for the message.
        found: Number of its channels.
        num_channels: The setting `data.channels`.
    """
    if found != num_channels and {found, num_channels} != {1, 3}:
        raise WrongChannels(name, found, num_channels)


def convert_channels(pixels: np.ndarray, num_channels: int) -> np.ndarray:
    """Return pixels with this many channels: gray repeated as RGB, or the luma of RGB.

    Args:
        pixels: uint8 (height, width, channels), for which `check_conversion` passes.
        num_channels: The setting `data.channels`.
    """
    if pixels.shape[2] == num_channels:
        return pixels
    return np.repeat(pixels, 3, axis=2) if num_channels == 3 else to_gray(pixels)


def to_8_bits(values: np.ndarray, value_range: ValueRange | None) -> np.ndarray:
    """Return stored values as uint8: bool as 0 and 255, wider ones by `to_levels`.

    Raises:
        ValueError: If a value is not finite, or the range is needed and not given.
    """
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype == np.uint8:
        return values
    return to_levels(values, values.dtype.kind == "f", value_range)


def to_levels(values: np.ndarray, is_float: bool, value_range: ValueRange | None) -> np.ndarray:
    """Map values wider than 8 bits to uint8.

    Args:
        values: The values.
        is_float: True for floating-point values, which need a range.
        value_range: The values that become 0 and 255, for all channels or for each of the last
            axis. None stands for 0 and 65535.

    Raises:
        ValueError: If a value is not finite, or the range is needed and not given.
    """
    if value_range is not None:
        low, high = np.asarray(value_range[0::2]), np.asarray(value_range[1::2])
        fractions = (values.astype(np.float64) - low) / (high - low)
        if not np.isfinite(fractions).all():
            raise ValueError("it has values that are not finite; replace them, or remove the image")
        return np.rint(255 * fractions.clip(0, 1)).astype(np.uint8)
    if is_float:
        raise ValueError(f"pixels of mode F have no agreed conversion to RGB; {_RANGE_REMEDY}")
    values = values.astype(np.int64)  # Pillow reads 16-bit PGM as 32-bit
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"32-bit integers have no agreed range; {_RANGE_REMEDY}")
    return ((values + 128) // 257).astype(np.uint8)


def _check_high_bytes(pixels: np.ndarray, value_range: ValueRange | None) -> None:
    """Raise ValueError if 16-bit color has few levels in the high bytes, which Pillow keeps."""
    if value_range is not None:
        raise ValueError(
            "data.range is for gray images without alpha, because Pillow keeps only the high byte "
            "of 16-bit color; convert the image to 8 bits"
        )
    # The percentile ignores the few values that a sensor saturates.
    num_levels = int(np.percentile(pixels, 99.9, method="nearest")) + 1
    if num_levels <= _MAX_14_BIT_LEVELS:
        raise ValueError(
            f"its 16-bit color would keep {num_levels} of 256 levels, because Pillow reads only "
            "the high byte; convert the image to 8 bits, scaled by its own range"
        )
