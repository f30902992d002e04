"""Split files of texts into records: lines, rows of a table, or JSON objects.

A record is parsed twice: while the file is scanned, and whenever its texts are read.
"""

import csv
import hashlib
import io
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple, Protocol

from ssl_pretrain.data.config import MAX_TEXTS, DataConfig
from ssl_pretrain.data.texts.text_columns import (
    TextColumns,
    choose_columns,
    has_usual_title,
    split_alternatives,
)

SUFFIXES: tuple[str, ...] = (".txt", ".csv", ".tsv", ".jsonl")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_MAX_CELL_BYTES = 2**24


class DamagedRecord(ValueError):
    """A record that cannot be parsed. The message continues the name of its file and line."""


class Record(NamedTuple):
    """The alternatives of each text of an item, and its label or ""."""

    texts: list[list[str]]
    label: str = ""

    @property
    def is_complete(self) -> bool:
        """True if every text has an alternative."""
        return all(self.texts)


class TextFormat(Protocol):
    """The format of a file of texts."""

    @property
    def num_texts(self) -> int:
        """Number of texts per item."""

    def records(self, lines: Iterable[str]) -> Iterator[Record | None]:
        """Yield the records of lines as soon as they are complete, and None for other content.

        Raises:
            DamagedRecord: If a record cannot be parsed.
        """


class TextLines(Iterator[str]):
    """The lines of a file, with their position and a digest of what was read.

    Attributes:
        path: Path of the file, for messages.
        number: Number of the latest line, from 1.
        offset: Offset of the line after it, in bytes.
        digest: SHA-256 of the bytes up to the offset.
    """

    def __init__(self, path: str, file: IO[bytes]):
        self.path, self._file = path, file
        self.number = self.offset = 0
        self.digest = hashlib.sha256()

    def __next__(self) -> str:
        content = self._file.readline()
        if not content:
            raise StopIteration
        self.number += 1
        self.offset += len(content)
        self.digest.update(content)
        if self.number == 1:
            content = content.removeprefix(_BYTE_ORDER_MARK)
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"data.root: {self.path}:{self.number} is not UTF-8 (byte "
                f"0x{content[error.start]:02x} at position {error.start + 1} of the line); convert "
                f"the file, for example with `iconv -f WINDOWS-1252 -t UTF-8 {self.path}`"
            ) from None


@dataclass(frozen=True)
class SentenceFormat:
    """One sentence per line."""

    num_texts = 1

    def records(self, lines: Iterable[str]) -> Iterator[Record | None]:
        """Yield the sentence of each line."""
        for line in lines:
            yield Record([split_alternatives(line)])


@dataclass(frozen=True)
class TableFormat:
    """Rows of cells. In a .tsv, quotation marks have no meaning, as in GLUE's files."""

    delimiter: str
    columns: TextColumns
    num_columns: int

    @property
    def num_texts(self) -> int:
        """Number of texts per item."""
        return len(self.columns.texts)

    def records(self, lines: Iterable[str]) -> Iterator[Record | None]:
        """Yield the texts of each row, and None for an empty line."""
        for row in read_rows(lines, self.delimiter):
            if row and len(row) != self.num_columns:
                raise DamagedRecord(
                    f"has {len(row)} cells, and the first row {self.num_columns}; put a cell that "
                    "contains the delimiter in quotation marks, or give a .jsonl"
                )
            yield self._record(row) if row else None

    def _record(self, row: list[str]) -> Record:
        texts = [split_alternatives(row[column]) for column in self.columns.texts]
        label = self.columns.label
        return Record(texts, "" if label is None else row[label].strip())


@dataclass(frozen=True)
class JsonFormat:
    """One JSON object per line, whose values are texts, passages or lists of them."""

    keys: list[str]
    label_key: str | None

    @property
    def num_texts(self) -> int:
        """Number of texts per item."""
        return len(self.keys)

    def records(self, lines: Iterable[str]) -> Iterator[Record | None]:
        """Yield the texts of each object, and None for an empty line."""
        for line in lines:
            yield self._record(_parse_object(line)) if line.strip() else None

    def _record(self, entries: dict[str, object]) -> Record:
        texts = []
        for key in self.keys:
            try:
                texts.append(split_alternatives(entries.get(key)))
            except TypeError as error:
                raise DamagedRecord(
                    f"has no text in {key!r}: {error}; give a text, a list of texts, or passages "
                    "with the key 'text'"
                ) from None
        label = entries.get(self.label_key) if self.label_key is not None else None
        return Record(texts, "" if label is None else str(label))


def read_rows(lines: Iterable[str], delimiter: str) -> Iterator[list[str]]:
    """Yield the cells of each row, which may extend over several lines of a .csv.

    Raises:
        DamagedRecord: If a quotation mark is not closed, or a cell is too long.
    """
    csv.field_size_limit(_MAX_CELL_BYTES)
    try:
        yield from csv.reader(
            lines,
            delimiter=delimiter,
            quoting=csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL,
            strict=True,
        )
    except csv.Error as error:
        raise DamagedRecord(
            f"is not a row of a table ({error}); close its quotation marks, and double those inside"
        ) from None


def find_text_format(path: Path, config: DataConfig) -> tuple[TextFormat, bool, str]:
    """Recognize the format of a file by its suffix and its first record.

    Returns:
        The format, True if the file begins with a header, and a note on the columns.

    Raises:
        ValueError: If the columns are ambiguous, or the first record is damaged.
    """
    suffix = path.suffix.lower()
    if suffix == ".txt":
        _refuse_columns(path, config)
        return SentenceFormat(), False, ""
    with open(path, "rb") as file:
        lines = TextLines(str(path), file)
        try:
            if suffix == ".jsonl":
                return _find_json_format(lines, config)
            return _find_table_format(lines, config, suffix)
        except DamagedRecord as error:
            raise ValueError(f"data.root: {path}:{lines.number} {error}") from None


def _refuse_columns(path: Path, config: DataConfig) -> None:
    for key in ("text_columns", "label_column"):
        value = getattr(config, key)
        if value and value != "none":
            raise ValueError(
                f"data.{key}: {path} has one sentence per line and no columns; leave it out"
            )


def _find_table_format(
    lines: TextLines, config: DataConfig, suffix: str
) -> tuple[TextFormat, bool, str]:
    first_line = next((line for line in lines if line.strip()), "")
    delimiter = "\t" if suffix == ".tsv" else _guess_delimiter(first_line)
    row = next(read_rows(itertools.chain([first_line], lines), delimiter), [])
    has_header = bool(config.text_columns) or _looks_like_header(row)
    if has_header:
        titles = [title.strip() for title in row]
        columns = choose_columns(titles, config, lines.path)
        names = ", ".join(titles[column] for column in columns.texts)
        note = f"the texts of {lines.path} are in the columns {names}"
    elif 1 <= len(row) <= MAX_TEXTS:
        columns = TextColumns(list(range(len(row))), None)
        note = f"{lines.path} has no titles; its {len(row)} columns are texts in this order"
    else:
        raise ValueError(
            f"data.text_columns: {lines.path} has {len(row)} columns without titles; add a first "
            "line with their titles, and name those of the texts, as in "
            "data.text_columns=[sent0,sent1]"
        )
    return TableFormat(delimiter, columns, len(row)), has_header, note


def _guess_delimiter(line: str) -> str:
    return next((mark for mark in ",;\t" if mark in line), ",")


def _looks_like_header(row: list[str]) -> bool:
    """Return True if every cell is empty or a single word, or one has a usual title."""
    cells = [cell.strip() for cell in row]
    is_identifier = all(not cell or cell.replace("-", "_").isidentifier() for cell in cells)
    return (is_identifier and any(cells)) or has_usual_title(cells)


def _find_json_format(lines: TextLines, config: DataConfig) -> tuple[TextFormat, bool, str]:
    first_line = next((line for line in lines if line.strip()), "{}")
    keys = list(_parse_object(first_line))
    columns = choose_columns(keys, config, lines.path)
    names = [keys[column] for column in columns.texts]
    label_key = None if columns.label is None else keys[columns.label]
    note = f"the texts of {lines.path} are in the keys {', '.join(names)}"
    return JsonFormat(names, label_key), False, note


def _parse_object(line: str) -> dict[str, object]:
    try:
        entries = json.loads(line)
    except json.JSONDecodeError as error:
        raise DamagedRecord(f"is not JSON ({error}); write one object per line") from None
    if not isinstance(entries, dict):
        raise DamagedRecord(
            f"is {line.strip()[:40]!r}, not a JSON object; write one object per line"
        )
    return entries


def parse_one(text_format: TextFormat, content: bytes) -> list[list[str]]:
    """Return the texts of a single record."""
    text = content.removeprefix(_BYTE_ORDER_MARK).decode()
    record = next(text_format.records(io.StringIO(text, newline="\n")), None)
    assert record is not None, "only records are located"
    return record.texts
