"""An array inside a file: its type, its shape, and where its values begin."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np

from ssl_pretrain.data.formats.unpacking import copy_exactly, unpack_once

# A function that opens the values of an array as a stream.
OpenStream = Callable[[], AbstractContextManager[IO[bytes]]]


@dataclass(frozen=True)
class StoredArray:
    """An array in a file.

    Attributes:
        path: The file that contains the values.
        name: The file, or the file and the name of the array in it, for messages.
        shape: Shape of the array. The first axis counts the images.
        dtype: Type of the values, with their byte order.
        offset: Position of the first value in the file.
        is_fortran: True if the first axis varies fastest.
        open_stream: Function that opens compressed values. None if they are stored as they are.
    """

    path: str
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int = 0
    is_fortran: bool = False
    open_stream: OpenStream | None = None

    @property
    def num_bytes(self) -> int:
        """Number of bytes of the values."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def describe(self) -> str:
        """Return the name, type and shape, for messages."""
        return f"{self.name} {self.dtype.name} {self.shape}"

    def load(self) -> np.ndarray:
        """Return all values. Use it for labels, not for images.

        Raises:
            ValueError: If the file is truncated or damaged.
        """
        content = io.BytesIO()
        with self._open() as stream:
            copy_exactly(stream, content, self.num_bytes, self.name)
        values = np.frombuffer(content.getvalue(), self.dtype)
        return values.reshape(self.shape, order="F" if self.is_fortran else "C")

    def unpacked(self, cache_dir: Path) -> StoredArray:
        """Return an array whose images can be read one by one, which may be a copy in the cache.

        Raises:
            ValueError: If the file is truncated, or the cache cannot be written.
        """
        if self.open_stream is None and not self.is_fortran:
            size = os.path.getsize(self.path)
            if size < self.offset + self.num_bytes:
                raise ValueError(
                    f"data.root: {self.name} is truncated; the file has {size:,} bytes, and its "
                    f"header promises {self.offset + self.num_bytes:,}; copy it again"
                )
            return self
        path = unpack_once(Path(self.path), self.name, ".npy", cache_dir, self._write_npy)
        with path.open("rb") as file:
            copy = read_npy_header(file, str(path))
        return replace(copy, name=self.name)

    def _write_npy(self, file: IO[bytes]) -> None:
        """Write the array as .npy with the last axis varying fastest."""
        if self.is_fortran:
            np.lib.format.write_array(file, np.ascontiguousarray(self.load()), allow_pickle=False)
            return
        with self._open() as stream:
            write_npy_header(file, self.shape, self.dtype)
            copy_exactly(stream, file, self.num_bytes, self.name)

    def _open(self) -> AbstractContextManager[IO[bytes]]:
        return (self.open_stream or partial(_open_at, self.path, self.offset))()


@contextmanager
def _open_at(path: str, offset: int) -> Iterator[IO[bytes]]:
    with open(path, "rb") as file:
        file.seek(offset)
        yield file


def write_npy_header(file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Write the header of an .npy whose last axis varies fastest."""
    header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_2_0(file, header)


def read_npy_header(file: IO[bytes], path: str, name: str = "") -> StoredArray:
    """Read the header of an .npy, and leave the file at its first value.

    Args:
        file: The .npy, as a file or as a stream.
        path: Path of the file.
        name: Name of the array, for messages. By default the path.

    Raises:
        ValueError: If the file is not an .npy.
    """
    name = name or path
    try:
        version = np.lib.format.read_magic(file)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if read_header is None:
            raise ValueError(f"version {version} of the format is not supported")
        shape, is_fortran, dtype = read_header(file)
    except ValueError as error:
        raise ValueError(
            f"data.root: {name} is not an array of NumPy ({error}); write it with np.save"
        ) from None
    is_fortran = is_fortran and len(shape) > 1
    return StoredArray(path, name, shape, dtype, file.tell(), is_fortran)
