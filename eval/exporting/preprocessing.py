"""Turn an image into the input of the backbone in this folder, with Pillow, NumPy and torch alone.

    from preprocessing import transform

    features = backbone(transform("photo.jpg")[None])

`ssl-pretrain export` copies this file beside `timm.json`, which has the size, the crop, the mean
and the standard deviation. From the same pixels it computes exactly the view of the evaluations.
JPEGs are decoded by Pillow here, and another decoder may differ by a gray level.
"""

import json
import platform
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

FOLDER = Path(__file__).resolve().parent
MAX_ASPECT = 16  # excess length beyond which only an image's middle is resized
WIDE_MODES = ("I", "F")  # Pillow's modes of more than 8 bits, besides I;16


def transform(image: Any, folder: Path = FOLDER) -> Tensor:
    """Return the input of the backbone, float32 (channels, height, width).

    Args:
        image: A PIL image, the path of an image file, an array (height, width, channels), or a
            tensor (channels, height, width). Arrays and tensors are bool, uint8 or integers of 16
            bits, and others only if the export has a range of values.
        folder: Folder of the export.

    Raises:
        ValueError: If the object is not an image of this kind, or has a value that is not finite.
    """
    settings = _read_settings(folder)
    size = settings["size"]
    view = (size, size) if isinstance(size, int) else tuple(size)
    pixels = torch.from_numpy(_to_pixels(image, settings["channels"], settings["range"]))
    cropped = _crop(
        pixels.permute(2, 0, 1), view, settings["crop_ratio"], settings["interpolation"]
    )
    mean, std = (torch.tensor(settings[key])[:, None, None] for key in ("mean", "std"))
    return cropped.to(torch.float32).div_(255).sub_(mean).div_(std)


@cache
def _read_settings(folder: Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((folder / "timm.json").read_text())["input"]
    return settings


def _to_pixels(image: Any, channels: int, value_range: Sequence[float]) -> np.ndarray:
    """Return the pixels of an image, uint8 (height, width, channels)."""
    if isinstance(image, (str, Path)):
        with Image.open(image) as file:
            image = ImageOps.exif_transpose(file)
    if isinstance(image, Image.Image):
        if channels in (1, 3):
            return _convert_channels(_to_rgb(image, value_range), channels)
        image = np.array(image)
    elif isinstance(image, Tensor):
        values = image.detach().cpu().numpy()
        image = values if values.ndim == 2 else np.moveaxis(values, 0, -1)
    if not isinstance(image, np.ndarray) or image.ndim not in (2, 3):
        raise ValueError(f"an object of type {type(image).__name__} is not an image")
    values = image[..., None] if image.ndim == 2 else image
    if values.shape[2] != channels and {values.shape[2], channels} != {1, 3}:
        raise ValueError(
            f"the image has {values.shape[2]} channels, but the backbone takes {channels}"
        )
    if values.dtype == np.bool_:
        values = values.astype(np.uint8) * np.uint8(255)
    elif values.dtype != np.uint8:
        values = _to_levels(values, value_range)
    return np.array(_convert_channels(values, channels))


def _to_rgb(image: Image.Image, value_range: Sequence[float]) -> np.ndarray:
    """Return uint8 (height, width, 3). Transparent images are composited on black."""
    if image.mode in WIDE_MODES or image.mode.startswith("I;16"):
        return _to_levels(np.repeat(np.array(image)[..., None], 3, axis=2), value_range)
    if not image.has_transparency_data:
        return np.array(image.convert("RGB"))
    rgba = np.array(image.convert("RGBA")).astype(np.uint16)
    return ((rgba[..., :3] * rgba[..., 3:] + 127) // 255).astype(np.uint8)


def _to_levels(values: np.ndarray, value_range: Sequence[float]) -> np.ndarray:
    """Map values of more than 8 bits to uint8. Without a range, they are of 16 bits."""
    if value_range:
        low, high = np.asarray(value_range[0::2]), np.asarray(value_range[1::2])
        fractions = (values.astype(np.float64) - low) / (high - low)
        if not np.isfinite(fractions).all():
            raise ValueError("the image has values that are not finite; replace them")
        return np.rint(255 * fractions.clip(0, 1)).astype(np.uint8)
    if values.dtype.kind not in "iu" or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"{values.dtype} values have no agreed range; give uint8 from 0 to 255")
    return ((values.astype(np.int64) + 128) // 257).astype(np.uint8)


def _convert_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    """Repeat gray as RGB, or reduce RGB to its luma by ITU-R BT.601."""
    if pixels.shape[2] == channels:
        return pixels
    if channels == 3:
        return np.repeat(pixels, 3, axis=2)
    weights = np.array([19595, 38470, 7471], np.uint32)  # 1 is 65,536
    return ((pixels @ weights + 0x8000) >> 16).astype(np.uint8)[..., None]


def _crop(pixels: Tensor, view: Sequence[int], crop_ratio: float, interpolation: str) -> Tensor:
    """Resize an image, uint8 (channels, height, width), until it covers the view, and crop it."""
    covered = [round(length / crop_ratio) for length in view]
    # Along the tight axis the resized image has exactly the covered length, along the other more.
    tight = 0 if covered[0] * pixels.shape[2] >= covered[1] * pixels.shape[1] else 1
    pixels, resized = _cut_middle(pixels, covered, tight)
    return _center_crop(_resize(pixels, resized, interpolation), view)


def _cut_middle(pixels: Tensor, covered: Sequence[int], tight: int) -> tuple[Tensor, list[int]]:
    """Return the part of an image that is worth resizing, and its size after the resize."""
    shape, loose = list(pixels.shape[1:]), 1 - tight
    resized = _resized_shape(shape, covered, tight)
    longest = -(-MAX_ASPECT * shape[tight] * covered[loose] // covered[tight])  # rounded up
    if shape[loose] <= longest:
        return pixels, resized
    first = longest + (shape[loose] - longest) % 2
    cuts = [
        [length, shape[1]] if loose == 0 else [shape[0], length]
        for length in range(first, min(shape[loose], first + 64) + 1, 2)
    ]
    # The center keeps its fraction of a pixel if the lengths differ by a multiple of 4.
    offsets = [resized[loose] - _resized_shape(cut, covered, tight)[loose] for cut in cuts]
    cut = next((cut for cut, offset in zip(cuts, offsets) if offset % 4 == 0), cuts[0])
    return _center_crop(pixels, cut), _resized_shape(cut, covered, tight)


def _resized_shape(shape: Sequence[int], covered: Sequence[int], tight: int) -> list[int]:
    other_length = covered[tight] * shape[1 - tight] // shape[tight]
    return [covered[0], other_length] if tight == 0 else [other_length, covered[1]]


def _center_crop(pixels: Tensor, shape: Sequence[int]) -> Tensor:
    top, left = (round((pixels.shape[1 + axis] - shape[axis]) / 2) for axis in (0, 1))
    return pixels[:, top : top + shape[0], left : left + shape[1]]


def _resize(pixels: Tensor, shape: Sequence[int], interpolation: str) -> Tensor:
    """Resize with a low-pass filter, in the arithmetic that torchvision chooses for this CPU."""
    if list(pixels.shape[1:]) == list(shape):
        return pixels
    is_fast = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") or (
        platform.machine() in ("aarch64", "arm64")
    )
    is_native = is_fast or interpolation == "bicubic"
    images = pixels[None] if is_native else pixels[None].to(torch.float32)
    resized = torch.nn.functional.interpolate(
        images, list(shape), mode=interpolation, align_corners=False, antialias=True
    )
    return (resized if is_native else resized.round_().to(torch.uint8))[0]
