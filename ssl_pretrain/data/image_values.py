"""Convert images that are Python objects to 8-bit pixels."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ssl_pretrain.data import pixels
from ssl_pretrain.data.images import decode
from ssl_pretrain.data.pixels import (
    RGB,
    PixelFormat,
    check_conversion,
    convert_channels,
)

MAX_CHANNELS = 32
ALLOWED_IMAGES = (
    "a PIL image, a path, an array (height, width, channels) or (height, width), or a tensor "
    "(channels, height, width), with integers from 0 to 255 or floats from 0 to 1"
)


def to_pixels(image: Any, name: str, pixel_format: PixelFormat = RGB) -> np.ndarray:
    """Return the pixels of an image, uint8 (height, width, num_channels).

    Args:
        image: A PIL image, the path or the bytes of an image file, or the values of an image. An
            array has its channels last and a tensor has them first, unless only the other order
            makes sense.
        name: Name of the image, for messages.
        pixel_format: Number of channels, and the range of values that are wider than 8 bits.

    Raises:
        UnreadableImage: If the file cannot be read.
        ValueError: If the object is not an image, or has another number of channels.
    """
    if isinstance(image, (str, Path)):
        return decode(Path(image).read_bytes(), str(image), pixel_format)
    if isinstance(image, bytes):
        return decode(image, name, pixel_format)
    if isinstance(image, Image.Image):
        return _pil_to_pixels(image, name, pixel_format)
    if isinstance(image, torch.Tensor):
        return _values_to_pixels(image.detach().cpu().numpy(), name, pixel_format, True)
    if isinstance(image, np.ndarray):
        return _values_to_pixels(image, name, pixel_format, False)
    raise ValueError(
        f"{name} is of type {type(image).__name__}, not an image; give {ALLOWED_IMAGES}"
    )


def _pil_to_pixels(image: Image.Image, name: str, pixel_format: PixelFormat) -> np.ndarray:
    num_channels = pixel_format.num_channels
    if num_channels in (1, 3):
        rgb = pixels.to_rgb(image, pixel_format.value_range, has_16_bits=False)
        return convert_channels(rgb, num_channels)
    check_conversion(name, len(image.getbands()), num_channels)
    return np.array(image)


def _values_to_pixels(
    values: np.ndarray, name: str, pixel_format: PixelFormat, channels_first: bool
) -> np.ndarray:
    shape, num_channels = values.shape, pixel_format.num_channels
    if values.ndim == 2:
        values = values[..., None]
    elif values.ndim == 3:
        axis = channel_axis(shape, num_channels, channels_first)
        values = values if axis is None else np.moveaxis(values, axis, -1)
    if values.ndim != 3 or values.shape[-1] > MAX_CHANNELS or not values.size:
        raise ValueError(
            f"{name} has the shape {shape}, not that of an image; give {ALLOWED_IMAGES}"
        )
    check_conversion(name, values.shape[-1], num_channels)
    levels = to_levels(values, name, pixel_format.value_range)
    return np.array(convert_channels(levels, num_channels))


def count_channels(image: Any) -> int:
    """Return the channels in which an object is read by default: 3 for gray, color and files."""
    if isinstance(image, Image.Image) or np.ndim(image) != 3:
        return 3
    axis = channel_axis(np.shape(image), None, isinstance(image, torch.Tensor))
    num_channels = 3 if axis is None else np.shape(image)[axis]
    return 3 if num_channels == 1 else num_channels


def channel_axis(
    shape: tuple[int, ...], num_channels: int | None, channels_first: bool
) -> int | None:
    """Return the axis of an image's channels, 0 or 2, or None if neither is short enough.

    Args:
        shape: Lengths of the three axes.
        num_channels: Expected number of channels, or None if it is not known.
        channels_first: True for tensors, whose channels are usually before the height.
    """
    axes = (0, 2) if channels_first else (2, 0)
    usual = [1, 3] if num_channels in (None, 1, 3) else []
    for lengths in ([num_channels], usual, range(2, MAX_CHANNELS + 1)):
        candidates = [axis for axis in axes if shape[axis] in lengths]
        if lengths not in ([num_channels], usual):  # the shortest axis
            candidates = [axis for axis in candidates if shape[axis] < shape[2 - axis]]
        if candidates:
            return candidates[0]
    return None


def to_levels(
    values: np.ndarray, name: str, value_range: pixels.ValueRange | None = None
) -> np.ndarray:
    """Return the values as uint8. Floats from 0 to 1 become 0 to 255, or those of the range.

    Raises:
        ValueError: If the values are neither integers from 0 to 255 nor floats from 0 to 1, and
            there is no range.
    """
    if values.dtype in (np.uint8, np.bool_):
        return pixels.to_8_bits(values, None)
    is_float = np.issubdtype(values.dtype, np.floating)
    maximum, limits = 1 if is_float else 255, " values"
    is_valid = is_float or np.issubdtype(values.dtype, np.integer)
    if is_valid and value_range is not None:
        return pixels.to_8_bits(values, value_range)
    if is_valid and values.size:
        low, high = float(values.min()), float(values.max())
        is_valid = 0 <= low <= high <= maximum  # False for NaN
        limits = f" values from {low:g} to {high:g}"
    if not is_valid:
        raise ValueError(
            f"{name} has {values.dtype}{limits}; scale them to integers from 0 to 255 or to floats "
            "from 0 to 1, before any normalization, or set data.range to their lowest and highest "
            "values"
        )
    if not is_float:
        return values.astype(np.uint8)
    return np.rint(values.astype(np.float64) * 255).astype(np.uint8)
