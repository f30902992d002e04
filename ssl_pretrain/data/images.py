"""Decode an image file to RGB pixels, by one rule for every pixel format.

| in the file | becomes |
|---|---|
| gray, 1-bit, palette | RGB, each gray value or palette entry as it is |
| alpha (RGBA, gray with alpha, a palette or color marked transparent) | composited on black |
| CMYK, YCCK, YCbCr | RGB by Pillow's plain conversion; color profiles are not applied |
| 16-bit gray | value / 257, rounded. With `data.range`, low becomes 0 and high 255 |
| 32-bit integers above 65,535, floats | refused without `data.range`, else as 16-bit gray |
| 16-bit color, gray with alpha | the high byte; refused if it is dark, or with `data.range` |
| 16-bit gray TIFF whose zero is white | inverted, as Pillow inverts 8 bits |
| EXIF orientation | applied: the image is stored upright |
| several frames (GIF, WebP, PNG) | the first |
| several pages (TIFF) | refused, unless the others are smaller copies |
| four bands of which the fourth has no stated meaning, alpha of 0 everywhere, Lab | refused |
| more than 178,956,970 pixels | refused, as a possible decompression bomb |
| 1x1 pixels | 1x1 pixels |

A file is read by its content, not by its suffix, with the decoders of the installed Pillow. Formats
that start another program (EPS) or that Pillow cannot decode by itself are left out. A file that
begins like a JPEG is only read by JPEG decoders.
"""

import functools
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torchvision.io import decode_jpeg

from ssl_pretrain.data import pixels as pixel_formats

MAX_PIXELS = 178_956_970  # twice Image.MAX_IMAGE_PIXELS, where Pillow refuses
MAX_BYTES = 1 << 30  # no image of MAX_PIXELS pixels needs a larger file
# EPS starts another program. IPTC passes its content to any decoder, EPS included. WMF needs
# Windows. Pillow has no decoders of its own for the others.
_UNSAFE_FORMATS = {"EPS", "IPTC", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}
_JPEG_SIGNATURE = b"\xff\xd8"
_TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_ORIENTATION_TAG = 0x0112
# Functions that turn the stored pixels upright, by EXIF orientation.
_TURN_UPRIGHT = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].transpose(1, 0, 2),
    8: lambda pixels: np.rot90(pixels, 1),
}


class UnreadableImage(ValueError):
    """An image that cannot be read: absent, damaged, or of a format without an agreed RGB.

    The message names the file and the reason.
    """


class ImageHeader(NamedTuple):
    """Description of an image file."""

    mode: str  # Pillow's name of the pixel format
    width: int  # pixels, as stored
    height: int
    num_frames: int  # frames, or pages of a TIFF
    # Values wider than 8 bits without the thousandth at either end. None for 8 bits.
    value_range: pixel_formats.Range | None = None


@functools.cache
def formats() -> tuple[str, ...]:
    """Return Pillow's names of the formats that are read."""
    Image.init()
    return tuple(name for name in Image.OPEN if name not in _UNSAFE_FORMATS)


@functools.cache
def suffixes() -> frozenset[str]:
    """Return the suffixes of the formats that are read, in lower case."""
    names = {*formats(), "MPO"}  # MPO begins as a JPEG and is opened as one
    format_of = Image.registered_extensions()
    return frozenset(suffix for suffix in format_of if format_of[suffix] in names)


def decode(
    content: bytes,
    name: str,
    value_range: pixel_formats.Range | None = None,
    jpeg_only: bool = False,
) -> np.ndarray:
    """Return RGB pixels by the rule above, uint8 (height, width, 3), writable, any memory order.

    Args:
        content: The bytes of the file.
        name: Name of the file, for messages.
        value_range: `data.range`, for values wider than 8 bits.
        jpeg_only: Refuse every format except JPEG.

    Raises:
        UnreadableImage: If the file is damaged, truncated or refused. The message has `name`.
    """
    if content.startswith(_JPEG_SIGNATURE):
        width, height = _jpeg_size(content)
        _check_size(width, height, name)
        if width and (pixels := _decode_plain_jpeg(content)) is not None:
            return pixels
    elif content and jpeg_only:
        raise UnreadableImage(f"{name}: not a JPEG")
    with _open(content, name) as image:
        pixel_formats.check_bands(image)
        has_16_bits = pixel_formats.has_16_bits(image)
        image.load()
        pixels = pixel_formats.to_rgb(image, value_range, has_16_bits)
        # Read after loading, when Pillow has already turned a TIFF.
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    return np.ascontiguousarray(_TURN_UPRIGHT.get(orientation, lambda pixels: pixels)(pixels))


def read_header(content: bytes, name: str) -> ImageHeader:
    """Describe an image file. Pixels are only decoded if they are wider than 8 bits.

    Raises:
        UnreadableImage: If the file is damaged. The message has `name`.
    """
    with _open(content, name) as image:
        header = ImageHeader(image.mode, image.width, image.height, getattr(image, "n_frames", 1))
        if not pixel_formats.is_wide(image.mode):
            return header
        values = np.array(image)
    values = values[np.isfinite(values)]
    low, high = np.percentile(values, [0.1, 99.9], method="nearest") if values.size else (0, 0)
    return header._replace(value_range=(float(low), float(high)))


@contextmanager
def _open(content: bytes, name: str) -> Iterator[Image.Image]:
    """Open an image by its content, and turn all errors into UnreadableImage."""
    if not content:
        raise UnreadableImage(f"{name}: the file is empty")
    is_jpeg = content.startswith(_JPEG_SIGNATURE)
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG",) if is_jpeg else formats()) as image:
            _check_size(image.width, image.height, name)
            yield image
    except UnreadableImage:
        raise
    except Exception as error:  # decoders raise almost anything for damaged files
        raise UnreadableImage(f"{name}: {_reason(content, error)}") from error


def _reason(content: bytes, error: Exception) -> str:
    """Return the reason why an image could not be decoded."""
    if not isinstance(error, Image.UnidentifiedImageError):
        return str(error) or type(error).__name__
    if content.startswith(_TIFF_SIGNATURES):
        return (
            "Pillow cannot read a TIFF of this compression or number of bands or bits; convert it "
            "to gray or RGB of 8 or 16 bits"
        )
    return "no known image format"


def _check_size(width: int, height: int, name: str) -> None:
    if width * height > MAX_PIXELS:
        raise UnreadableImage(
            f"{name}: {width:,} x {height:,} pixels are more than the {MAX_PIXELS:,} that are "
            "decoded (a decompression bomb?); cut it into smaller images"
        )


def _jpeg_size(content: bytes) -> tuple[int, int]:
    """Return width and height from a JPEG's first frame header, (0, 0) if there is none."""
    position = 2
    while position + 9 <= len(content) and content[position] == 0xFF:
        marker = content[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a frame header
            height = int.from_bytes(content[position + 5 : position + 7])
            return int.from_bytes(content[position + 7 : position + 9]), height
        elif marker == 0xDA:  # start of scan
            break
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:  # markers without a length
            position += 2
        else:
            position += 2 + int.from_bytes(content[position + 2 : position + 4])
    return 0, 0


def _decode_plain_jpeg(content: bytes) -> np.ndarray | None:
    """Decode a gray or RGB JPEG to Pillow's pixels, bit for bit, in half the time if it is small.

    Return None for a damaged or CMYK image, which Pillow has to decode.
    """
    encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    try:
        pixels = decode_jpeg(encoded, apply_exif_orientation=True)
    except RuntimeError:
        return None
    if len(pixels) == 4:  # torchvision converts CMYK differently
        return None
    rgb = pixels if len(pixels) == 3 else pixels.repeat(3, 1, 1)
    return rgb.permute(1, 2, 0).numpy()
