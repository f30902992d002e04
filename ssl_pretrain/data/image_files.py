"""A source of image files in a folder, or in a zip that is read in place."""

import errno
import os
import stat
import zlib
from typing import Any, Self

import numpy as np

from ssl_pretrain.data.image_source import EncodedSource
from ssl_pretrain.data.images import MAX_BYTES, decode
from ssl_pretrain.data.listing import Listing, Span
from ssl_pretrain.data.pixels import Range
from ssl_pretrain.data.zip_archive import read_span

_READ_FLAGS = (
    os.O_RDONLY
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_NONBLOCK", 0)  # opening a pipe must not wait for its writer
    | getattr(os, "O_BINARY", 0)
)


class ImageFiles(EncodedSource):
    """Image files of a folder or a zip, read one by one."""

    def __init__(
        self,
        where: str,
        files: Listing,
        labels: np.ndarray,
        classes: list[str],
        value_range: Range | None = None,
    ):
        super().__init__(where, labels, classes)
        self.files = files
        self.value_range = value_range  # `data.range`
        self._archive: int | None = None  # file descriptor of the zip

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_archive": None}  # an open file belongs to its process

    def read(self, index: int) -> np.ndarray:
        """Read and decode one file as RGB pixels, uint8 (height, width, 3).

        Raises:
            UnreadableImage: If the file cannot be read or decoded. The message has its path.
        """
        return decode(self.read_bytes(index), self.name(index), self.value_range)

    def name(self, index: int) -> str:
        """Return the path of one file, continued inside the zip if there is one, for messages."""
        return os.path.join(self.files.root, self.files.within, self.files.path(index))

    def take(self, indices: np.ndarray) -> Self:
        """Return a source of the files at `indices`, in that order."""
        subset = super().take(indices)
        subset.files = self.files.take(indices)
        return subset

    def check_present(self) -> None:
        """Raise FileNotFoundError if the folder or zip no longer exists."""
        if not os.path.exists(self.files.root):
            raise FileNotFoundError(
                f"data.root: {self.files.root} no longer exists, but existed when the run began"
            )

    def _stored_bytes(self, index: int) -> bytes:
        if not len(self.files.spans):
            return _read_regular_file(os.path.join(self.files.root, self.files.path(index)))
        if self._archive is None:
            self._archive = os.open(self.files.root, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        try:
            return read_span(self._archive, Span(*self.files.spans[index].tolist()))
        except zlib.error as error:
            raise OSError(str(error)) from error

    def _identity(self) -> bytes:
        return self.files.packed.tobytes() + self.files.ends.tobytes()


def _read_regular_file(path: str) -> bytes:
    """Return the bytes of a file. Raise OSError for a pipe or device, which may have no end."""
    with open(path, "rb", opener=lambda name, _flags: os.open(name, _READ_FLAGS)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        if status.st_size > MAX_BYTES:
            raise OSError(errno.EFBIG, f"{status.st_size:,} bytes are more than an image has")
        return file.read()
