"""Read an image of a .beton, decode it with FFCV's library, and make its views, without the GIL.

Each image is read and decoded once. The decoder is libturbojpeg, which is part of FFCV's library,
with one decompressor per thread. FFCV's own function, imdecode, is not used for three reasons. It
never frees the decompressors of a thread that has ended. It returns the same status for a harmless
warning as for a destroyed image. Its fast DCT saves only 4 % of the time and produces pixels that
differ from those of Pillow and torchvision.
"""

import ctypes
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ssl_pretrain.data.beton.beton_file import Samples
from ssl_pretrain.data.beton.tables import RAW
from ssl_pretrain.data.native.views import (
    Buffers,
    allocate_buffers,
    digest_of_called_code,
    write_views,
)
from ssl_pretrain.system.jit import njit
from ssl_pretrain.views import resize
from ssl_pretrain.views.recipe import Crop

DONE, TRUNCATED, NOT_JPEG, WRONG_SIZE, DAMAGED = range(5)  # statuses that `decode_image` returns
FAILURE_REASONS = {
    NOT_JPEG: "not a JPEG",
    WRONG_SIZE: "the JPEG's size differs from its table entry",
    DAMAGED: "the JPEG is damaged",
}
INSTALL_HINT = (
    "install it with `make ffcv`, or `pip install ffcv` if OpenCV and libturbojpeg are "
    "installed (docs/install.md)"
)


class CFunctions(NamedTuple):
    """Addresses of C functions. They differ per process, so cached code takes them as input."""

    pread: int
    read_header: int
    decompress: int


class ImageTable(NamedTuple):
    """Descriptors of the open files and the columns of `Samples`, for compiled code."""

    file_descriptors: np.ndarray
    file_index: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    mode: np.ndarray
    height: np.ndarray
    width: np.ndarray


class Workspace(NamedTuple):
    """Decompressor and buffers of one thread."""

    decompressor: int  # address of libturbojpeg's decompressor
    content: np.ndarray  # bytes of the image in its file
    header: np.ndarray  # int32: width, height, subsampling, color space
    buffers: Buffers


def load_library() -> ctypes.CDLL:
    """Load FFCV's library, which contains libturbojpeg.

    Raises:
        ValueError: If FFCV is not installed or does not load. The message says how to install it.
    """
    # FFCV is located without an import, which would take seconds and need OpenCV's Python package.
    spec = importlib.util.find_spec("ffcv")
    folders = (spec.submodule_search_locations or []) if spec else []
    paths = [path for folder in folders for path in sorted(Path(folder).glob("_libffcv*.so"))]
    if not paths:
        raise ValueError(
            f"data.loader: FFCV is not installed; {INSTALL_HINT}, or set data.loader=threads"
        )
    try:
        library = ctypes.CDLL(str(paths[0]))
        library.tjInitDecompress.restype = ctypes.c_void_p
        library.tjDestroy.argtypes = [ctypes.c_void_p]
    except (OSError, AttributeError) as error:
        raise ValueError(
            f"data.loader: FFCV cannot be loaded ({error}); {INSTALL_HINT}, or set "
            "data.loader=threads"
        ) from None
    return library


def load_c_functions() -> CFunctions:
    """Return the addresses of the C functions that `decode_image` calls."""
    ffcv = load_library()
    functions = (ctypes.CDLL(None).pread, ffcv.tjDecompressHeader3, ffcv.tjDecompress2)
    return CFunctions(
        *(ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions)
    )


class Decoder:
    """Decompressor of libturbojpeg for one thread. Close it, or use it in a `with` statement.

    After an unreadable header it reads no other header until a decompression has been attempted
    and has failed.
    """

    def __init__(self) -> None:
        self._library = load_library()
        self.address = self._library.tjInitDecompress()

    def close(self) -> None:
        """Free the decompressor. Further calls have no effect."""
        if self.address:
            self._library.tjDestroy(self.address)
        self.address = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()


def pack_images(samples: Samples, file_descriptors: Sequence[int]) -> ImageTable:
    """Pack the table of the images for compiled code.

    Args:
        samples: The images.
        file_descriptors: Descriptors of the open files, in the order of `samples.paths`.
    """
    columns = (getattr(samples, name) for name in ImageTable._fields[1:])
    return ImageTable(np.array(file_descriptors, np.int32), *columns)


def allocate_workspace(samples: Samples, view_crops: list[Crop], decoder: Decoder) -> Workspace:
    """Allocate buffers for the largest of these images. The decoder must stay open."""
    heights, widths = samples.height.astype(np.int64), samples.width.astype(np.int64)
    return Workspace(
        decompressor=decoder.address,
        content=np.empty(int(samples.length.max()), np.uint8),
        header=np.zeros(4, np.int32),
        buffers=allocate_buffers(3, heights, widths, view_crops),
    )


def _c_caller(result: types.Type, *parameters: types.Type):
    """Return a compiled function (address, arguments) that calls the C function at an address.

    Args:
        result: Type that the C function returns.
        parameters: Types of its arguments.
    """

    @intrinsic
    def call(_context, address, arguments):
        def codegen(context, builder, signature, values):
            llvm_types = [context.get_value_type(parameter) for parameter in parameters]
            cast_values = [
                context.cast(builder, value, llvm_type, parameter)
                for value, llvm_type, parameter in zip(
                    cgutils.unpack_tuple(builder, values[1]), signature.args[1], parameters
                )
            ]
            function_type = ir.FunctionType(context.get_value_type(result), llvm_types)
            function = builder.inttoptr(values[0], function_type.as_pointer())
            return context.cast(builder, builder.call(function, cast_values), result, types.intp)

        return types.intp(types.intp, arguments), codegen

    return call


_pread = _c_caller(types.int64, types.int32, types.intp, types.uint64, types.int64)
_read_header = _c_caller(types.int32, *[types.intp] * 2, types.uint64, *[types.intp] * 4)
_decompress = _c_caller(
    types.int32, *[types.intp] * 2, types.uint64, types.intp, *[types.int32] * 5
)


@njit(nogil=True, cache=True)
def decode_image(functions, images, number, workspace):
    """Read one image into the buffers, with rows padded to whole tiles. Return its status."""
    height, width = np.int64(images.height[number]), np.int64(images.width[number])
    if not _read_content(functions, images, number, workspace):
        return TRUNCATED
    pitch = resize.pad_to_tiles_jit(3 * width)
    if images.mode[number] == RAW:
        for row in range(height):
            source = workspace.content[row * 3 * width : (row + 1) * 3 * width]
            target = workspace.buffers.image[row * pitch : row * pitch + 3 * width]
            resize.copy_bytes(source, target)
        return DONE
    jpeg = (workspace.decompressor, workspace.content.ctypes.data, images.length[number])
    base = workspace.header.ctypes.data  # address of the header's first field
    image = (*jpeg, workspace.buffers.image.ctypes.data, width, pitch, height, 0, 0)
    if _read_header(functions.read_header, (*jpeg, base, base + 4, base + 8, base + 12)) != 0:
        _decompress(functions.decompress, image)  # fails and resets the decompressor
        return NOT_JPEG
    if workspace.header[0] != width or workspace.header[1] != height:
        return WRONG_SIZE
    if _decompress(functions.decompress, image) != 0:
        # A mere warning also counts, because the writer stores no image that causes one.
        return DAMAGED
    return DONE


@njit(nogil=True)
def _read_content(functions, images, number, workspace):
    """Read the bytes of one image. Return False if the file is too short."""
    length, offset = images.length[number], images.offset[number]
    descriptor = images.file_descriptors[images.file_index[number]]
    target = workspace.content.ctypes.data
    num_bytes = 0
    while num_bytes < length:  # one call reads at most 2 GiB, and may be interrupted
        num_new_bytes = _pread(
            functions.pread,
            (descriptor, target + num_bytes, length - num_bytes, offset + num_bytes),
        )
        if num_new_bytes <= 0:
            return False
        num_bytes += num_new_bytes
    return True


def _compile(source_digest: str):
    """Compile `make_views`, which numba caches on disk until this file changes.

    Args:
        source_digest: Digest of the modules that `make_views` calls. The function refers to it, so
            numba compiles the function again when one of them changes.
    """

    @njit(nogil=True, cache=True)
    def make_views(inputs, numbers, box_indices, first_row, seed, epoch, workspace, batch, status):
        """Write the views of images `numbers`, with the crop boxes of images `box_indices`."""
        assert source_digest
        functions, images, views = inputs
        for row in range(len(numbers)):
            number = numbers[row]
            status[row] = decode_image(functions, images, number, workspace)
            if status[row] == DONE:
                size = np.int64(images.height[number]), np.int64(images.width[number])
                key = seed, epoch, box_indices[row]
                write_views(views, size, key, first_row + row, workspace.buffers, batch)

    return make_views


make_views = _compile(digest_of_called_code())
