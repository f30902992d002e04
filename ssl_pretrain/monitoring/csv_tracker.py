"""Write a run's records to `metrics.csv`, for spreadsheets and pandas."""

import csv
import io
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ssl_pretrain.monitoring.background_writer import BackgroundWriter

FILE_NAME = "metrics.csv"
# Columns that every table starts with, so that accuracies, which few records have, come early.
FIRST_COLUMNS = ("step", "epoch", "loss", "knn", "probe", "lr")


class CsvTracker:
    """Table with one row per record. A metric that a record lacks is an empty field.

    A metric that appears later adds a column on the right. The file is then replaced as a whole, so
    that every row always has as many fields as the header.

    Args:
        run: The run's folder.
        writer: Writer of files in the background. Its owner closes it.
        past_records: Records of a resumed run, which fill the first rows.
    """

    def __init__(self, run: Path, writer: BackgroundWriter, past_records: Iterable[dict[str, Any]]):
        self.path = run / FILE_NAME
        self._writer = writer
        self._columns = list(FIRST_COLUMNS)
        self._lines: list[str] = []
        for record in past_records:
            self._add(record)
        self._write_all()

    def log_record(
        self, record: dict[str, Any], curves: dict[str, list[float]] | None = None
    ) -> None:
        """Add a row, and a column for each metric that no earlier record had."""
        if self._add(record):
            self._write_all()
        else:
            self._writer.append(self.path, self._lines[-1])

    def log_picture(self, key: str, path: str, caption: str, step: int) -> None:
        """Ignore the picture, because a table has no place for it."""

    def raise_alert(self, title: str, text: str, tag: str) -> None:
        """Ignore the alert, because `alerts.jsonl` has it."""

    def close(self, succeeded: bool = True) -> None:
        """Do nothing, because the owner of the writer closes it."""

    def _add(self, record: dict[str, Any]) -> bool:
        """Add a row to the lines in memory, and return True if that added columns."""
        new_columns = [key for key in record if key not in self._columns]
        if new_columns:
            self._columns += new_columns
            self._lines = [line + "," * len(new_columns) for line in self._lines]
        self._lines.append(_format_row(map(_format_field, map(record.get, self._columns))))
        return bool(new_columns)

    def _write_all(self) -> None:
        lines = [_format_row(self._columns), *self._lines]
        self._writer.replace(self.path, "".join(f"{line}\n" for line in lines))


def _format_row(fields: Iterable[Any]) -> str:
    """Return one line of a CSV file, without its line end."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="").writerow(fields)
    return buffer.getvalue()


def _format_field(value: Any) -> Any:
    """Return an empty field for a missing value and for a number that is not finite."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    return value
