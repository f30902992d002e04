"""Write an unfinished .beton as two files: the images' bytes, and a journal of their entries.

Images are appended to `train.beton.writing` in the order of the source, each followed by its entry
in `train.beton.journal`. The next write verifies both files and continues after the last intact
image.
"""

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ssl_pretrain.data.beton.encoder import Entry
from ssl_pretrain.data.beton.tables import IMAGE_DTYPE

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

ENTRY_DTYPE = np.dtype(
    [("outcome", "u1"), *IMAGE_DTYPE.descr, ("length", "<u8"), ("label", "<i8"), ("crc", "<u4")]
)
_SYNC_BYTES = 64 << 20  # bytes between two fsyncs of both files
_NUM_VERIFIED = 1000  # newest entries whose data are verified, because a power cut may lose data


def unfinished_path(path: Path) -> Path:
    """Return the path of the images of an unfinished .beton."""
    return path.with_name(f"{path.name}.writing")


def journal_path(path: Path) -> Path:
    """Return the path of the journal of an unfinished .beton."""
    return path.with_name(f"{path.name}.journal")


class Journal:
    """The images written so far and their entries, opened by `open_journal`.

    Attributes:
        data_file: The file that contains the images.
        entries: One entry per image, including unreadable ones.
    """

    def __init__(
        self, data_file: BinaryIO, journal_file: BinaryIO, first_page_offset: int, page_size: int
    ):
        self.data_file, self._journal_file = data_file, journal_file
        self._first_page_offset, self._page_size = first_page_offset, page_size
        self.entries: list[Entry] = []

    @property
    def end_offset(self) -> int:
        """Offset of the first byte after the last image."""
        if not self.entries:
            return self._first_page_offset
        return self.entries[-1].offset + self.entries[-1].length

    def to_array(self) -> np.ndarray:
        """Return the entries as an array of `ENTRY_DTYPE`."""
        return np.array(self.entries, ENTRY_DTYPE)

    def append(self, entry: Entry, content: bytes) -> None:
        """Write an image, then its entry.

        Raises:
            ValueError: If the image is larger than a page.
        """
        if len(content) > self._page_size:
            raise ValueError(
                f"an image of {len(content):,} bytes does not fit into a page of "
                f"{self._page_size:,} bytes; give --max-side, or a larger --page-size"
            )
        offset = self.end_offset
        if offset % self._page_size + len(content) > self._page_size:
            offset += self._page_size - offset % self._page_size
        entry = entry._replace(offset=offset)
        if content:
            self.data_file.seek(offset)
            self.data_file.write(content)
            self.data_file.flush()  # before the entry, which promises that the bytes are written
        self._journal_file.write(np.array([entry], ENTRY_DTYPE).tobytes())
        self._journal_file.flush()
        self.entries.append(entry)
        if offset // _SYNC_BYTES != self.end_offset // _SYNC_BYTES:
            os.fsync(self.data_file.fileno())
            os.fsync(self._journal_file.fileno())

    def restore(self, write_id: str) -> None:
        """Load the intact entries of an interrupted write with this id, and discard the rest."""
        header = f"{write_id}\n".encode()
        content = self._journal_file.read()
        if content.startswith(header):
            # The division ignores a partial entry at the end.
            num_entries = (len(content) - len(header)) // ENTRY_DTYPE.itemsize
            rows = np.frombuffer(content, ENTRY_DTYPE, num_entries, offset=len(header)).tolist()
            self.entries = self._intact_entries([Entry(*row) for row in rows])
            self._journal_file.seek(len(header) + len(self.entries) * ENTRY_DTYPE.itemsize)
            self._journal_file.truncate()
            self.data_file.truncate(self.end_offset)
        else:  # a new journal, or one for another source or other settings
            self._journal_file.seek(0)
            self._journal_file.truncate()
            self._journal_file.write(header)
            self._journal_file.flush()
            self.data_file.truncate(0)

    def _intact_entries(self, entries: list[Entry]) -> list[Entry]:
        """Return the entries before the first one whose bytes are damaged."""
        for number in range(max(0, len(entries) - _NUM_VERIFIED), len(entries)):
            self.data_file.seek(entries[number].offset)
            if zlib.crc32(self.data_file.read(entries[number].length)) != entries[number].crc:
                return entries[:number]
        return entries


@contextmanager
def open_journal(
    path: Path, write_id: str, first_page_offset: int, page_size: int
) -> Iterator[Journal]:
    """Open the unfinished files of a .beton and lock them.

    Args:
        path: Path of the .beton.
        write_id: Hash of everything that determines the content of the .beton. A journal with
            another hash is discarded.
        first_page_offset: Offset of the first image.
        page_size: Bytes per page.

    Raises:
        ValueError: If another process is writing the same file.
    """
    with (
        _open_for_update(journal_path(path)) as journal_file,
        _open_for_update(unfinished_path(path)) as data_file,
    ):
        try:
            if fcntl is not None:
                fcntl.flock(journal_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"{path}: another process is writing this file; wait until it ends, or stop it"
            ) from None
        journal = Journal(data_file, journal_file, first_page_offset, page_size)
        journal.restore(write_id)
        yield journal


def _open_for_update(path: Path) -> BinaryIO:
    return path.open("r+b" if path.exists() else "w+b")
