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

import numpy as np
import tifffile
from PIL import Image

NPY_SIGNATURE = b"\x93NUMPY"
TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PLAIN_PHOTOMETRICS = (0, 1, 2)  # gray whose zero is white or black, and RGB
_ALPHA = (1, 2)  # values of the tag ExtraSamples
MAX_VALUES = 1 << 31  # per image, as protection from damaged headers


def is_npy(content: bytes) -> bool:
    """Return True if a file is an array in NumPy's format."""
    return content.startswith(NPY_SIGNATURE)


def has_bands(content: bytes) -> bool:
    """Return True for a .npy, and for a TIFF that Pillow does not read, or not in full.

    Such a TIFF has more bands than gray, color and alpha, several pages, or color of more than 8
    bits.
    """
    if is_npy(content):
        return True
    if not content.startswith(TIFF_SIGNATURES):
        return False
    try:
        with tifffile.TiffFile(io.BytesIO(content)) as file:
            has_pages = len(file.pages) > 1 and not file.series[0].is_pyramidal
            return has_pages or _has_unusual_bands(file.pages.first)
    except Exception:  # Pillow names the damage
        return False


def _has_unusual_bands(page: tifffile.TiffPage) -> bool:
    """Return True unless the bands of a page are gray or 8-bit color, with or without alpha."""
    if page.photometric not in _PLAIN_PHOTOMETRICS:  # palettes, inks and other color spaces
        return False
    has_alpha = len(page.extrasamples) == 1 and page.extrasamples[0] in _ALPHA
    num_colors = page.samplesperpixel - has_alpha
    return num_colors not in (1, 3) or (num_colors == 3 and page.bitspersample > 8)


def count_bands(content: bytes) -> int:
    """Return the number of channels of a .npy or TIFF, whose shortest axis they are in a .npy."""
    if is_npy(content):
        shape = _load_npy(content).shape
        return 1 if len(shape) == 2 else min(shape[0], shape[-1])
    return _read_tiff(content).shape[2]


def read(content: bytes, num_channels: int) -> np.ndarray:
    """Return the values of an image as stored, (height, width, channels).

    Args:
        content: Bytes of the file.
        num_channels: Expected number of channels, which tells the order of a NumPy array's axes.
            The image may have another number.

    Raises:
        ValueError: If the file is damaged or no image.
    """
    if is_npy(content):
        values = _read_npy(content, num_channels)
    elif content.startswith(TIFF_SIGNATURES):
        values = _read_tiff(content)
    else:
        values = _read_with_pillow(content)
    if values.dtype.kind not in "buif":
        raise ValueError(f"its values are of type {values.dtype}; save integers or floats")
    return values


def _read_npy(content: bytes, num_channels: int) -> np.ndarray:
    values = _load_npy(content)
    if values.ndim == 2:
        return values[..., None]
    if values.ndim != 3:
        raise ValueError(
            f"its shape is {values.shape}; save one image as (height, width), (height, width, "
            "channels) or (channels, height, width)"
        )
    if values.shape[2] != num_channels and values.shape[0] == num_channels:
        return np.moveaxis(values, 0, -1)
    if values.shape[2] > values.shape[0]:  # for the message about another number of channels
        return np.moveaxis(values, 0, -1)
    return values


def _load_npy(content: bytes) -> np.ndarray:
    values: np.ndarray = np.load(io.BytesIO(content), allow_pickle=False)
    return values


def _read_tiff(content: bytes) -> np.ndarray:
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        series = file.series[0]
        axes, shape = series.axes, series.shape
        if len(file.series) > 1 and not series.is_pyramidal:
            raise ValueError("its pages have different sizes; save each as a file of its own")
        if np.prod(shape, dtype=np.int64) > MAX_VALUES:
            raise ValueError(f"its {shape} values are too many; cut it into smaller images")
        values = series.asarray()
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


def _read_with_pillow(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as image:
        if image.mode not in ("L", "LA", "RGB", "RGBA"):
            raise ValueError(
                f"its pixels are of mode {image.mode}, whose channels are not defined; save it as "
                "a TIFF or a .npy"
            )
        values = np.array(image)
    return values if values.ndim == 3 else values[..., None]
