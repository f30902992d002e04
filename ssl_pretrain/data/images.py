"""Decode image files to RGB or gray pixels, with one rule per pixel format.

Other numbers of channels follow the rules of `bands`.

| in the file | result |
|---|---|
| gray, 1-bit, palette | RGB, each gray value or palette entry unchanged |
| alpha (RGBA, gray with alpha, a palette or color marked transparent) | composited on black |
| CMYK, YCCK, YCbCr | RGB by Pillow's plain conversion; color profiles are not applied |
| 16-bit gray | value / 257, rounded; with `data.range`, low becomes 0 and high 255 |
| 32-bit integers above 65,535, floats | refused without `data.range`, else like 16-bit gray |
| 16-bit color in a TIFF | like 16-bit gray |
| other 16-bit color, 16-bit gray with alpha | the high byte; refused if dark or with a range |
| 16-bit gray TIFF whose zero is white | inverted, as Pillow does for 8 bits |
| EXIF orientation | applied, so that the pixels are upright |
| several frames (GIF, WebP, PNG) | the first frame |
| several pages (TIFF) | as many channels, unless the other pages are smaller copies |
| .npy, and TIFF with other bands than gray, RGB and alpha | as many channels |
| four bands of JPEG or JPEG 2000 without a meaning, alpha of 0 everywhere, Lab | refused |
| another number of channels than `data.channels` | refused, except for 1 and 3 |
| more than 178,956,970 pixels | refused, as a possible decompression bomb |
| 1x1 pixels | read like any other image |

The format is recognized by the content of a file, not by its suffix. The installed Pillow decodes
it. Formats that start another program (EPS) or that Pillow cannot decode by itself are refused. A
file that begins like a JPEG is only read by JPEG decoders.
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

from ssl_pretrain.data import bands
from ssl_pretrain.data import pixels as pixel_formats
from ssl_pretrain.data.pixels import RGB, PixelFormat

MAX_PIXELS = 178_956_970  # Pillow's own limit, twice Image.MAX_IMAGE_PIXELS
MAX_BYTES = 1 << 30  # no image of MAX_PIXELS pixels needs a larger file
# EPS starts another program. IPTC passes its content to any decoder, including EPS. WMF needs
# Windows. Pillow has no decoders of its own for the others.
_REFUSED_FORMATS = {"EPS", "IPTC", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}
_JPEG_SIGNATURE = b"\xff\xd8"
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_BOMB_REMEDY = "(possibly a decompression bomb); cut it into smaller images"
_ORIENTATION_TAG = 0x0112
# Functions that turn the stored pixels upright, by EXIF orientation.
_UPRIGHT_TRANSFORMS = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].transpose(1, 0, 2),
    8: lambda pixels: np.rot90(pixels, 1),
}


class UnreadableImage(ValueError):
    """Error for an image that is absent, damaged or in a format without a rule for RGB.

    The message names the file and the reason.
    """


class UnreachableSource(ValueError):
    """The images cannot be read for a reason that replacing one of them would not remedy.

    The message names the place, the reason and the remedy.
    """


class ImageHeader(NamedTuple):
    """Properties of an image file."""

    mode: str  # Pillow's name for the pixel format
    width: int  # pixels, as stored
    height: int
    num_frames: int  # frames, or pages of a TIFF
    # Range of the values, without the lowest and highest 0.1 %. None for 8-bit images.
    value_range: pixel_formats.ValueRange | None = None
    num_channels: int = 3  # without alpha, which is composited in gray and color images
    has_alpha: bool = False

    @property
    def num_stored(self) -> int:
        """Number of channels, alpha included."""
        return self.num_channels + self.has_alpha

    def can_become(self, num_channels: int) -> bool:
        """Return True if the image can be read with this many channels."""
        is_gray_or_color = {self.num_channels, num_channels} <= {1, 3}
        return is_gray_or_color or self.num_stored == num_channels

    @property
    def is_float(self) -> bool:
        """True if the values are floating-point numbers, which have no range of their own."""
        return self.mode == "F" or "float" in self.mode


def describe_values(values: np.ndarray, mode: str = "") -> ImageHeader:
    """Return the properties of an image with these values, (height, width, channels).

    Args:
        values: Values as stored.
        mode: Pillow's name for the pixel format, or an empty string to name it by the values.
    """
    height, width, num_channels = values.shape
    kind = values.dtype.name
    is_narrow = kind in ("uint8", "bool")
    if not mode and is_narrow:
        mode = {1: "L", 3: "RGB"}.get(num_channels, f"{num_channels} bands")
    elif not mode and num_channels == 1:
        mode = {"uint16": "I;16"}.get(kind, kind)
    elif not mode:
        mode = f"RGB {kind}" if num_channels == 3 else f"{num_channels} bands of {kind}"
    value_range = None if is_narrow else pixel_formats.used_range(values)
    return ImageHeader(mode, width, height, 1, value_range, num_channels)


@functools.cache
def image_formats() -> tuple[str, ...]:
    """Return Pillow's names for the formats that are read."""
    Image.init()
    return tuple(name for name in Image.OPEN if name not in _REFUSED_FORMATS)


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Return the suffixes of the formats that are read, in lower case."""
    names = {*image_formats(), "MPO"}  # an MPO begins like a JPEG and is opened as one
    formats_by_suffix = Image.registered_extensions()
    return frozenset(suffix for suffix in formats_by_suffix if formats_by_suffix[suffix] in names)


def decode(
    content: bytes,
    name: str,
    pixel_format: PixelFormat = RGB,
) -> np.ndarray:
    """Return writable pixels, uint8 (height, width, num_channels), in any memory order.

    Three channels are RGB by the rules above, and one is the luma of RGB. Other numbers, NumPy
    files, and TIFFs with more bands or pages are read by the rules of `bands`.

    Args:
        content: Bytes of the file.
        name: Name of the file, for messages.
        pixel_format: Number of channels, and the range of values wider than 8 bits.

    Raises:
        UnreadableImage: If the file is damaged, truncated or refused. The message names it.
        UnreachableSource: If a package is missing that decodes it.
    """
    num_channels = pixel_format.num_channels
    if num_channels not in (1, 3) or bands.has_bands(content):
        return _decode_bands(content, name, pixel_format)
    rgb = _decode_rgb(content, name, pixel_format.value_range)
    return rgb if num_channels == 3 else pixel_formats.to_gray(rgb)


def _decode_bands(content: bytes, name: str, pixel_format: PixelFormat) -> np.ndarray:
    """Return the bands of an image, uint8 (height, width, num_channels)."""
    num_channels = pixel_format.num_channels
    if bands.is_npy(content) or content.startswith(bands.TIFF_SIGNATURES):
        values = _read_bands(content, name, num_channels)
    else:
        with _open(content, name) as image:
            values = bands.read_with_pillow(image)
    try:
        pixel_formats.check_conversion(name, values.shape[2], num_channels)
    except pixel_formats.WrongChannels as error:
        raise UnreadableImage(str(error)) from error
    try:
        pixels = pixel_formats.to_8_bits(values, pixel_format.value_range)
    except ValueError as error:
        raise UnreadableImage(f"{name}: {error}") from error
    return pixel_formats.convert_channels(pixels, num_channels)


def _read_bands(content: bytes, name: str, num_channels: int) -> np.ndarray:
    """Return the values of a .npy or TIFF, (height, width, channels)."""
    try:
        return bands.read(content, bands.count_bands(content, num_channels))
    except bands.MissingDecoder as error:
        raise UnreachableSource(f"{name}: {error}") from error
    except Exception as error:  # decoders raise almost anything for damaged files
        raise UnreadableImage(f"{name}: {str(error) or type(error).__name__}") from error


def _decode_rgb(
    content: bytes, name: str, value_range: pixel_formats.ValueRange | None
) -> np.ndarray:
    """Return the RGB pixels of an image by the rules above."""
    if content.startswith(_JPEG_SIGNATURE):
        width, height = jpeg_size(content)
        _check_size(width, height, name)
        if width and (pixels := _decode_plain_jpeg(content)) is not None:
            return pixels
    with _open(content, name) as image:
        pixel_formats.check_bands(image)
        has_16_bits = pixel_formats.has_16_bits(image)
        image.load()
        pixels = pixel_formats.to_rgb(image, value_range, has_16_bits)
        # Read the orientation after loading, because loading turns a TIFF upright.
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    return np.ascontiguousarray(_UPRIGHT_TRANSFORMS.get(orientation, lambda pixels: pixels)(pixels))


def read_header(content: bytes, name: str, num_channels: int = 3) -> ImageHeader:
    """Return the properties of an image file. Pixels are only decoded if they exceed 8 bits.

    Args:
        content: Bytes of the file.
        name: Name of the file, for messages.
        num_channels: The setting `data.channels`, which tells the order of a .npy's axes.

    Raises:
        UnreadableImage: If the file is damaged. The message names it.
        UnreachableSource: If a package is missing that decodes it.
    """
    if bands.has_bands(content):
        return describe_values(_read_bands(content, name, num_channels))
    with _open(content, name) as image:
        num_frames = getattr(image, "n_frames", 1)
        if pixel_formats.is_wide_mode(image.mode):
            header = describe_values(np.array(image)[..., None], image.mode)
            return header._replace(num_frames=num_frames)
        num_channels = 1 if image.mode in ("1", "L", "LA") else 3
        has_alpha = image.mode in ("LA", "RGBA")
        return ImageHeader(
            image.mode, image.width, image.height, num_frames, None, num_channels, has_alpha
        )


@contextmanager
def _open(content: bytes, name: str) -> Iterator[Image.Image]:
    """Open an image by its content and turn all errors into UnreadableImage."""
    if not content:
        raise UnreadableImage(f"{name}: the file is empty")
    is_jpeg = content.startswith(_JPEG_SIGNATURE)
    formats = ("JPEG",) if is_jpeg else image_formats()
    # Pillow's own limit is the same, but its message does not have the size.
    if is_jpeg:
        _check_size(*jpeg_size(content), name)
    try:
        if content.startswith(_PNG_SIGNATURE):
            _check_size(*png_size(content), name)
        with Image.open(io.BytesIO(content), formats=formats) as image:
            _check_size(image.width, image.height, name)
            yield image
    except UnreadableImage:
        raise
    except Exception as error:  # decoders raise almost anything for damaged files
        raise UnreadableImage(f"{name}: {_reason(content, error)}") from error


def _reason(content: bytes, error: Exception) -> str:
    """Return the reason why an image could not be decoded."""
    if isinstance(error, Image.DecompressionBombError):
        return f"its pixels exceed the limit of {MAX_PIXELS:,} {_BOMB_REMEDY}"
    if not isinstance(error, Image.UnidentifiedImageError):
        return str(error) or type(error).__name__
    if content.startswith(bands.TIFF_SIGNATURES):
        return (
            "Pillow cannot read a TIFF with this compression or this number of bands or bits; "
            "convert it to gray or RGB with 8 or 16 bits"
        )
    return "not a known image format"


def _check_size(width: int, height: int, name: str) -> None:
    if width * height > MAX_PIXELS:
        raise UnreadableImage(
            f"{name}: {width:,} x {height:,} pixels exceed the limit of {MAX_PIXELS:,} "
            f"{_BOMB_REMEDY}"
        )


def png_size(content: bytes) -> tuple[int, int]:
    """Return width and height from the header of a PNG, or (0, 0) if it is cut off.

    Raises:
        ValueError: If another chunk comes first. Pillow would skip it and read the size later.
    """
    if len(content) < 24:
        return 0, 0
    if content[12:16] != b"IHDR":
        raise ValueError("the PNG does not begin with IHDR")
    return int.from_bytes(content[16:20]), int.from_bytes(content[20:24])


def jpeg_size(content: bytes) -> tuple[int, int]:
    """Return width and height from a JPEG's first frame header, or (0, 0) if there is none.

    Where libjpeg would not skip a segment by its length, the result is (0, 0) as well, because the
    next header could be another than the one that libjpeg reads.
    """
    position = 2
    while position + 9 <= len(content) and content[position] == 0xFF:
        marker = content[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a frame header
            height = int.from_bytes(content[position + 5 : position + 7])
            return int.from_bytes(content[position + 7 : position + 9]), height
        elif marker in (0x00, 0xD9, 0xDA):  # no marker, end of the image, start of a scan
            break
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:  # markers without a length
            position += 2
        else:
            position += 2 + int.from_bytes(content[position + 2 : position + 4])
    return 0, 0


def _decode_plain_jpeg(content: bytes) -> np.ndarray | None:
    """Decode a gray or RGB JPEG exactly as Pillow does, but twice as fast for small images.

    Return None for a damaged or CMYK image, which Pillow has to decode.
    """
    encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    try:
        pixels = decode_jpeg(encoded, apply_exif_orientation=True)
    except RuntimeError:
        return None
    if len(pixels) == 4:  # torchvision and Pillow convert CMYK differently
        return None
    rgb = pixels if len(pixels) == 3 else pixels.repeat(3, 1, 1)
    return rgb.permute(1, 2, 0).numpy()
