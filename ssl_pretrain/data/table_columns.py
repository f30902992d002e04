"""Tables that name images: the columns of paths, labels and splits."""

import re
import unicodedata
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

from ssl_pretrain.data.split_names import split_of
from ssl_pretrain.data.table_format import MAX_COLUMNS, SAMPLE_ROWS, TableFormat, read_rows

# Titles in lower case, reduced to letters and digits.
_NAME_TITLES = ("class", "classname", "labelname", "category", "target", "species")
_LABEL_TITLES = ("label", "labels", *_NAME_TITLES, "classid", "labelid", "y")
_INDEX_TITLES = ("", "index", "unnamed0", "rownames", "rowid")
_SPLIT_TITLES = ("split", "splits", "subset", "partition", "phase", "fold", "set", "usage")
# How pandas, polars and R write a missing value.
_MISSING = frozenset({"", "-1", "-1.0", "nan", "NaN", "NA", "<NA>"})


@dataclass(frozen=True)
class Table:
    """The rows of a table that name an image."""

    titles: list[str]  # the cells of the header; empty without a header
    rows: list[list[str]]
    path_column: int

    @classmethod
    def parse(cls, text: str, form: TableFormat) -> Self:
        """Read a table whose format is known."""
        rows = read_rows(text, form.delimiter)
        titles = rows.pop(0) if form.has_header else []
        column = form.path_column
        return cls(titles, [row for row in rows if row[column:] and row[column].strip()], column)

    def cells(self, column: int) -> list[str]:
        """Return the cells of a column, "" where a row is too short."""
        return [row[column].strip() if len(row) > column else "" for row in self.rows]

    def select_split(self, split: str) -> tuple[Self, str]:
        """Return the rows of one split and a note, if a column tells the splits apart.

        Test images stand in for a validation split that no row names.
        """
        column = self._split_column
        if column is None:
            return self, ""
        splits = [split_of(cell) for cell in self.cells(column)]
        if split == "val" and "val" not in splits:
            split = "test"
        rows = [row for row, row_split in zip(self.rows, splits) if row_split == split]
        title = self.titles[column] if column < len(self.titles) else str(column + 1)
        counts = f"{len(rows):,} of {len(self.rows):,}"
        note = f"the rows whose column {title!r} says {split}: {counts}"
        return replace(self, rows=rows), note

    def labels(self) -> tuple[list[str], list[str]]:
        """Return the label of each row, "" for none, and notes on how the column was chosen."""
        column, notes = self._label_column()
        if column is None:
            return [""] * len(self.rows), notes
        return _normalize_labels(self.cells(column)), notes

    @cached_property
    def _width(self) -> int:
        return max(map(len, self.rows), default=0)

    def _title(self, column: int) -> str:
        """Return the title of a column as lower case letters and digits, "" if it has none."""
        title = self.titles[column] if column < len(self.titles) else ""
        return re.sub(r"[^a-z0-9]", "", title.lower())

    @cached_property
    def _split_column(self) -> int | None:
        """The column that names a split in every row.

        It is recognized by its title, or because it names train and another split.
        """
        for column in range(min(MAX_COLUMNS, self._width)):
            splits = {split_of(cell) for cell in set(self.cells(column)) if cell}
            if column == self.path_column or not splits or None in splits:
                continue
            if self._title(column) in _SPLIT_TITLES or ("train" in splits and len(splits) > 1):
                return column
        return None

    def _label_column(self) -> tuple[int | None, list[str]]:
        excluded = (self.path_column, self._split_column, 0 if self._has_index else None)
        others = [column for column in range(self._width) if column not in excluded]
        if not self.titles:
            after_path = [column for column in others if column > self.path_column]
            return next(iter(after_path or others), None), []
        for title in _LABEL_TITLES:
            for column in others:
                if self._title(column) == title:
                    return column, []
        if len(others) == 1:
            names = self.titles[others[0] :][:1]
            return others[0], [f"labels come from the column {name!r}" for name in names]
        if others:
            titles = ", ".join(map(repr, self.titles))
            note = f"none of the columns {titles} is called label, so the images have no labels"
            return None, [note]
        return None, []

    @property
    def _has_index(self) -> bool:
        """True if the first column numbers the rows, as data-frame libraries do."""
        if self.path_column == 0:
            return False
        if self.titles:
            return self._title(0) in _INDEX_TITLES
        numbers = [row[0].strip() for row in self.rows[:SAMPLE_ROWS]]
        return any(numbers == [str(row + first) for row in range(len(numbers))] for first in (0, 1))


def _normalize_labels(cells: list[str]) -> list[str]:
    """Return labels in a uniform spelling.

    Missing labels become "". Accented letters are composed (NFC). Whole numbers lose the decimal
    point that pandas writes if the column has a missing value.
    """
    labels = ["" if cell in _MISSING else unicodedata.normalize("NFC", cell) for cell in cells]
    names = set(labels) - {""}
    has_floats = any("." in name for name in names)
    if has_floats and all(re.fullmatch(r"\d+(\.0+)?", name) for name in names):
        return [label.partition(".")[0] for label in labels]
    return labels
