"""Stored images -> all their views, in machine code and without Python's lock: each image is read once and decoded once.

FFCV brings libturbojpeg, and this calls it there with a decoder of its own for each thread. FFCV's own call, imdecode,
does the same but keeps two decoders for every thread that ever lived, and answers with one number for a harmless
warning and a destroyed image; its fast DCT would also part our pixels from Pillow's and torchvision's, to save 4 %.
"""

import ctypes
import hashlib
import importlib.util
import inspect
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

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

DONE, CUT, NO_JPEG, OTHER_SIZE, DAMAGED = range(5)  # what became of an image
REASONS = {
    NO_JPEG: "not a JPEG",
    OTHER_SIZE: "the JPEG has another size than its entry",
    DAMAGED: "the JPEG is damaged",
}
_INSTALL = "install it with `make ffcv`, or `pip install ffcv` where OpenCV and libturbojpeg are (docs/install.md)"


class Functions(NamedTuple):
    """Addresses in this process: compiled code that is kept on disk must not hold any."""

    pread: int
    header: int
    decompress: int


class Stored(NamedTuple):
    """Where every image lies; arrays of `Samples`. handles: of the open files."""

    handles: np.ndarray
    file: np.ndarray
    place: np.ndarray
    length: np.ndarray
    mode: np.ndarray
    height: np.ndarray
    width: np.ndarray


class Views(NamedTuple):
    """The recipe of every view, for compiled code. chances: `crops.chances` of each. begins: where its bytes begin in a batch."""

    chances: np.ndarray  # float64 (views, 6)
    sizes: np.ndarray  # int64 (views,)
    bicubic: np.ndarray  # bool (views,)
    antialias: np.ndarray  # bool (views,)
    begins: np.ndarray  # int64 (views,)


class Scratch(NamedTuple):
    """The memory of one thread."""

    compressed: np.ndarray
    image: np.ndarray
    turned: np.ndarray
    header: np.ndarray  # int32: width, height, subsampling, colour space
    room: tuple[np.ndarray, ...]


def library() -> ctypes.CDLL:
    """FFCV's, through which its libturbojpeg is reached. Raises ValueError with the install line where there is none."""
    spec = importlib.util.find_spec(
        "ffcv"
    )  # found and not imported: that takes seconds, and OpenCV's Python half
    folders = (spec.submodule_search_locations or []) if spec else []
    found = [path for folder in folders for path in sorted(Path(folder).glob("_libffcv*.so"))]
    if not found:
        raise ValueError(
            f"data.loader: FFCV is not installed; {_INSTALL}, or set data.loader=folder"
        )
    try:
        loaded = ctypes.CDLL(str(found[0]))
        loaded.tjInitDecompress.restype = ctypes.c_void_p
        loaded.tjDestroy.argtypes = [ctypes.c_void_p]
    except (OSError, AttributeError) as error:
        raise ValueError(
            f"data.loader: FFCV does not load ({error}); {_INSTALL} again, or set data.loader=folder"
        ) from None
    return loaded


def functions(loaded: ctypes.CDLL) -> Functions:
    calls = (ctypes.CDLL(None).pread, loaded.tjDecompressHeader3, loaded.tjDecompress2)
    return Functions(*(ctypes.cast(call, ctypes.c_void_p).value or 0 for call in calls))


class Decoder:
    """libturbojpeg's decompressor, for one thread. Close it.

    A header that cannot be read leaves it unable to read any other; a decompression, which fails then, mends it.
    """

    def __init__(self) -> None:
        self._library = library()
        self.handle = self._library.tjInitDecompress()

    def agrees(self, content: bytes, width: int, height: int) -> bool:
        """Whether these bytes are a JPEG of this size that decodes without even a warning."""
        size, pixels = (ctypes.c_int * 4)(), np.empty(width * height * 3, np.uint8)
        at = [ctypes.byref(size, 4 * k) for k in range(4)]
        handle, length = ctypes.c_void_p(self.handle), ctypes.c_ulong(len(content))
        unknown = self._library.tjDecompressHeader3(handle, content, length, *at)
        failed = self._library.tjDecompress2(
            handle, content, length, ctypes.c_void_p(pixels.ctypes.data), width, 0, height, 0, 0
        )
        return not unknown and not failed and (size[0], size[1]) == (width, height)

    def close(self) -> None:
        if self.handle:
            self._library.tjDestroy(self.handle)
        self.handle = None


def views_of(each: list[Crop], batch: int) -> Views:
    """The views of `batch` images, one kind after the other in memory: all images' view 0, then view 1, ..."""
    sizes = np.array([crop.size for crop in each], np.int64)
    ends = np.cumsum(batch * 3 * sizes**2)
    chances = np.array([crops.chances(crop) for crop in each])
    bicubic, antialias = (
        np.array([crop.interpolation == "bicubic" for crop in each]),
        np.array([crop.antialias for crop in each]),
    )
    return Views(chances, sizes, bicubic, antialias, ends - batch * 3 * sizes**2)


def scratch_for(samples: Samples, each: list[Crop]) -> Scratch:
    """Memory for the largest of these images."""
    tall = -(-samples.height.astype(np.int64) // resize.TILE) * resize.TILE
    turned_rows = -(-3 * samples.width.astype(np.int64) // resize.TILE) * resize.TILE
    most = int((tall * turned_rows).max())  # of one image: the tallest and the widest may be two
    longest = (
        -(-max(int(samples.height.max()), int(samples.width.max())) // resize.TILE) * resize.TILE
    )
    room = resize.room_for(
        longest,
        [crop.size for crop in each] or [1],
        any(crop.interpolation == "bicubic" for crop in each),
    )
    compressed = np.empty(int(samples.length.max()), np.uint8)
    return Scratch(
        compressed, np.zeros(most, np.uint8), np.zeros(most, np.uint8), np.zeros(4, np.int32), room
    )


def _foreign(result: types.Type, *parameters: types.Type):
    """A jitted function (address, (arguments)) that calls the C function at an address known only when it runs."""

    @intrinsic
    def call(_context, address, arguments):
        def codegen(context, builder, signature, values):
            words = cgutils.unpack_tuple(builder, values[1])
            kinds = [context.get_value_type(parameter) for parameter in parameters]
            given = [
                context.cast(builder, word, kind, to)
                for word, kind, to in zip(words, signature.args[1], parameters)
            ]
            function_type = ir.FunctionType(context.get_value_type(result), kinds)
            answer = builder.call(builder.inttoptr(values[0], function_type.as_pointer()), given)
            return context.cast(builder, answer, result, types.intp)

        return types.intp(types.intp, arguments), codegen

    return call


_pread = _foreign(types.int64, types.int32, types.intp, types.uint64, types.int64)
_header = _foreign(
    types.int32,
    types.intp,
    types.intp,
    types.uint64,
    types.intp,
    types.intp,
    types.intp,
    types.intp,
)
_decompress = _foreign(
    types.int32,
    types.intp,
    types.intp,
    types.uint64,
    types.intp,
    types.int32,
    types.int32,
    types.int32,
    types.int32,
    types.int32,
)


def _sources_of(*modules: ModuleType) -> str:
    return hashlib.sha256(
        b"".join(Path(inspect.getfile(module)).read_bytes() for module in modules)
    ).hexdigest()


@njit(nogil=True, cache=True)
def decode(functions, stored, number, decoder, scratch):
    """Reads one image into `scratch.image`, RGB, its rows padded to whole tiles; returns what became of it."""
    length, height, width = (
        stored.length[number],
        np.int64(stored.height[number]),
        np.int64(stored.width[number]),
    )
    handle, bytes_at, image_at = (
        stored.handles[stored.file[number]],
        scratch.compressed.ctypes.data,
        scratch.image.ctypes.data,
    )
    done = 0
    while done < length:  # one read gives at most 2 GiB, and may be interrupted
        got = _pread(
            functions.pread, (handle, bytes_at + done, length - done, stored.place[number] + done)
        )
        if got <= 0:
            return CUT
        done += got
    pitch = resize.padded(3 * width)
    if stored.mode[number] == RAW:
        for row in range(height):
            scratch.image[row * pitch : row * pitch + 3 * width] = scratch.compressed[
                row * 3 * width : (row + 1) * 3 * width
            ]
        return DONE
    size, size_at = scratch.header, scratch.header.ctypes.data
    if (
        _header(
            functions.header,
            (decoder, bytes_at, length, size_at, size_at + 4, size_at + 8, size_at + 12),
        )
        != 0
    ):
        _decompress(
            functions.decompress, (decoder, bytes_at, length, image_at, width, pitch, height, 0, 0)
        )  # fails, and so recovers
        return NO_JPEG
    if size[0] != width or size[1] != height:
        return OTHER_SIZE
    if (
        _decompress(
            functions.decompress, (decoder, bytes_at, length, image_at, width, pitch, height, 0, 0)
        )
        != 0
    ):
        return DAMAGED  # by a warning too: what was written here gave none
    return DONE


def _compiled(sources: str):
    """numba keeps `make` on disk for as long as this file is the same; `sources`, in its closure, adds the files it calls."""

    @njit(nogil=True, cache=True)
    def make(
        functions,
        stored,
        views,
        numbers,
        indices,
        first_row,
        seed,
        epoch,
        decoder,
        scratch,
        batch,
        status,
    ):
        """Writes the views of images `numbers`, drawn as those of `indices`, to the rows of `batch` from `first_row` on."""
        assert sources
        for row in range(len(numbers)):
            number = numbers[row]
            status[row] = decode(functions, stored, number, decoder, scratch)
            if status[row] != DONE:
                continue
            height, width = np.int64(stored.height[number]), np.int64(stored.width[number])
            tall = resize.padded(height)
            resize.turn(
                scratch.image, resize.padded(3 * width), height, 3 * width, scratch.turned, tall
            )
            for view in range(len(views.sizes)):
                low, high, low_ratio, high_ratio, flip, sampler = views.chances[view]
                box = crops.box_at(
                    low,
                    high,
                    low_ratio,
                    high_ratio,
                    flip,
                    sampler,
                    seed,
                    epoch,
                    indices[row],
                    view,
                    height,
                    width,
                )
                top, left, box_height, box_width, flipped = box
                size = views.sizes[view]
                place = views.begins[view] + (first_row + row) * 3 * size * size
                out = batch[place : place + 3 * size * size]
                bicubic = views.bicubic[view]
                if views.antialias[view]:
                    resize.write_view(
                        scratch.turned,
                        tall,
                        top,
                        left,
                        box_height,
                        box_width,
                        flipped,
                        size,
                        bicubic,
                        scratch.room,
                        out,
                    )
                else:
                    resize.write_plain_view(
                        scratch.turned,
                        tall,
                        top,
                        left,
                        box_height,
                        box_width,
                        flipped,
                        size,
                        bicubic,
                        out,
                    )

    return make


make = _compiled(_sources_of(rng, crops, resize))
