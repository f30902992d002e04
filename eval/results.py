"""What an evaluation leaves: RUN/eval/<name>.json, and the same numbers as text with their protocol."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ssl_pretrain.data.workers import LostWorkerError
from ssl_pretrain.distributed import process_group
from ssl_pretrain.monitoring.output_streams import lasting_output
from ssl_pretrain.system import durable_files
from ssl_pretrain.system.exit_status import DISK_REFUSED, LOST, MISTAKE

SKIPPED = 77  # exit status of an evaluation that had nothing to measure with and was told to pass over that
BETTER = "random (better of two)"


class Unlabelled(ValueError):
    """The images have no labels to measure with, or there are none to test on."""


@dataclass
class Row:
    """One line of a table: the features judged, and a number in percent for each column."""

    features: str  # raw pixels | random, as built | random, recalibrated | pretrained
    metrics: dict[str, float]
    spread: dict[str, float] = field(
        default_factory=dict
    )  # standard deviation, where a column has one
    notes: dict[str, str] = field(default_factory=dict)  # what was chosen, by column


def better_of(rows: list[Row], name: str) -> Row:
    """One row with, in each column, the best number of `rows`; its notes say whose it is."""
    best = Row(name, {})
    for column in rows[0].metrics:
        row = max(rows, key=lambda row: row.metrics[column])
        best.metrics[column] = row.metrics[column]
        best.notes[column] = row.features.partition(", ")[2]
        if column in row.spread:
            best.spread[column] = row.spread[column]
    return best


def with_better_random(rows: list[Row]) -> list[Row]:
    """The rows, and after the random backbones a row with the better of them in each column, which is the one that counts."""
    random = [row for row in rows if row.features.startswith("random, ")]
    if not random:
        return rows
    after = rows.index(random[-1]) + 1
    return [*rows[:after], better_of(random, BETTER), *rows[after:]]


def save(
    run: Path,
    name: str,
    protocol: dict[str, Any],
    rows: list[Row],
    about: dict[str, Any],
    seconds: float,
    measure: str = "accuracy, %",
) -> dict[str, Any]:
    """Writes RUN/eval/<checkpoint>/<name>.json, on the main rank, whole or not at all, and returns what it holds.

    RUN/eval/<name>.json is the same of the newest checkpoint judged: one of an earlier step does not replace it.
    """
    result = {
        "name": name, **about, "measure": measure, "protocol": protocol, "rows": [asdict(row) for row in rows], "seconds": round(seconds, 2)
    }  # fmt: skip
    if not process_group.is_main():
        return result
    _replace(run / "eval" / about["checkpoint"] / f"{name}.json", result)
    newest = run / "eval" / f"{name}.json"
    if not newest.exists() or json.loads(newest.read_text()).get("step", -1) <= about["step"]:
        _replace(newest, result)
    return result


def _replace(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    durable_files.replace(path, json.dumps(result, indent=1) + "\n")


def load(run: Path) -> list[dict[str, Any]]:
    """Every evaluation of a run, by name, each of the newest checkpoint that it judged."""
    return [json.loads(path.read_text()) for path in sorted((run / "eval").glob("*.json"))]


def by_step(run: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """Every evaluation of every checkpoint, by name and step: those of RUN/eval/step_<step>/ and the newest in RUN/eval/."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for path in [
        *sorted((run / "eval").glob("step_*/*.json")),
        *sorted((run / "eval").glob("*.json")),
    ]:
        result = json.loads(path.read_text())
        if {"name", "step", "rows"} <= result.keys():
            found.setdefault(result["name"], {})[result["step"]] = result
    return {name: dict(sorted(steps.items())) for name, steps in found.items()}


def number(row: dict[str, Any], column: str) -> str:
    value, spread = row["metrics"].get(column), row["spread"].get(column)
    if value is None:
        return "-"
    return f"{value:.1f}" if spread is None else f"{value:.1f} ± {spread:.1f}"


def choices(result: dict[str, Any]) -> dict[str, str]:
    """What was chosen for each row, in words."""
    rows = [row for row in result["rows"] if row["notes"]]
    return {
        row["features"]: "; ".join(f"{column}: {note}" for column, note in row["notes"].items())
        for row in rows
    }


def columns(result: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(column for row in result["rows"] for column in row["metrics"]))


def table(header: list[str], lines: list[list[str]]) -> str:
    """Lines of cells as text: the first column to the left, the numbers to the right."""
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    padded = [
        [line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]
        for line in [header, *lines]
    ]
    rendered = ["  ".join(line) for line in padded]
    return "\n".join([rendered[0], "-" * len(rendered[0]), *rendered[1:]])


def text(result: dict[str, Any]) -> str:
    """The protocol, a line for each part of it, then the table in percent, then what was chosen."""
    names = columns(result)
    numbers = table(
        [result.get("measure", "accuracy, %"), *names],
        [[row["features"], *(number(row, name) for name in names)] for row in result["rows"]],
    )
    chosen = choices(result)
    notes = ["", "chosen:", *_indented(chosen)] if chosen else []
    return "\n".join([f"{result['name']}:", *_indented(result["protocol"]), "", numbers, *notes])


def _indented(pairs: dict[str, Any]) -> list[str]:
    return [f"  {key}: {value}" for key, value in pairs.items()]


def say(line: str) -> None:
    """Progress, from the main rank, where the numbers of a pipe do not go."""
    if process_group.is_main():
        print(line, file=sys.stderr, flush=True)


def command(main: Callable[[list[str]], None], name: str) -> None:
    """Run `main` on the command line's arguments, and turn its errors into one line and an exit status.

    The status is 2 for a user's mistake, 74 for a disk that refuses, 69 for a lost worker.
    """
    with lasting_output():
        _run(main, name)


def _run(main: Callable[[list[str]], None], name: str) -> None:
    try:
        main(sys.argv[1:])
    except Unlabelled as error:
        skipping = "--skip-unlabelled" in sys.argv[1:]
        print(
            f"{name}: {'skipped: ' if skipping else ''}{error}",
            file=sys.stdout if skipping else sys.stderr,
        )
        sys.exit(SKIPPED if skipping else MISTAKE)
    except (ValueError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(DISK_REFUSED if durable_files.is_disk_failure(error) else MISTAKE)
    except LostWorkerError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(LOST)
    except KeyboardInterrupt:
        sys.exit(130)
