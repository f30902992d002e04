"""Read a stored image and make all its views, in compiled code and without Python's lock.

Each image is read and decoded once. FFCV brings libturbojpeg, which is called here directly, with
one decoder per thread. FFCV's own function, imdecode, does the same but keeps two decoders for
every thread that ever lived, and returns the same number for a harmless warning and a destroyed
image. Its fast DCT would also give other pixels than Pillow and torchvision, to save 4 % of the
time.
"""

import ctypes
import hashlib
import importlib.util
import inspect
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, Self

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ssl_pretrain import rng
from ssl_pretrain.data.beton.file import Samples
from ssl_pretrain.data.beton.tables import RAW
from ssl_pretrain.system.jit import njit
from ssl_pretrain.views import crops, resize
from ssl_pretrain.views.recipe import Crop

DONE, CUT, NO_JPEG, OTHER_SIZE, DAMAGED = range(5)  # status of an image after `decode`
REASONS = {
    NO_JPEG: "not a JPEG",
    OTHER_SIZE: "the JPEG has another size than its entry",
    DAMAGED: "the JPEG is damaged",
}
INSTALL = (
    "install it with `make ffcv`, or `pip install ffcv` where OpenCV and libturbojpeg are "
    "(docs/install.md)"
)


class Functions(NamedTuple):
    """Addresses of C functions in this process, which must not be part of cached code."""

    pread: int
    header: int
    decompress: int


class Stored(NamedTuple):
    """The places of all stored images: the open files, and arrays of `Samples`."""

    handles: np.ndarray
    file: np.ndarray
    place: np.ndarray
    length: np.ndarray
    mode: np.ndarray
    height: np.ndarray
    width: np.ndarray


class Views(NamedTuple):
    """The recipe of every view, for compiled code."""

    chances: np.ndarray  # float64 (views, 6), `crops.chances` of each
    sizes: np.ndarray  # int64 (views,)
    bicubic: np.ndarray  # bool (views,)
    antialias: np.ndarray  # bool (views,)
    begins: np.ndarray  # int64 (views,), first byte of each view in a batch


class Scratch(NamedTuple):
    """Buffers of one thread."""

    compressed: np.ndarray
    image: np.ndarray
    turned: np.ndarray
    header: np.ndarray  # int32: width, height, subsampling, color space
    room: tuple[np.ndarray, ...]


def library() -> ctypes.CDLL:
    """Load FFCV's library, through which its libturbojpeg is reached.

    Raises:
        ValueError: There is none. The message has the command that installs it.
    """
    # FFCV is located but not imported. That would take seconds, and needs OpenCV's Python package.
    spec = importlib.util.find_spec("ffcv")
    folders = (spec.submodule_search_locations or []) if spec else []
    paths = [path for folder in folders for path in sorted(Path(folder).glob("_libffcv*.so"))]
    if not paths:
        raise ValueError(
            f"data.loader: FFCV is not installed; {INSTALL}, or set data.loader=folder"
        )
    try:
        loaded = ctypes.CDLL(str(paths[0]))
        loaded.tjInitDecompress.restype = ctypes.c_void_p
        loaded.tjDestroy.argtypes = [ctypes.c_void_p]
    except (OSError, AttributeError) as error:
        raise ValueError(
            f"data.loader: FFCV does not load ({error}); {INSTALL} again, or set data.loader=folder"
        ) from None
    return loaded


def functions(loaded: ctypes.CDLL) -> Functions:
    """Return the addresses of the C functions that `decode` calls."""
    calls = (ctypes.CDLL(None).pread, loaded.tjDecompressHeader3, loaded.tjDecompress2)
    return Functions(*(ctypes.cast(call, ctypes.c_void_p).value or 0 for call in calls))


class Decoder:
    """libturbojpeg's decompressor, for one thread. Close it, or use it in a `with` statement.

    A header that cannot be read leaves it unable to read any other. A decompression, which fails
    then, repairs it.
    """

    def __init__(self) -> None:
        self._library = library()
        self.handle = self._library.tjInitDecompress()

    def agrees(self, content: bytes, width: int, height: int) -> bool:
        """Return True if the bytes are a JPEG of this size that decodes without even a warning."""
        size, pixels = (ctypes.c_int * 4)(), np.empty(width * height * 3, np.uint8)
        fields = [ctypes.byref(size, 4 * k) for k in range(4)]
        handle, length = ctypes.c_void_p(self.handle), ctypes.c_ulong(len(content))
        target = ctypes.c_void_p(pixels.ctypes.data)
        no_header = self._library.tjDecompressHeader3(handle, content, length, *fields)
        failed = self._library.tjDecompress2(
            handle, content, length, target, width, 0, height, 0, 0
        )
        return not no_header and not failed and (size[0], size[1]) == (width, height)

    def close(self) -> None:
        """Free the decompressor. Idempotent."""
        if self.handle:
            self._library.tjDestroy(self.handle)
        self.handle = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()


def pack_stored(samples: Samples, handles: Sequence[int]) -> Stored:
    """Describe the stored images to compiled code.

    Args:
        samples: The images.
        handles: Descriptors of the open files, in the order of `samples.paths`.
    """
    columns = (getattr(samples, name) for name in Stored._fields[1:])
    return Stored(np.array(handles, np.int32), *columns)


def pack_views(view_crops: list[Crop], batch_size: int) -> Views:
    """Describe the views of a batch to compiled code. In memory, all images' view 0 comes first."""
    sizes = np.array([crop.size for crop in view_crops], np.int64)
    num_bytes = batch_size * 3 * sizes**2
    return Views(
        chances=np.array([crops.chances(crop) for crop in view_crops]),
        sizes=sizes,
        bicubic=np.array([crop.interpolation == "bicubic" for crop in view_crops]),
        antialias=np.array([crop.antialias for crop in view_crops]),
        begins=np.cumsum(num_bytes) - num_bytes,
    )


def allocate_scratch(samples: Samples, view_crops: list[Crop]) -> Scratch:
    """Allocate buffers for the largest of these images."""
    heights, widths = samples.height.astype(np.int64), samples.width.astype(np.int64)
    # The tallest and the widest image may be different ones, so the product is taken per image.
    num_bytes = int((_whole_tiles(heights) * _whole_tiles(3 * widths)).max())
    longest_side = int(_whole_tiles(max(heights.max(), widths.max())))
    sizes = [crop.size for crop in view_crops] or [1]
    bicubic = any(crop.interpolation == "bicubic" for crop in view_crops)
    return Scratch(
        compressed=np.empty(int(samples.length.max()), np.uint8),
        image=np.zeros(num_bytes, np.uint8),
        turned=np.zeros(num_bytes, np.uint8),
        header=np.zeros(4, np.int32),
        room=resize.room_for(longest_side, sizes, bicubic),
    )


def _whole_tiles(counts: np.ndarray) -> np.ndarray:
    return -(-counts // resize.TILE) * resize.TILE


def _foreign(result: types.Type, *parameters: types.Type):
    """Return a jitted function (address, arguments) that calls a C function at an address.

    The address is known only at run time.
    """

    @intrinsic
    def call(_context, address, arguments):
        def codegen(context, builder, signature, values):
            words = cgutils.unpack_tuple(builder, values[1])
            kinds = [context.get_value_type(parameter) for parameter in parameters]
            casts = [
                context.cast(builder, word, kind, parameter)
                for word, kind, parameter in zip(words, signature.args[1], parameters)
            ]
            function_type = ir.FunctionType(context.get_value_type(result), kinds)
            function = builder.inttoptr(values[0], function_type.as_pointer())
            return context.cast(builder, builder.call(function, casts), result, types.intp)

        return types.intp(types.intp, arguments), codegen

    return call


_pread = _foreign(types.int64, types.int32, types.intp, types.uint64, types.int64)
_header = _foreign(types.int32, *[types.intp] * 2, types.uint64, *[types.intp] * 4)
_decompress = _foreign(types.int32, *[types.intp] * 2, types.uint64, types.intp, *[types.int32] * 5)


@njit(nogil=True, cache=True)
def decode(functions, stored, number, decoder, scratch):
    """Read one image into `scratch.image`, with rows padded to whole tiles. Return its status."""
    length = stored.length[number]
    height, width = np.int64(stored.height[number]), np.int64(stored.width[number])
    if not _read(functions, stored, number, scratch):
        return CUT
    pitch = resize.padded(3 * width)
    if stored.mode[number] == RAW:
        for row in range(height):
            source = scratch.compressed[row * 3 * width : (row + 1) * 3 * width]
            scratch.image[row * pitch : row * pitch + 3 * width] = source
        return DONE
    content, size = scratch.compressed.ctypes.data, scratch.header.ctypes.data
    header = (decoder, content, length, size, size + 4, size + 8, size + 12)
    image = (decoder, content, length, scratch.image.ctypes.data, width, pitch, height, 0, 0)
    if _header(functions.header, header) != 0:
        _decompress(functions.decompress, image)  # fails, and so repairs the decoder
        return NO_JPEG
    if scratch.header[0] != width or scratch.header[1] != height:
        return OTHER_SIZE
    if _decompress(functions.decompress, image) != 0:
        return DAMAGED  # even if it is only a warning: the writer stored no image with one
    return DONE


@njit(nogil=True)
def _read(functions, stored, number, scratch):
    """Read the bytes of one image into `scratch`. Return False if the file ends early."""
    length, place = stored.length[number], stored.place[number]
    handle, target = stored.handles[stored.file[number]], scratch.compressed.ctypes.data
    done = 0
    while done < length:  # one call reads at most 2 GiB, and may be interrupted
        count = _pread(functions.pread, (handle, target + done, length - done, place + done))
        if count <= 0:
            return False
        done += count
    return True


@njit(nogil=True)
def _write_views(stored, views, number, seed, epoch, index, row, scratch, batch):
    """Write the views of the decoded image, drawn as those of `index`, to a row of the batch."""
    height, width = np.int64(stored.height[number]), np.int64(stored.width[number])
    tall, wide = resize.padded(height), resize.padded(3 * width)
    resize.turn(scratch.image, wide, height, 3 * width, scratch.turned, tall)
    for view in range(len(views.sizes)):
        box = crops.box_at(views.chances[view], (seed, epoch, index, view), height, width)
        size, bicubic = views.sizes[view], views.bicubic[view]
        place = views.begins[view] + row * 3 * size * size
        out = batch[place : place + 3 * size * size]
        if views.antialias[view]:
            resize.write_view(scratch.turned, tall, box, size, bicubic, scratch.room, out)
        else:
            resize.write_plain_view(scratch.turned, tall, box, size, bicubic, out)


def _compile(sources: str):
    """Compile `make`, which numba keeps on disk for as long as this file is the same.

    Args:
        sources: Digest of the files that `make` calls. In its closure it makes numba compile again
            when one of them changes.
    """

    @njit(nogil=True, cache=True)
    def make(inputs, numbers, indices, first_row, seed, epoch, decoder, scratch, batch, status):
        """Write the views of images `numbers`, drawn as those of `indices`, from `first_row` on."""
        assert sources
        functions, stored, views = inputs
        for row in range(len(numbers)):
            number = numbers[row]
            status[row] = decode(functions, stored, number, decoder, scratch)
            if status[row] == DONE:
                place = first_row + row
                _write_views(
                    stored, views, number, seed, epoch, indices[row], place, scratch, batch
                )

    return make


def _digest_sources(*modules: ModuleType) -> str:
    sources = (Path(inspect.getfile(module)).read_bytes() for module in modules)
    return hashlib.sha256(b"".join(sources)).hexdigest()


make = _compile(_digest_sources(rng, crops, resize))
