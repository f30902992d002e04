"""Texts in the columns of Parquet and Arrow files."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from ssl_pretrain.data.config import DataConfig
from ssl_pretrain.data.formats import table_files
from ssl_pretrain.data.image_source import NumberedSource
from ssl_pretrain.data.texts.text_columns import choose_columns, split_alternatives
from ssl_pretrain.data.texts.text_source import index_text_labels


class TextTable(NumberedSource):
    """Rows of a `datasets.Dataset`, which stays on disk.

    Args:
        path: The file, for messages.
        table: The rows.
        config: Its keys `text_columns` and `label_column` may name columns.

    Raises:
        ValueError: If the columns are ambiguous, or a value is no text.
    """

    has_images = False

    def __init__(self, path: Path, table: Any, config: DataConfig):
        columns = choose_columns(table.column_names, config, str(path))
        names = [table.column_names[column] for column in columns.texts]
        self._path, self._names = path, names
        self._table = table.select_columns(names)
        rows, self._digest = self._scan()
        if not len(rows):
            raise ValueError(
                f"data.root: {path} has no record in which every text is present; check the file "
                "and data.text_columns"
            )
        labels = [""] * len(table)
        if columns.label is not None:
            values = table[table.column_names[columns.label]]
            labels = ["" if value is None else str(value) for value in values]
        indices, classes = index_text_labels([labels[row] for row in rows], None)
        super().__init__(str(path), indices, classes)
        self.num_texts = len(names)
        self._item_numbers = rows
        self.notes = [f"the texts of {path} are in the columns {', '.join(names)}"]
        if num_skipped := len(table) - len(rows):
            self.notes.append(
                f"{num_skipped:,} of {len(table):,} records in {path} are skipped, because a text "
                "is empty"
            )

    def read(self, index: int) -> np.ndarray:
        """Raise NotImplementedError, because the items are texts."""
        raise NotImplementedError(f"{self.full_path} contains texts and no images")

    def texts(self, index: int) -> list[list[str]]:
        """Return the alternatives of each text of an item."""
        row = int(self._item_numbers[index])
        return self._parse(self._table[row], row)

    def check_present(self) -> None:
        """Raise FileNotFoundError if the file no longer exists."""
        if not self._path.exists():
            raise FileNotFoundError(
                f"data.root: {self._path} no longer exists, but existed when the run began"
            )

    def _scan(self) -> tuple[np.ndarray, bytes]:
        """Return the numbers of the rows in which every text is present, and a digest."""
        rows, digest = [], hashlib.sha256(repr(self._names).encode())
        for row, values in enumerate(self._table):
            texts = self._parse(values, row)
            digest.update(repr(texts).encode())
            if all(texts):
                rows.append(row)
        return np.array(rows, np.int64), digest.digest()

    def _parse(self, values: dict[str, Any], row: int) -> list[list[str]]:
        try:
            return [split_alternatives(values[name]) for name in self._names]
        except TypeError as error:
            raise ValueError(
                f"data.text_columns: {self._path}[{row}]: {error}; name columns of texts"
            ) from None


def open_text_table(path: Path, config: DataConfig, cache_dir: Path) -> TextTable:
    """Open a .parquet or .arrow file of texts.

    Raises:
        ValueError: If `datasets` is not installed or the file is damaged.
    """
    table_files.require_datasets(str(path))
    return TextTable(path, table_files.load_shards([path], cache_dir), config)
