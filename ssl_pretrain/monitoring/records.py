"""Records of a run on disk, one JSON object per line."""

import json
import math
from pathlib import Path
from typing import Any

from ssl_pretrain.monitoring import metric_names
from ssl_pretrain.system import durable_files


def encode(record: dict[str, Any]) -> str:
    """Return a record as one line of JSON, which has no NaN: such numbers become null."""
    return json.dumps(
        {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
    )


def read(path: Path) -> list[dict[str, Any]]:
    """Read the records of a file, one per step, in the order of the steps.

    A line that a kill cut short is left out. The later of two records of a step counts. Metrics
    have their present names, whatever version wrote them.
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

    A resumed run calls this, as it will write those records again. The file is replaced
    atomically, and only if it changes.
    """
    records = [record for record in read(path) if record["step"] <= last_step]
    content = "".join(f"{encode(record)}\n" for record in records)
    if path.exists() and content != path.read_text(errors="replace"):
        durable_files.replace(path, content)
    return records
