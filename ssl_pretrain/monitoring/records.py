"""Results of a run's monitors, and files of records with one JSON object per line."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ssl_pretrain.monitoring import metric_names
from ssl_pretrain.system import durable_files


@dataclass
class Measurements:
    """Results of the monitors after one step. Results that were not due are empty."""

    metrics: dict[str, float] = field(default_factory=dict)  # added to the next record
    curves: dict[str, list[float]] = field(default_factory=dict)  # one line of plots.jsonl
    neighbor_grid: Tensor | None = None  # picture (3, height, width) in [0, 1], on rank 0

    def __or__(self, other: Measurements) -> Measurements:
        """Combine the results of two monitors."""
        neighbor_grid = self.neighbor_grid if other.neighbor_grid is None else other.neighbor_grid
        return Measurements(self.metrics | other.metrics, self.curves | other.curves, neighbor_grid)


def encode(record: dict[str, Any]) -> str:
    """Return a record as one line of JSON, with null for numbers that are not finite."""
    return json.dumps(
        {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
    )


def read(path: Path) -> list[dict[str, Any]]:
    """Read the records of a file, one per step, sorted by step.

    Truncated lines, which a killed run may leave, are skipped. If a step has two records, the later
    one counts. Metrics that an earlier version wrote get their current names.
    """
    records = {}
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
            records[record["step"]] = metric_names.with_current_names(record)
        except (ValueError, KeyError, TypeError):
            continue
    return [records[step] for step in sorted(records)]


def trim(path: Path, last_step: int) -> list[dict[str, Any]]:
    """Remove the records after `last_step` from a file and return the others.

    A resumed run calls this function, because it will write those records again. The file is
    replaced atomically, and only if it changes.
    """
    records = [record for record in read(path) if record["step"] <= last_step]
    content = "".join(f"{encode(record)}\n" for record in records)
    if path.exists() and content != path.read_text(errors="replace"):
        durable_files.replace(path, content)
    return records
