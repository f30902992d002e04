"""Read a file that another process appends to, without reading any byte twice."""

import os
from contextlib import suppress
from pathlib import Path


class AppendedLines:
    """Reader of the lines that were appended to a file since the last read.

    A file that was replaced or cut, as a resumed run does with its records, is read again.
    """

    def __init__(self, path: Path):
        self.path = path
        self._offset, self._file = 0, (-1, -1)  # bytes read; device and inode

    def read(self) -> tuple[list[bytes], bool]:
        """Return the complete new lines, and True if all earlier lines are void.

        A last line without a line break is left for the next read.
        """
        with suppress(OSError), self.path.open("rb") as file:
            status = os.fstat(file.fileno())
            identity = (status.st_dev, status.st_ino)
            is_new = identity != self._file or status.st_size < self._offset
            if is_new:
                self._offset, self._file = 0, identity
            if status.st_size == self._offset:
                return [], is_new
            file.seek(self._offset)
            data = file.read()
            end = data.rfind(b"\n") + 1
            self._offset += end
            return data[:end].split(b"\n")[:-1], is_new
        was_present = self._file != (-1, -1)
        self._offset, self._file = 0, (-1, -1)
        return [], was_present
