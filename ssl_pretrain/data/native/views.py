"""Make all views of a decoded image in compiled code that runs without the GIL."""

import hashlib
import inspect
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ssl_pretrain import rng
from ssl_pretrain.system.jit import njit
from ssl_pretrain.views import crops, resize
from ssl_pretrain.views.recipe import Crop


class ViewTable(NamedTuple):
    """Recipes of the views, one row per view, for compiled code."""

    box_parameters: np.ndarray  # float64 (views, 6), see `crops.box_parameters`
    sizes: np.ndarray  # int64 (views, 2), height and width
    channels: int
    bicubic: np.ndarray  # bool (views,)
    antialias: np.ndarray  # bool (views,)
    offsets: np.ndarray  # int64 (views,), first byte of each view in a batch


class Buffers(NamedTuple):
    """Memory of one thread for one image at a time."""

    image: np.ndarray  # decoded pixels, in rows padded to whole tiles
    transposed_image: np.ndarray
    resize_buffers: tuple[np.ndarray, ...]


def pack_views(view_crops: list[Crop], channels: int, batch_size: int) -> ViewTable:
    """Pack the recipes of all views for compiled code.

    A batch contains view 0 of all images, then view 1 of all images, and so on.
    """
    sizes = np.array([(crop.height, crop.width) for crop in view_crops], np.int64)
    num_bytes = batch_size * channels * sizes.prod(axis=1)
    return ViewTable(
        channels=channels,
        box_parameters=np.array([crops.box_parameters(crop) for crop in view_crops]),
        sizes=sizes,
        bicubic=np.array([crop.interpolation == "bicubic" for crop in view_crops]),
        antialias=np.array([crop.antialias for crop in view_crops]),
        offsets=np.cumsum(num_bytes) - num_bytes,
    )


def allocate_buffers(
    channels: int, heights: np.ndarray, widths: np.ndarray, view_crops: list[Crop]
) -> Buffers:
    """Allocate buffers for the largest of the images with these sizes, int64 (n,)."""
    # The tallest image need not be the widest, so the largest area can be below max * max.
    row_bytes = resize.pad_to_tiles(channels * widths)
    num_bytes = int((resize.pad_to_tiles(heights) * row_bytes).max())
    return Buffers(
        image=np.zeros(num_bytes, np.uint8),
        transposed_image=np.zeros(num_bytes, np.uint8),
        resize_buffers=resize.allocate_buffers(
            channels,
            int(max(heights.max(), widths.max())),
            [(crop.height, crop.width) for crop in view_crops] or [(1, 1)],
            any(crop.interpolation == "bicubic" for crop in view_crops),
        ),
    )


@njit(nogil=True)
def write_views(views, size, key, row, buffers, batch):
    """Write the views of the image in `buffers.image` to a row of the batch.

    Args:
        views: Recipes of the views.
        size: Height and width of the image.
        key: Seed, epoch and index of the image, which determine the crop boxes.
        row: Row in the batch.
        buffers: Memory of the thread.
        batch: Pixels of the batch, flat.
    """
    height, width = size
    seed, epoch, box_index = key
    channels = views.channels
    row_bytes = channels * width
    column_pitch, row_pitch = resize.pad_to_tiles_jit(height), resize.pad_to_tiles_jit(row_bytes)
    resize.transpose(
        buffers.image, row_pitch, height, row_bytes, buffers.transposed_image, column_pitch
    )
    source = buffers.transposed_image
    for view in range(len(views.sizes)):
        box = crops.draw_box_fields(
            views.box_parameters[view], (seed, epoch, box_index, view), height, width
        )
        view_size, bicubic = (views.sizes[view, 0], views.sizes[view, 1]), views.bicubic[view]
        num_values = channels * view_size[0] * view_size[1]
        start = views.offsets[view] + row * num_values
        out = batch[start : start + num_values]
        if views.antialias[view]:
            resize.write_view(
                source, channels, column_pitch, box, view_size, bicubic, buffers.resize_buffers, out
            )
        else:
            resize.write_view_without_antialias(
                source, channels, column_pitch, box, view_size, bicubic, out
            )


def digest_of_called_code() -> str:
    """Return a digest of `write_views` and of the modules that it calls.

    Compiled functions that call `write_views` refer to it, because numba's cache on disk only
    notices changes in their own file.
    """
    paths = [Path(__file__), *(Path(inspect.getfile(module)) for module in (rng, crops, resize))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def _compile(source_digest: str):
    @njit(nogil=True, cache=True)
    def write_views_of(pixels, views, key, row, buffers, batch):
        """Write the views of pixels, uint8 (height, channels * width), to a row of the batch."""
        assert source_digest
        height, row_bytes = pixels.shape
        pitch = resize.pad_to_tiles_jit(row_bytes)
        for y in range(height):
            resize.copy_bytes(pixels[y], buffers.image[y * pitch : y * pitch + row_bytes])
        write_views(views, (height, row_bytes // views.channels), key, row, buffers, batch)

    return write_views_of


write_views_of = _compile(digest_of_called_code())
