"""Parse tables that name images: encoding, delimiter, and columns of paths, labels and captions.

The encoding, the delimiter and the path column are chosen so that the listed files exist.
"""

import codecs
import csv
import io
import itertools
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

from ssl_pretrain.data.caption_texts import CAPTION_COLUMNS, NO_CAPTIONS, clean_captions
from ssl_pretrain.data.file_types import is_image
from ssl_pretrain.data.split_search import split_of

NUM_SAMPLE_ROWS = 20  # rows whose paths are looked up
_MAX_COLUMNS = 50
_DELIMITERS = (",", ";", "\t", "|", " ", "")
_HEAD_CHARACTERS = 1 << 16  # length of the sample that the format is detected from
# Titles in lowercase, reduced to letters and digits.
_NAME_TITLES = ("class", "classname", "labelname", "category", "target", "species")
_LABEL_TITLES = ("label", "labels", *_NAME_TITLES, "classid", "labelid", "y")
_INDEX_TITLES = ("", "index", "unnamed0", "rownames", "rowid")
_SPLIT_TITLES = ("split", "splits", "subset", "partition", "phase", "fold", "set", "usage")
# pandas, polars and R write a missing label as nan, NaN, NA or <NA>.
_MISSING_LABELS = frozenset({"", "-1", "-1.0", "nan", "NaN", "NA", "<NA>"})


@dataclass(frozen=True)
class TableFormat:
    """The format of a table."""

    delimiter: str  # " " splits a line at its last white space, "" does not split it
    path_column: int
    has_header: bool
    match_share: float  # share of the sampled rows whose path exists


def decode_text(content: bytes, name: str) -> list[str]:
    """Decode the content of a file in each plausible encoding.

    Raises:
        ValueError: If it is not text. The message begins with `name`.
    """
    try:
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return [content.decode("utf-16")]
        if b"\0" in content:
            raise ValueError("it contains NUL bytes")
        try:
            return [content.decode("utf-8-sig")]
        except UnicodeDecodeError:  # file names that are not UTF-8, or a spreadsheet
            return [content.decode("utf-8", "surrogateescape"), content.decode("cp1252", "replace")]
    except ValueError as error:
        raise ValueError(f"{name} is not a list of paths: {error}") from None


def read_rows(text: str, delimiter: str, max_rows: int | None = None) -> list[list[str]]:
    """Split a text into rows of cells. Empty rows and comments at the top are skipped."""
    # Some spreadsheets begin with a line such as "sep=;".
    text = re.sub(r"\A(sep=.\r?\n)?(#[ \t].*\r?\n)*", "", text)
    rows: Iterable[list[str]]
    if delimiter in ("", " "):
        lines = (line.strip() for line in io.StringIO(text))
        rows = (line.rsplit(None, 1) if delimiter else [line] for line in lines)
    else:
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    not_empty = (row for row in rows if any(cell.strip() for cell in row))
    return list(itertools.islice(not_empty, max_rows))


def first_lines(text: str) -> str:
    """Return the first whole lines of a text."""
    if len(text) <= _HEAD_CHARACTERS:
        return text
    return text[: text.rfind("\n", 0, _HEAD_CHARACTERS) + 1] or text


def detect_format(text: str, find_image: Callable[[str], object]) -> TableFormat:
    """Return the format in which the largest share of a sample of rows names an existing image.

    Args:
        text: The table.
        find_image: Function that returns a truthy value if a cell names an existing image.
    """
    best = TableFormat("", 0, has_header=False, match_share=-1.0)
    for delimiter in _DELIMITERS:
        try:
            rows = read_rows(first_lines(text), delimiter, 10 * NUM_SAMPLE_ROWS)
        except csv.Error:
            continue
        body = rows[1:] or rows
        body = body[:: max(1, len(body) // NUM_SAMPLE_ROWS)]
        for column in range(min(_MAX_COLUMNS, max(map(len, body), default=0))):
            first, *cells = (_cell(row, column) for row in (rows[0], *body))
            first_exists = bool(first and find_image(first))
            num_matches = sum(bool(cell and find_image(cell)) for cell in cells) + first_exists
            match_share = num_matches / (len(body) + first_exists)
            if match_share > best.match_share:
                has_header = len(rows) > 1 and not first_exists and not is_image(first)
                best = TableFormat(delimiter, column, has_header, match_share)
        if best.match_share == 1:
            break
    return best


@dataclass(frozen=True)
class Table:
    """The rows of a table that name an image."""

    titles: list[str]  # the cells of the header; empty without a header
    rows: list[list[str]]
    path_column: int
    caption_title: str = NO_CAPTIONS  # title of the captions, "" for a usual one, or "none"

    @classmethod
    def parse(cls, text: str, table_format: TableFormat, caption_title: str = NO_CAPTIONS) -> Self:
        """Parse a table whose format is known."""
        rows = read_rows(text, table_format.delimiter)
        titles = rows.pop(0) if table_format.has_header else []
        column = table_format.path_column
        return cls(titles, [row for row in rows if _cell(row, column)], column, caption_title)

    def cells(self, column: int) -> list[str]:
        """Return the cells of a column. A row that is too short gives ""."""
        return [_cell(row, column) for row in self.rows]

    def select_split(self, split: str) -> tuple[Self, str]:
        """Return the rows of one split and a note, or all rows and "" without a split column.

        Test images are used for validation if no row belongs to a validation split.
        """
        column = self._split_column
        if column is None:
            return self, ""
        splits = [split_of(cell) for cell in self.cells(column)]
        if split == "val" and "val" not in splits:
            split = "test"
        rows = [row for row, row_split in zip(self.rows, splits) if row_split == split]
        title = _cell(self.titles, column) or str(column + 1)
        return replace(self, rows=rows), (
            f"{len(rows):,} of {len(self.rows):,} rows are in the {split} split by column {title!r}"
        )

    def labels(self) -> tuple[list[str], list[str]]:
        """Return the label of each row, "" for none, and notes on how the column was chosen."""
        column, notes = self._label_column()
        if column is None:
            return [""] * len(self.rows), notes
        return _normalize_labels(self.cells(column)), notes

    def captions(self) -> list[list[str]] | None:
        """Return the caption of each row as a list, empty for none, or None without a column."""
        column = self._caption_column
        if column is None:
            return None
        return [clean_captions(_legible(cell)) for cell in self.cells(column)]

    @cached_property
    def _caption_column(self) -> int | None:
        """The column with the title of the captions, or with the most usual title."""
        others = [column for column in range(len(self.titles)) if column != self.path_column]
        if self.caption_title == NO_CAPTIONS:
            return None
        if self.caption_title:
            same = (column for column in others if _cell(self.titles, column) == self.caption_title)
            return next(same, None)
        columns_by_title = {self._title(column): column for column in reversed(others)}
        usual = (columns_by_title[title] for title in CAPTION_COLUMNS if title in columns_by_title)
        return next(usual, None)

    @cached_property
    def _width(self) -> int:
        return max(map(len, self.rows), default=0)

    def _title(self, column: int) -> str:
        """Return the title of a column as lowercase letters and digits, "" if it has none."""
        return re.sub(r"[^a-z0-9]", "", _cell(self.titles, column).lower())

    @cached_property
    def _split_column(self) -> int | None:
        """The column that names a split in every row.

        It is recognized by its title, or by naming train and another split.
        """
        for column in range(min(_MAX_COLUMNS, self._width)):
            if column in (self.path_column, self._caption_column):
                continue
            splits = {split_of(cell) for cell in set(self.cells(column)) if cell}
            if not splits or None in splits:
                continue
            if self._title(column) in _SPLIT_TITLES or ("train" in splits and len(splits) > 1):
                return column
        return None

    def _label_column(self) -> tuple[int | None, list[str]]:
        """Return the column of the labels, or None, and notes on the choice."""
        row_numbers = 0 if self._has_row_numbers else None
        excluded = (self.path_column, self._split_column, self._caption_column, row_numbers)
        others = [column for column in range(self._width) if column not in excluded]
        if not self.titles:
            after_path = [column for column in others if column > self.path_column]
            return next(iter(after_path or others), None), []
        columns_by_title = {self._title(column): column for column in reversed(others)}
        for title in _LABEL_TITLES:
            if title in columns_by_title:
                return columns_by_title[title], []
        if self._caption_column is not None:  # another column may be the number of the caption
            return None, []
        if len(others) == 1:
            column = others[0]
            if column >= len(self.titles):
                return column, []
            return column, [f"labels come from the column {self.titles[column]!r}"]
        titles = ", ".join(map(repr, self.titles))
        note = f"none of the columns {titles} is called label, so the images have no labels"
        return None, [note] if others else []

    @property
    def _has_row_numbers(self) -> bool:
        """True if the first column numbers the rows, as data-frame libraries do."""
        if self.path_column == 0:
            return False
        if self.titles:
            return self._title(0) in _INDEX_TITLES
        numbers = self.cells(0)[:NUM_SAMPLE_ROWS]
        return any(numbers == [str(row + first) for row in range(len(numbers))] for first in (0, 1))


def _cell(row: list[str], column: int) -> str:
    return row[column].strip() if column < len(row) else ""


def _legible(cell: str) -> str:
    """Return a cell with the bytes that are not UTF-8 read as those of a spreadsheet."""
    if cell.isascii():
        return cell
    content = cell.encode("utf-8", "surrogateescape")
    try:
        return content.decode()
    except UnicodeDecodeError:
        return content.decode("cp1252", "replace")


def _normalize_labels(cells: list[str]) -> list[str]:
    """Return labels in a uniform spelling.

    Missing labels become "". Accented letters are composed (NFC). Whole numbers lose the decimal
    point that pandas writes if the column has a missing value.
    """
    labels = [
        "" if cell in _MISSING_LABELS else unicodedata.normalize("NFC", cell) for cell in cells
    ]
    names = set(labels) - {""}
    has_floats = any("." in name for name in names)
    if has_floats and all(re.fullmatch(r"\d+(\.0+)?", name) for name in names):
        return [label.partition(".")[0] for label in labels]
    return labels
