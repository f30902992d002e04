"""Read the files of a run that its pages show."""

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

from ssl_pretrain.monitoring import metric_names, records

Record = dict[str, Any]
AXIS_KEYS = {*metric_names.AXES, "time"}  # keys of a record that have no curve


def read_metrics(run_path: Path, name: str = "metrics.jsonl") -> list[Record]:
    """Read a file of records in the run's folder, one record per step, sorted by step."""
    return records.read(run_path / name)


def metric_points(metrics: list[Record], key: str) -> list[tuple[float, float]]:
    """Return (epoch, value) for each finite value of `key`, with shares in percent."""
    factor = 100 if metric_names.metric_info(key).is_percentage else 1
    return [
        (record["epoch"], factor * record[key])
        for record in metrics
        if isinstance(record.get(key), int | float)
        and math.isfinite(record[key])
        and "epoch" in record
    ]


def recorded_keys(metrics: list[Record], group: str) -> list[str]:
    """Return the recorded keys of a group in the order of `metric_names.METRICS`, then by name."""
    recorded = {key for record in metrics for key in record} - AXIS_KEYS
    known = [key for key in metric_names.METRICS if key in recorded]
    keys = [*known, *sorted(recorded.difference(known))]
    return [key for key in keys if metric_names.metric_info(key).group == group]


def read_alerts(run_path: Path) -> list[Record]:
    """Read the alerts raised during the run. One that is still being written is left out."""
    alerts = []
    for path in metric_names.existing_paths(run_path, "alerts.jsonl"):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError):
                alerts.append(json.loads(line))
    return [
        alert for alert in alerts if isinstance(alert, dict) and {"title", "text"} <= alert.keys()
    ]
