"""Convert images that are Python objects to RGB pixels."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ssl_pretrain.data import pixels
from ssl_pretrain.data.images import decode

ALLOWED_IMAGES = (
    "a PIL image, a path, an array (height, width, 3) or (height, width), or a tensor "
    "(3, height, width), with integers from 0 to 255 or floats from 0 to 1"
)


def to_rgb(image: Any, name: str) -> np.ndarray:
    """Return the pixels of an image, uint8 (height, width, 3).

    Args:
        image: A PIL image, the path or the bytes of an image file, or the values of a gray or RGB
            image. An array has its channels last and a tensor has them first, unless only the
            other order makes sense.
        name: Name of the image, for messages.

    Raises:
        UnreadableImage: If the file cannot be read.
        ValueError: If the object is not an image.
    """
    if isinstance(image, (str, Path)):
        return decode(Path(image).read_bytes(), str(image))
    if isinstance(image, bytes):
        return decode(image, name)
    if isinstance(image, Image.Image):
        return pixels.to_rgb(image, None, has_16_bits=False)
    if isinstance(image, torch.Tensor):
        return _values_to_rgb(image.detach().cpu().numpy(), name, channels_first=True)
    if isinstance(image, np.ndarray):
        return _values_to_rgb(image, name, channels_first=False)
    raise ValueError(
        f"{name} is of type {type(image).__name__}, not an image; give {ALLOWED_IMAGES}"
    )


def _values_to_rgb(values: np.ndarray, name: str, channels_first: bool) -> np.ndarray:
    shape = values.shape
    if values.ndim == 2:
        values = values[..., None]
    elif values.ndim == 3:
        first, last = shape[0] in (1, 3), shape[-1] in (1, 3)
        if first and (channels_first or not last):
            values = np.moveaxis(values, 0, -1)
    if values.ndim != 3 or values.shape[-1] not in (1, 3) or not values.size:
        raise ValueError(
            f"{name} has the shape {shape}, not that of an image; give {ALLOWED_IMAGES}"
        )
    levels = to_levels(values, name)
    return np.array(np.broadcast_to(levels, (*levels.shape[:2], 3)))


def to_levels(values: np.ndarray, name: str) -> np.ndarray:
    """Return the values as uint8. Floats from 0 to 1 become 0 to 255.

    Raises:
        ValueError: If the values are neither integers from 0 to 255 nor floats from 0 to 1.
    """
    if values.dtype == np.uint8:
        return values
    is_float = np.issubdtype(values.dtype, np.floating)
    maximum, limits = 1 if is_float else 255, " values"
    is_valid = is_float or np.issubdtype(values.dtype, np.integer)
    if is_valid and values.size:
        low, high = float(values.min()), float(values.max())
        is_valid = 0 <= low <= high <= maximum  # False for NaN
        limits = f" values from {low:g} to {high:g}"
    if not is_valid:
        raise ValueError(
            f"{name} has {values.dtype}{limits}; scale them to integers from 0 to 255 or to floats "
            "from 0 to 1, before any normalization"
        )
    if not is_float:
        return values.astype(np.uint8)
    return np.rint(values.astype(np.float64) * 255).astype(np.uint8)
