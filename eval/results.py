"""Write and read the result files of evaluations, RUN/eval/<name>.json, and show them as text."""

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ssl_pretrain.distributed import process_group
from ssl_pretrain.eval import result_trackers
from ssl_pretrain.system import durable_files

BETTER_RANDOM = "random (better of two)"  # name of the baseline's row
ACCURACY = "accuracy, %"
GRID_SUFFIX = "_grid"  # end of the names of results that list every setting tried
MAX_WIDTH = 80  # columns of a terminal
# End of a result's name if the evaluation took another feature than the pooled one.
FEATURE_SUFFIX = re.compile(r"_(prefix|patch_mean|cls_mean|last\d+)(?=_grid$|_test_selected|$)")


@dataclass
class Row:
    """One row of a result table: the features that were evaluated, and one number per column."""

    features: str  # such as "raw pixels", "random, as built" or "pretrained"
    metrics: dict[str, float]
    spread: dict[str, float] = field(default_factory=dict)  # standard deviation by column
    notes: dict[str, str] = field(default_factory=dict)  # selected hyperparameters by column

    @classmethod
    def over_seeds(
        cls, features: str, outcomes: Sequence[dict[str, float]], notes: dict[str, str]
    ) -> "Row":
        """Return the mean and the standard deviation over the numbers of several seeds.

        Args:
            features: The features that were evaluated.
            outcomes: Numbers of each seed by column. A column may be missing in some.
            notes: Notes of the row by column.
        """
        columns = dict.fromkeys(column for outcome in outcomes for column in outcome)
        values = {
            column: [outcome[column] for outcome in outcomes if column in outcome]
            for column in columns
        }
        return cls(
            features,
            {column: float(np.mean(numbers)) for column, numbers in values.items()},
            {
                column: float(np.std(numbers, ddof=1))
                for column, numbers in values.items()
                if len(numbers) > 1
            },
            notes,
        )

    def summary(self, unit: str = " %") -> str:
        """Return the row as one line of text.

        Args:
            unit: Text after each number.
        """
        return f"{self.features}: " + ", ".join(
            f"{column} {value:.1f}{unit}" for column, value in self.metrics.items()
        )


def measure_of_feature(measure: str, feature: str) -> str:
    """Return the name of the numbers, with the name of the feature unless it is the pooled one."""
    return measure if feature == "pooled" else f"{feature}, {measure}"


def suffix_of_feature(feature: str) -> str:
    """Return the end of the result's name. It is empty for the pooled feature."""
    return "" if feature == "pooled" else f"_{feature}"


def split_name(name: str) -> tuple[str, str]:
    """Return a result's name without its feature, and the feature or ""."""
    match = FEATURE_SUFFIX.search(name)
    return (FEATURE_SUFFIX.sub("", name), match[1]) if match else (name, "")


def with_better_random_row(rows: list[Row]) -> list[Row]:
    """Return the rows with a baseline row inserted after the random ones.

    The baseline has the number of the better random backbone in each column.
    """
    random_rows = [row for row in rows if row.features.startswith("random, ")]
    if not random_rows:
        return rows
    baseline = Row(BETTER_RANDOM, {})
    for column in dict.fromkeys(name for row in random_rows for name in row.metrics):
        having = [row for row in random_rows if column in row.metrics]
        best = max(having, key=lambda row: row.metrics[column])
        baseline.metrics[column] = best.metrics[column]
        baseline.notes[column] = best.features.partition(", ")[2]
        if column in best.spread:
            baseline.spread[column] = best.spread[column]
    position = rows.index(random_rows[-1]) + 1
    return [*rows[:position], baseline, *rows[position:]]


def save(
    run_path: Path,
    name: str,
    protocol: dict[str, Any],
    rows: list[Row],
    provenance: dict[str, Any],
    seconds: float,
    measure: str = ACCURACY,
) -> dict[str, Any]:
    """Write RUN/eval/<checkpoint>/<name>.json and return its content.

    The main rank replaces the file atomically. A file <name>.txt beside it shows the same as text.
    RUN/eval/<name>.json and <name>.txt are copies of the result with the highest step. The result
    is also added to the files of the run's trackers.

    Args:
        run_path: Folder of the run.
        name: Name of the evaluation.
        protocol: Everything a reader needs to reproduce the numbers. Each entry is printed as one
            line.
        rows: Rows of the table.
        provenance: Checkpoint, step and network, from `Run.provenance`.
        seconds: Duration of the evaluation.
        measure: Name and unit of the numbers.
    """
    result = {
        "name": name,
        **provenance,
        "measure": measure,
        "protocol": protocol,
        "rows": [asdict(row) for row in rows],
        "seconds": round(seconds, 2),
    }
    if process_group.is_main():
        content, text = f"{json.dumps(result, indent=1)}\n", f"{format_fully(result)}\n"
        folder = run_path / "eval"
        newest = folder / f"{name}.json"
        paths = [folder / provenance["checkpoint"] / newest.name]
        if not newest.exists() or json.loads(newest.read_text()).get("step", -1) <= result["step"]:
            paths.append(newest)
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            durable_files.replace(path.with_suffix(".txt"), text)
            durable_files.replace(path, content)
        result_trackers.track(run_path, result, partial(load_by_step, run_path))
    return result


def save_with_grid(
    run_path: Path,
    name: str,
    table: tuple[dict[str, Any], list[Row]],
    grid: tuple[dict[str, Any], list[Row]],
    provenance: dict[str, Any],
    seconds: float,
    measure: str,
) -> dict[str, Any]:
    """Save a result, and the numbers of all settings as <name>_grid. Return the result's content.

    The table gets the row of the better random backbone.

    Args:
        run_path: Folder of the run.
        name: Name of the evaluation.
        table: Protocol and rows of the result.
        grid: Protocol and rows of all settings.
        provenance: Checkpoint, step and network, from `Run.provenance`.
        seconds: Duration of the evaluation.
        measure: Name and unit of the numbers.
    """
    save(run_path, f"{name}{GRID_SUFFIX}", *grid, provenance, seconds, measure)
    protocol, rows = table
    rows = with_better_random_row(rows)
    return save(run_path, name, protocol, rows, provenance, seconds, measure)


def load_newest(run_path: Path) -> list[dict[str, Any]]:
    """Read the newest result of each evaluation of a run, sorted by name."""
    return [json.loads(path.read_text()) for path in sorted((run_path / "eval").glob("*.json"))]


def load_by_step(run_path: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """Read the results of all checkpoints, keyed by the evaluation's name and the step."""
    by_name: dict[str, dict[int, dict[str, Any]]] = {}
    folder = run_path / "eval"
    for path in [*sorted(folder.glob("step_*/*.json")), *sorted(folder.glob("*.json"))]:
        result = json.loads(path.read_text())
        if {"name", "step", "rows"} <= result.keys():
            by_name.setdefault(result["name"], {})[result["step"]] = result
    return {name: dict(sorted(by_step.items())) for name, by_step in by_name.items()}


def format_number(row: dict[str, Any], column: str) -> str:
    """Format one number of a row, with its standard deviation if there is one."""
    value, spread = row["metrics"].get(column), row["spread"].get(column)
    if value is None:
        return "-"
    return f"{value:.1f}" if spread is None else f"{value:.1f} ± {spread:.1f}"


def selected_hyperparameters(result: dict[str, Any]) -> dict[str, str]:
    """Return the selected hyperparameters of each row that has any, as text."""
    return {
        row["features"]: "; ".join(f"{column}: {note}" for column, note in row["notes"].items())
        for row in result["rows"]
        if row["notes"]
    }


def column_names(result: dict[str, Any]) -> list[str]:
    """Return the column names of a result's table in order."""
    return list(dict.fromkeys(column for row in result["rows"] for column in row["metrics"]))


def table_cells(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of a result's table as text."""
    names = column_names(result)
    return [result.get("measure", ACCURACY), *names], [
        [row["features"], *(format_number(row, name) for name in names)] for row in result["rows"]
    ]


def format_table(header: list[str], rows: list[list[str]]) -> str:
    """Format cells as plain text, with the first column flush left and the others flush right."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
        for row in [header, *rows]
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def format_narrow_table(header: list[str], rows: list[list[str]], width: int = MAX_WIDTH) -> str:
    """Format cells as a table of at most `width` characters.

    If the table is too wide, its columns become rows, and then it is split into several tables.
    """
    table = format_table(header, rows)
    if _width(table) <= width:
        return table
    header, *rows = map(list, zip(header, *rows))
    tables = []
    while len(header) > 1:
        num_columns = len(header)
        while num_columns > 2 and _width(_first_columns(header, rows, num_columns)) > width:
            num_columns -= 1
        tables.append(_first_columns(header, rows, num_columns))
        header, *rows = [[row[0], *row[num_columns:]] for row in (header, *rows)]
    return "\n\n".join(tables)


def _first_columns(header: list[str], rows: list[list[str]], num_columns: int) -> str:
    return format_table(header[:num_columns], [row[:num_columns] for row in rows])


def _width(table: str) -> int:
    return max(map(len, table.splitlines()))


def format_fully(result: dict[str, Any]) -> str:
    """Return the protocol of a result, its table, and the selected hyperparameters."""

    def indented(entries: dict[str, Any]) -> list[str]:
        return [f"  {key}: {value}" for key, value in entries.items()]

    lines = [f"{result['name']}:", *indented(result["protocol"]), ""]
    lines.append(format_narrow_table(*table_cells(result)))
    if hyperparameters := selected_hyperparameters(result):
        lines += ["", "selected hyperparameters:", *indented(hyperparameters)]
    return "\n".join(lines)


def print_progress(line: str) -> None:
    """Print a line to stderr on the main rank. Only results go to stdout."""
    process_group.print_once(line, file=sys.stderr)
