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
MAX_VALUES = 1 << 31  # per image, as protection from damaged headers


def is_npy(content: bytes) -> bool:
    """Return True if a file is an array in NumPy's format."""
    return content.startswith(NPY_SIGNATURE)


def read(content: bytes, num_channels: int) -> np.ndarray:
    """Return the values of an image as stored, (height, width, channels).

    Args:
        content: Bytes of the file.
        num_channels: Expected number of channels, which tells the order of a NumPy array's axes.

    Raises:
        ValueError: If the file has another number of channels, or is no image.
    """
    if is_npy(content):
        values = _read_npy(content, num_channels)
    elif content.startswith(TIFF_SIGNATURES):
        values = _read_tiff(content)
    else:
        values = _read_with_pillow(content)
    found = values.shape[2]
    if found != num_channels:
        raise ValueError(
            f"it has {found} channels, and data.channels is {num_channels}; set "
            f"data.channels={found} if all images have that many"
        )
    if values.dtype.kind not in "buif":
        raise ValueError(f"its values are of type {values.dtype}; save integers or floats")
    return values


def _read_npy(content: bytes, num_channels: int) -> np.ndarray:
    values = np.load(io.BytesIO(content), allow_pickle=False)
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
