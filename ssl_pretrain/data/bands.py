"""Read images of any number of channels: NumPy files, TIFFs with bands or pages, and alpha.

| in the file | channels |
|---|---|
| .npy of shape (height, width), (height, width, c) or (c, height, width) | 1 or c |
| TIFF with interleaved or separate bands | its bands |
| TIFF with several pages of the same size and type | its pages |
| any other image in Pillow's modes L, LA, RGB or RGBA | 1, 2, 3 or 4, alpha unchanged |

No value is composited or rotated. Values wider than 8 bits become 8 bits by `data.range`.
"""

import io
import logging
from functools import cache

import numpy as np
import tifffile
from PIL import Image

from ssl_pretrain.system.optional_packages import install_hint, is_installed

NPY_SIGNATURE = b"\x93NUMPY"
TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PLAIN_PHOTOMETRICS = (0, 1, 2)  # gray whose zero is white or black, and RGB
_ALPHA = (1, 2)  # values of the tag ExtraSamples
MAX_VALUES = 1 << 29  # per image, as many as Pillow's limit of pixels allows in RGB
# Compressions that tifffile decodes itself: none, deflate, PackBits and LZMA.
_PLAIN_COMPRESSIONS = (1, 8, 32773, 32946, 34925)
_OPTIONAL_COMPRESSIONS = {50000: "zstd", 50001: "webp"}  # by the names that Pillow has for them

# tifffile reports unusual tags of readable files. Without a handler, Python prints the reports. A
# program that configures logging still gets them.
logging.getLogger("tifffile").addHandler(logging.NullHandler())


class MissingDecoder(Exception):
    """Error for a TIFF whose compression needs the package imagecodecs."""


def is_npy(content: bytes) -> bool:
    """Return True if a file is an array in NumPy's format."""
    return content.startswith(NPY_SIGNATURE)


def has_bands(content: bytes) -> bool:
    """Return True for a .npy, and for a TIFF that Pillow does not read, or not in full.

    Such a TIFF has more bands than gray, color and alpha, several pages, several bands of more than
    8 bits, or a type or compression that Pillow does not know.
    """
    if is_npy(content):
        return True
    if not content.startswith(TIFF_SIGNATURES):
        return False
    try:
        with _open_tiff(content) as file:
            has_pages = len(file.pages) > 1 and not file.series[0].is_pyramidal
            page = file.pages.first
            if page.photometric not in _PLAIN_PHOTOMETRICS:  # palettes, inks and other color spaces
                return has_pages
            return (
                has_pages
                or _has_unusual_bands(page)
                or not _pillow_has(int(page.compression))
                or not _opens_with_pillow(content)
            )
    except Exception:  # Pillow names the damage
        return False


def _has_unusual_bands(page: tifffile.TiffPage) -> bool:
    """Return True unless the bands of a page are gray, or 8-bit gray or color with alpha."""
    has_alpha = len(page.extrasamples) == 1 and page.extrasamples[0] in _ALPHA
    num_colors = page.samplesperpixel - has_alpha
    return num_colors not in (1, 3) or (page.samplesperpixel > 1 and page.bitspersample > 8)


@cache
def _pillow_has(compression: int) -> bool:
    """Return False for a compression that Pillow knows, but was built without.

    It opens such a TIFF, and cannot decode it.
    """
    if compression not in _OPTIONAL_COMPRESSIONS:
        return True
    name = _OPTIONAL_COMPRESSIONS[compression]
    try:
        Image.new("RGB", (16, 16)).save(io.BytesIO(), "TIFF", compression=name)
    except Exception:  # an OSError or a RuntimeError, depending on its version
        return False
    return True


def _opens_with_pillow(content: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(content), formats=("TIFF",)):
            return True
    except Exception:  # Pillow raises almost anything for files that it does not know
        return False


def count_bands(content: bytes, expected: int) -> int:
    """Return the number of channels of a .npy, or the expected number if an axis has its length.

    For a TIFF, whose axes are known, it is always the expected number.
    """
    if not is_npy(content):
        return expected
    shape = _read_npy_header(content)[0]
    ends = (shape[0], shape[-1]) if len(shape) == 3 else (1,)
    return expected if expected in ends else min(ends)


def read(content: bytes, num_channels: int) -> np.ndarray:
    """Return the values of a .npy or TIFF as stored, writable (height, width, channels).

    Args:
        content: Bytes of the file.
        num_channels: Expected number of channels, which tells the order of a NumPy array's axes.
            The image may have another number.

    Raises:
        ValueError: If the file is damaged or no image.
        MissingDecoder: If a TIFF is compressed by a method that needs imagecodecs.
    """
    values = _read_npy(content, num_channels) if is_npy(content) else _read_tiff(content)
    if values.dtype.kind not in "buif":
        raise ValueError(f"its values are of type {values.dtype}; save integers or floats")
    return values


def read_with_pillow(image: Image.Image) -> np.ndarray:
    """Return the channels of an image that Pillow has opened, alpha unchanged.

    Raises:
        ValueError: If the meaning of a channel depends on more than its place.
    """
    if image.mode not in ("L", "LA", "RGB", "RGBA"):
        raise ValueError(
            f"its pixels are of mode {image.mode}, whose channels are not defined; save it as a "
            "TIFF or a .npy"
        )
    values = np.array(image)
    return values if values.ndim == 3 else values[..., None]


def _read_npy(content: bytes, num_channels: int) -> np.ndarray:
    shape, is_fortran, dtype, offset = _read_npy_header(content)
    values = np.frombuffer(content, dtype, offset=offset).copy()
    values = values.reshape(shape, order="F" if is_fortran else "C")
    if values.ndim == 2:
        return values[..., None]
    # With another number of channels, they are the shorter axis, for the message.
    is_last = shape[2] == num_channels or (shape[0] != num_channels and shape[2] <= shape[0])
    return values if is_last else np.moveaxis(values, 0, -1)


def _read_npy_header(content: bytes) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Return the shape, the order of the axes, the type, and the position of the first value.

    Raises:
        ValueError: If the array is not one image, or the file has another length.
    """
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    is_old = version == (1, 0)
    read_header = (
        np.lib.format.read_array_header_1_0 if is_old else np.lib.format.read_array_header_2_0
    )
    shape, is_fortran, dtype = read_header(file)
    if dtype.hasobject:
        raise ValueError(
            "it holds Python objects, which only pickle can load, and a pickle can run any "
            "program; save an array of numbers"
        )
    if len(shape) not in (2, 3) or 0 in shape:
        many = "; an array of many images is given as data.root=FILE" if len(shape) == 4 else ""
        raise ValueError(
            f"its shape is {shape}; save one image as (height, width), (height, width, channels) "
            f"or (channels, height, width){many}"
        )
    _check_num_values(shape)
    expected, offset = dtype.itemsize * int(np.prod(shape, dtype=np.int64)), file.tell()
    if len(content) - offset != expected:
        raise ValueError(
            f"its header promises {expected:,} bytes of values, and it has "
            f"{len(content) - offset:,}; copy it again"
        )
    return shape, is_fortran, dtype, offset


def _check_num_values(shape: tuple[int, ...]) -> None:
    """Raise ValueError for a declared shape that no image needs."""
    num_values = int(np.prod(shape, dtype=object))
    if num_values > MAX_VALUES:
        raise ValueError(
            f"its shape {shape} has {num_values:,} values, more than the limit of {MAX_VALUES:,} "
            "(possibly a decompression bomb); cut it into smaller images"
        )


def _open_tiff(content: bytes) -> tifffile.TiffFile:
    """Open a TIFF. OME's metadata may name other files, which are not part of the image."""
    return tifffile.TiffFile(io.BytesIO(content), _multifile=False)


def _read_tiff(content: bytes) -> np.ndarray:
    with _open_tiff(content) as file:
        series = file.series[0]
        axes, shape = series.axes, series.shape
        if len(file.series) > 1 and not series.is_pyramidal:
            raise ValueError("its pages have different sizes; save each as a file of its own")
        if any(page is None for page in series.pages):  # would be read as zeros
            raise ValueError(
                f"its metadata promise an image of the shape {shape}, and pages are missing; save "
                "all channels in one file"
            )
        _check_num_values(shape)
        try:
            values = series.asarray()
        except Exception as error:
            compression = file.pages.first.compression
            is_plain = compression in _PLAIN_COMPRESSIONS and "imagecodecs" not in str(error)
            if is_plain or is_installed("imagecodecs"):
                raise
            raise MissingDecoder(
                f"its compression {getattr(compression, 'name', compression)} needs imagecodecs, "
                f"which is not installed; {install_hint('tiff')}"
            ) from error
    if axes == "YX":
        return values[..., None]
    if len(axes) == 3 and axes.endswith("YX"):
        return np.moveaxis(values, 0, -1)
    if axes == "YXS":
        return values
    raise ValueError(
        f"its axes are {axes} with the lengths {shape}; save one image per file, with bands or "
        "pages as channels"
    )
