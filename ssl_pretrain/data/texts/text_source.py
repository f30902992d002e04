"""A source of texts in files, which are located once and read by their offsets."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from ssl_pretrain.data.image_source import Source
from ssl_pretrain.data.texts.text_formats import (
    DamagedRecord,
    Record,
    TextFormat,
    TextLines,
    parse_one,
)
from ssl_pretrain.system.platform_support import BINARY, read_at

# Position of a record. Millions of them take 17 bytes each.
_POSITION = np.dtype([("file", "u1"), ("line", "u4"), ("start", "i8"), ("num_bytes", "u4")])


class TextSource(Source):
    """Texts of one split in a fixed order, without images."""

    has_images = False

    def __init__(self, full_path: str, labels: np.ndarray, classes: list[str], num_texts: int):
        super().__init__(full_path, labels, classes)
        self.num_texts = num_texts

    def read(self, index: int) -> np.ndarray:
        """Raise NotImplementedError, because the items are texts."""
        raise NotImplementedError(f"{self.full_path} contains texts and no images")


class TextFile(NamedTuple):
    """A file, and the format in which its records are written."""

    path: Path
    text_format: TextFormat
    has_header: bool = False


class TextsInFiles(TextSource):
    """Texts in files that are not loaded into memory.

    Args:
        full_path: Path of the file or folder, for messages.
        files: The files, whose formats have the same number of texts.
        classes: Names of the classes. If None, they are the labels in alphabetical order, and
            numbers by their value.

    Raises:
        ValueError: If a record is damaged, or no record has all texts.
    """

    def __init__(self, full_path: str, files: Sequence[TextFile], classes: list[str] | None = None):
        scans = [_scan(file, number) for number, file in enumerate(files)]
        names = [label for scan in scans for label in scan.labels]
        labels, classes = index_text_labels(names, classes)
        super().__init__(full_path, labels, classes, files[0].text_format.num_texts)
        self.notes = [note for scan in scans if (note := scan.note)]
        self._files = tuple(files)
        self._positions = np.concatenate([scan.positions for scan in scans])
        self._stamps = [_stamp(file.path) for file in files]
        formats = repr([file.text_format for file in files]).encode()  # contains the columns
        self._digest = hashlib.sha256(formats + b"".join(scan.digest for scan in scans)).digest()
        self._descriptors: dict[int, int] = {}
        if not len(self):
            raise ValueError(
                f"data.root: {full_path} has no record in which every text is present; check the "
                "file and data.text_columns"
            )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_descriptors": {}}  # descriptors are only valid in their process

    def texts(self, index: int) -> list[list[str]]:
        """Return the alternatives of each text of an item.

        Raises:
            ValueError: If the file has changed since it was opened.
        """
        position = self._positions[index]
        number = int(position["file"])
        descriptor = self._descriptors.get(number)
        if descriptor is None:
            descriptor = self._descriptors[number] = self._open(number)
        content = read_at(descriptor, int(position["num_bytes"]), int(position["start"]))
        return parse_one(self._files[number].text_format, content)

    def name(self, index: int) -> str:
        """Return the path of the file and the number of the item's first line."""
        position = self._positions[index]
        return f"{self._files[position['file']].path}:{position['line']}"

    def take(self, indices: np.ndarray) -> Self:
        """Return a source of the items at `indices`, in that order."""
        subset = super().take(indices)
        subset._positions = self._positions[indices]
        subset._descriptors = {}
        return subset

    def check_present(self) -> None:
        """Raise FileNotFoundError if a file no longer exists."""
        for file in self._files:
            if not file.path.exists():
                raise FileNotFoundError(
                    f"data.root: {file.path} no longer exists, but existed when the run began"
                )

    def _open(self, number: int) -> int:
        path = self._files[number].path
        if _stamp(path) != self._stamps[number]:
            raise ValueError(
                f"data.root: {path} has changed since it was opened; start the run again"
            )
        return os.open(path, os.O_RDONLY | BINARY)

    def _identity(self) -> bytes:
        return self._digest + self._positions.tobytes()


class _Scan(NamedTuple):
    positions: np.ndarray
    labels: list[str]
    digest: bytes
    note: str


def _scan(file: TextFile, file_number: int) -> _Scan:
    """Locate the records of a file in which every text is present."""
    positions, labels, incomplete_lines = [], [], []
    with open(file.path, "rb") as stream:
        lines = TextLines(str(file.path), stream)
        for record, line, start in _located_records(file, lines):
            if record.is_complete:
                positions.append((file_number, line, start, lines.offset - start))
                labels.append(record.label)
            else:
                incomplete_lines.append(line)
    note = ""
    if incomplete_lines:
        total = len(positions) + len(incomplete_lines)
        note = (
            f"{len(incomplete_lines):,} of {total:,} records in {file.path} are skipped, because a "
            f"text is empty (first: line {incomplete_lines[0]})"
        )
    return _Scan(np.array(positions, _POSITION), labels, lines.digest.digest(), note)


def _located_records(file: TextFile, lines: TextLines) -> Iterator[tuple[Record, int, int]]:
    """Yield each record with its first line and its offset."""
    records = file.text_format.records(lines)
    is_header = file.has_header
    while True:
        start, line = lines.offset, lines.number + 1
        try:
            record = next(records)
        except StopIteration:
            return
        except DamagedRecord as error:
            raise ValueError(f"data.root: {file.path}:{line} {error}") from None
        if record is not None and not is_header:
            yield record, line, start
        is_header = is_header and record is None


def _stamp(path: Path) -> tuple[int, int]:
    """Return the size and the time of the last change of a file."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def index_text_labels(
    names: Sequence[str], classes: list[str] | None
) -> tuple[np.ndarray, list[str]]:
    """Return the index of each label, -1 for "", and the names of the classes."""
    if classes is None:
        distinct_names = set(names) - {""}
        are_numbers = all(name.isdecimal() for name in distinct_names)
        classes = sorted(distinct_names, key=int if are_numbers else None)
    indices = {name: index for index, name in enumerate(classes)}
    return np.array([indices.get(name, -1) for name in names], np.int64), classes
