"""Decode an image file to RGB pixels, by one rule for every pixel format, so that a mixed folder needs no preparation.

| in the file | becomes |
|---|---|
| gray, 1-bit, palette | RGB, each gray value or palette entry as it is |
| alpha (RGBA, gray with alpha, a palette or color marked transparent) | composited on black |
| CMYK, YCCK, YCbCr | RGB by Pillow's plain conversion; color profiles are not applied |
| 16-bit gray | value / 257, rounded: 65,535 becomes 255. With `data.range`, low becomes 0 and high 255 |
| 32-bit integers above 65,535, floats | refused without `data.range`, which maps them as 16-bit gray |
| 16-bit color, gray with alpha | the high byte, within one level of value / 257; refused with `data.range`, and where that is dark |
| 16-bit gray TIFF whose zero is white | inverted, as Pillow inverts 8 bits |
| EXIF orientation | applied: the image is stored upright |
| several frames (GIF, WebP, PNG) | the first |
| several pages (TIFF) | refused, unless the others are smaller copies |
| four bands of which none is said to be alpha or ink, alpha that is 0 everywhere, Lab | refused: they would be taken for something else |
| more than 178,956,970 pixels | refused, as what Pillow calls a decompression bomb |
| 1x1 pixels | 1x1 pixels |

A file is read by what it holds, not by its suffix, with the decoders that the installed Pillow brings. Those that start another
program (EPS) or decode nothing are left out, and what begins as a JPEG is given to JPEG decoders alone.
"""

import functools
import io
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torchvision.io import decode_jpeg

MAX_PIXELS = 178_956_970  # twice Image.MAX_IMAGE_PIXELS, where Pillow refuses
MAX_BYTES = 1 << 30  # of a file: no image of so many pixels needs more
Range = tuple[float, float]  # the values that become black and white
# EPS starts another program, and IPTC hands its content to any decoder, EPS too. WMF needs Windows. The others decode nothing.
_NOT_DECODED = {"EPS", "IPTC", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}
_DARK = 64  # of 256 levels; 16-bit color with fewer uses 14 bits or less, and its high byte keeps little of them
_ORIENTATION_TAG, _EXTRA_SAMPLES, _PHOTOMETRIC, _SUBFILE, _BANDS = 0x0112, 338, 262, 254, 277
_COLORS = {
    0: 1,
    1: 1,
    2: 3,
    3: 1,
    5: 4,
    6: 3,
    8: 3,
}  # bands of each photometric interpretation of TIFF
_UPRIGHT = {  # EXIF orientation -> what turns the stored pixels upright
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].transpose(1, 0, 2),
    8: lambda pixels: np.rot90(pixels, 1),
}


class UnreadableImage(ValueError):
    """An image that cannot be read: absent, damaged, or of a format without an agreed RGB. The message names the file and the reason."""


class Stored(NamedTuple):
    """Description of an image file.

    mode: Pillow's name of the pixel format. width, height: in pixels, as stored. frames: number of frames, or of a TIFF's pages.
    low, high: values below and above which one in a thousand lies, for values wider than 8 bits. None for 8 bits.
    """

    mode: str
    width: int
    height: int
    frames: int
    low: float | None = None
    high: float | None = None


@functools.cache
def formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read here."""
    Image.init()
    return tuple(name for name in Image.OPEN if name not in _NOT_DECODED)


@functools.cache
def suffixes() -> frozenset[str]:
    """The suffixes of those formats, in lower case."""
    named = Image.registered_extensions()
    return frozenset(
        suffix for suffix, name in named.items() if name in {*formats(), "MPO"}
    )  # MPO begins as a JPEG and is opened as one


def decode(
    content: bytes, name: str, values: Range | None = None, jpeg: bool = False
) -> np.ndarray:
    """Return RGB pixels by the rule above: uint8 (height, width, 3), writable, in any memory order.

    Args:
        content: The bytes of the file.
        name: Name of the file, for messages.
        values: `data.range`, for values wider than 8 bits.
        jpeg: Refuse everything but a JPEG.

    Raises:
        UnreadableImage: The message has `name` and what is wrong. A truncated file is unreadable, never half gray.
    """
    if not content:
        raise UnreadableImage(f"{name}: the file is empty")
    is_jpeg = content.startswith(b"\xff\xd8")
    if jpeg and not is_jpeg:
        raise UnreadableImage(f"{name}: not a JPEG")
    if is_jpeg:
        width, height = _jpeg_size(content)
        _check_pixels(width, height, name)
        if width and (pixels := _plain_jpeg(content)) is not None:
            return pixels
    try:
        with _opened(content) as image:
            _check_pixels(image.width, image.height, name)
            _check_bands(image)
            is_deep = _has_16_bits(image)
            image.load()
            pixels = _rgb(image, values, is_deep)
            orientation = image.getexif().get(
                _ORIENTATION_TAG, 1
            )  # after load, where Pillow has turned a TIFF already
    except UnreadableImage:
        raise
    except Exception as error:  # decoders of damaged files raise nearly anything: SyntaxError, struct.error, zlib.error, ...
        raise UnreadableImage(f"{name}: {_reason(content, error)}") from error
    return np.ascontiguousarray(_UPRIGHT.get(orientation, lambda same: same)(pixels))


def inspect(content: bytes, name: str) -> Stored:
    """Describe an image file. The pixels are decoded only where they are wider than 8 bits. Raises UnreadableImage."""
    if not content:
        raise UnreadableImage(f"{name}: the file is empty")
    try:
        with _opened(content) as image:
            _check_pixels(image.width, image.height, name)
            stored = Stored(image.mode, image.width, image.height, getattr(image, "n_frames", 1))
            if not _is_wide(image.mode):
                return stored
            values = np.array(image)
            finite = values[np.isfinite(values)] if image.mode == "F" else values
            low, high = (
                np.percentile(finite, [0.1, 99.9], method="nearest") if finite.size else (0, 0)
            )
            return stored._replace(low=float(low), high=float(high))
    except UnreadableImage:
        raise
    except Exception as error:
        raise UnreadableImage(f"{name}: {_reason(content, error)}") from error


def _opened(content: bytes) -> Image.Image:
    """Open an image by its content. What begins as a JPEG is given to the JPEG decoder alone."""
    return Image.open(
        io.BytesIO(content), formats=("JPEG",) if content.startswith(b"\xff\xd8") else formats()
    )


def _reason(content: bytes, error: Exception) -> str:
    if not isinstance(error, Image.UnidentifiedImageError):
        return str(error) or type(error).__name__
    if content.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "Pillow reads no TIFF of this number of bands, bits or compression; convert it to grey or RGB of 8 or 16 bits"
    return "no known image format"


def _check_pixels(width: int, height: int, name: str) -> None:
    if width * height > MAX_PIXELS:
        raise UnreadableImage(
            f"{name}: {width:,} x {height:,} pixels are more than the {MAX_PIXELS:,} that are decoded (a decompression bomb?); "
            "cut it into smaller images"
        )


def _jpeg_size(content: bytes) -> tuple[int, int]:
    """Width and height that a JPEG's first frame header gives; (0, 0) where there is none, which only Pillow may explain."""
    at = 2
    while at + 9 <= len(content) and content[at] == 0xFF:
        marker = content[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return int.from_bytes(content[at + 7 : at + 9]), int.from_bytes(
                content[at + 5 : at + 7]
            )
        elif marker == 0xDA:
            break
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:  # without a length
            at += 2
        else:
            at += 2 + int.from_bytes(content[at + 2 : at + 4])
    return 0, 0


def _check_bands(image: Image.Image) -> None:
    """Raise ValueError for bands and pages that would be taken for what they are not."""
    tags = getattr(image, "tag_v2", {})
    if image.format == "TIFF":
        bands, extra = tags.get(_BANDS, 1), tags.get(_EXTRA_SAMPLES, ())
        surplus = bands - _COLORS.get(tags.get(_PHOTOMETRIC, 1), bands)
        if surplus > 0 and not (surplus == 1 and extra and extra[0] in (1, 2)):
            raise ValueError(
                f"{bands} bands, of which the last is not said to be alpha; choose three bands and save them as RGB"
            )
        frames = getattr(image, "n_frames", 1)
        if frames > 1:
            for page in range(1, frames):
                image.seek(page)
                if not image.tag_v2.get(_SUBFILE, 0) & 1:  # type: ignore[attr-defined]
                    raise ValueError(
                        f"{frames} pages, of which only one would be seen; save each page as a file of its own"
                    )
            image.seek(0)
    elif image.format == "JPEG2000" and len(image.getbands()) == 4:
        raise ValueError(
            "a JPEG 2000 of four bands does not say whether the fourth is alpha; choose three bands and save them as RGB"
        )
    elif image.format in ("JPEG", "MPO") and image.mode == "CMYK" and "adobe" not in image.info:
        raise ValueError(
            "four bands that are not said to be inks; choose three bands and save them as RGB"
        )


def _plain_jpeg(content: bytes) -> np.ndarray | None:
    """Return the pixels that Pillow would give, bit for bit, in half the time for small images. None where Pillow has to decide."""
    try:
        pixels = decode_jpeg(
            torch.frombuffer(bytearray(content), dtype=torch.uint8), apply_exif_orientation=True
        )
    except RuntimeError:
        return None
    if len(pixels) == 4:  # CMYK, whose conversion differs
        return None
    return (pixels if len(pixels) == 3 else pixels.repeat(3, 1, 1)).permute(1, 2, 0).numpy()


def _is_wide(mode: str) -> bool:
    return mode in ("I", "F") or mode.startswith("I;16")


def _rgb(image: Image.Image, values: Range | None, is_deep: bool) -> np.ndarray:
    """The pixels of a loaded image, uint8 (height, width, 3). `is_deep` says that its file has 16 bits per band."""
    if _is_wide(image.mode):
        levels = _levels(np.array(image), image.mode, values)
        if image.format == "TIFF" and getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0:
            levels = 255 - levels
        return np.repeat(levels[..., None], 3, axis=2)
    if image.mode == "LAB":
        raise ValueError(
            "pixels of mode LAB have no agreed conversion to RGB; convert the image to 8 or 16 bits"
        )
    has_alpha = image.has_transparency_data
    pixels = np.array(image.convert("RGBA" if has_alpha else "RGB"))
    if is_deep:
        _check_high_bytes(pixels[..., :3], values)
    if not has_alpha:
        return pixels
    if not pixels[..., 3].any():
        raise ValueError(
            "its alpha is 0 everywhere, which leaves nothing to see; remove the alpha, or the image"
        )
    wide = pixels.astype(np.uint16)
    return ((wide[..., :3] * wide[..., 3:] + 127) // 255).astype(np.uint8)


def _levels(stored: np.ndarray, mode: str, values: Range | None) -> np.ndarray:
    """Map values wider than 8 bits to uint8."""
    if values is not None:
        low, high = values
        share = (stored.astype(np.float64) - low) / (high - low)
        if not np.isfinite(share).all():
            raise ValueError("it holds values that are not finite")
        return np.rint(255 * share.clip(0, 1)).astype(np.uint8)
    if mode == "F":
        raise ValueError(
            "pixels of mode F have no agreed conversion to RGB; give data.range=[low, high] (python -m ssl_pretrain.data.inspect "
            "measures it), or convert the image to 8 or 16 bits"
        )
    whole = stored.astype(np.int64)  # Pillow reads 16-bit PGM as 32-bit
    if whole.min() < 0 or whole.max() > 65535:
        raise ValueError(
            "32-bit integers have no agreed range; give data.range=[low, high] (python -m ssl_pretrain.data.inspect measures it), "
            "or convert the image to 8 or 16 bits"
        )
    return ((whole + 128) // 257).astype(np.uint8)


def _has_16_bits(image: Image.Image) -> bool:
    """Return True if a file has bands of 16 bits. Known from its tiles, which Pillow drops when it loads the pixels."""
    tiles: list[Any] = getattr(image, "tile", [])
    if not tiles or len(tiles[0]) < 4:
        return False
    codec, arguments = tiles[0][0], tiles[0][3]
    arguments = arguments if isinstance(arguments, tuple) else (arguments,)
    if codec == "ppm":
        return len(arguments) > 1 and arguments[1] > 255  # the largest value
    if codec == "sgi_rle":
        return arguments[-1] == 2  # bytes per value
    return codec == "SGI16" or ";16" in str(arguments[0])  # the raw mode, such as RGB;16L


def _check_high_bytes(pixels: np.ndarray, values: Range | None) -> None:
    """Raise ValueError where Pillow keeps the high byte of 16-bit color and little of what was stored is in it."""
    if values is not None:
        raise ValueError(
            "data.range is for gray images without alpha: of 16-bit color Pillow keeps the high byte; convert the image to 8 bits"
        )
    brightest = int(
        np.percentile(pixels, 99.9, method="nearest")
    )  # without the few values that a sensor saturates
    if brightest < _DARK:
        raise ValueError(
            f"16-bit color of which {brightest + 1} of 256 levels would be left, as Pillow keeps the high byte; "
            "convert the image to 8 bits by its own range"
        )
