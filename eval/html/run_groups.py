"""Numbers of several runs side by side, with the mean and deviation of runs that differ by seed."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from ssl_pretrain import schema
from ssl_pretrain.data.config import short_name
from ssl_pretrain.eval import results, saved_settings
from ssl_pretrain.eval.html import run_files, sections
from ssl_pretrain.eval.html.run_files import Record
from ssl_pretrain.eval.table_text import MeasureTable, TableColumn, TableRow

NAMING_KEYS = ("output", "log.name", "log.tags", "log.group")  # keys that only name a run
SEED_KEY = "seed"
BASELINE_ROWS = {"raw pixels": "raw pixels", "random network": results.BETTER_RANDOM}
PRETRAINED = "pretrained"
NEUTRAL_EVALUATIONS = ("spectrum",)  # a higher number is not better
Column = tuple[str, str]  # name of a result and of one of its columns


@dataclass
class ComparedRun:
    """A run with everything that the comparison shows."""

    name: str
    path: Path
    config: dict[str, Any]  # flat
    metrics: list[Record]
    results: dict[str, Record]  # newest result of each evaluation

    def number(self, column: Column, features: str = PRETRAINED) -> float | None:
        """Return one number of a row of a result, or None if it was not measured."""
        for row in self.results.get(column[0], {}).get("rows", []):
            if row["features"] == features and column[1] in row["metrics"]:
                return float(row["metrics"][column[1]])
        return None

    @property
    def seed(self) -> Any:
        """Seed of the run."""
        return self.config.get(SEED_KEY)

    def describe_data(self) -> str:
        """Return the name of the data set."""
        source, root = (str(self.config.get(f"data.{key}") or "") for key in ("source", "root"))
        return short_name(source, root)

    @property
    def num_steps(self) -> int:
        """Steps in the run's records."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0


@dataclass
class RunGroup:
    """Runs whose configurations differ in nothing but the seed."""

    name: str
    runs: list[ComparedRun] = field(default_factory=list)


def read_run(name: str, path: Path) -> ComparedRun:
    """Read the files of a run."""
    config = schema.flatten(saved_settings.read(path))
    newest = {key: steps[max(steps)] for key, steps in results.load_by_step(path).items()}
    return ComparedRun(name, path, config, run_files.read_metrics(path), newest)


def group_by_seed(runs: Sequence[ComparedRun]) -> list[RunGroup]:
    """Group runs whose configurations differ in nothing but names and the seed."""
    members: dict[tuple[Any, ...], list[ComparedRun]] = {}
    for run in runs:
        key = tuple(
            sorted(
                (key, str(value))
                for key, value in run.config.items()
                if key not in (*NAMING_KEYS, SEED_KEY)
            )
        )
        members.setdefault(key, []).append(run)
    groups = [RunGroup(_group_name(group), group) for group in members.values()]
    names = [group.name for group in groups]
    for group in groups:
        if names.count(group.name) > 1:
            group.name += f" (from {group.runs[0].name})"
    return groups


def _group_name(runs: Sequence[ComparedRun]) -> str:
    """Return the common start of the runs' names, or the first name if there is none."""
    if len(runs) == 1:
        return runs[0].name
    first, last = min(run.name for run in runs), max(run.name for run in runs)
    common = "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last)))
    name = common.rstrip("0123456789").rstrip("_-. ").removesuffix("seed").rstrip("_-. ")
    return name or f"{runs[0].name} and {len(runs) - 1} more"


def result_columns(runs: Sequence[ComparedRun], main_only: bool) -> list[Column]:
    """Return the columns of the runs' results, the main evaluations first.

    Args:
        runs: Runs to compare.
        main_only: True for the first column of each result in percent, False for all columns.
    """
    names = dict.fromkeys(name for run in runs for name in run.results)
    columns: list[Column] = []
    for name in sorted(names, key=sections.order_of_evaluation):
        evaluated = [run.results[name] for run in runs if name in run.results]
        is_percentage = evaluated[0].get("measure", results.ACCURACY).endswith("%")
        if main_only and (name.endswith(results.GRID_SUFFIX) or not is_percentage):
            continue
        titles = dict.fromkeys(
            title for result in evaluated for title in results.column_names(result)
        )
        columns += [(name, title) for title in list(titles)[: 1 if main_only else None]]
    return columns


def results_table(groups: Sequence[RunGroup], columns: Sequence[Column]) -> MeasureTable:
    """Return the numbers of each group and of the baselines, with the best of each column bold."""
    rows = [
        TableRow(group.name, [_measured(group.runs, column) for column in columns])
        for group in groups
    ]
    runs = [run for group in groups for run in group.runs]
    rows += [
        TableRow(name, cells, is_reference=True)
        for name, cells in _baseline_numbers(runs, columns).items()
    ]
    return MeasureTable(
        [
            TableColumn(
                column_title(column),
                best="" if column[0].startswith(NEUTRAL_EVALUATIONS) else "highest",
            )
            for column in columns
        ],
        rows,
    )


def _measured(
    runs: Iterable[ComparedRun], column: Column, features: str = PRETRAINED
) -> list[float]:
    """Return the numbers of the runs that have one. Equal numbers of a baseline count once."""
    numbers = [run.number(column, features) for run in runs]
    measured = [number for number in numbers if number is not None]
    return measured if features == PRETRAINED or len(set(measured)) > 1 else measured[:1]


def _baseline_numbers(
    runs: Sequence[ComparedRun], columns: Sequence[Column]
) -> dict[str, list[list[float]]]:
    """Return the numbers of raw pixels and of the random network, once per seed.

    Runs on different data, and random networks of different backbones, have rows of their own.
    """
    owners: dict[tuple[str, ...], dict[Any, ComparedRun]] = {}
    for baseline in BASELINE_ROWS:
        for run in runs:
            key: tuple[str, ...] = (baseline, run.describe_data())
            if baseline == "random network":
                key = (*key, str(run.config.get("backbone.name", "")))
            by_seed = owners.setdefault(key, {})
            previous = by_seed.get(run.seed)
            if previous is None or len(run.results) > len(previous.results):
                by_seed[run.seed] = run
    rows: dict[str, list[list[float]]] = {}
    for (baseline, *details), by_seed in owners.items():
        num_of_kind = sum(key[0] == baseline for key in owners)
        name = f"{baseline} ({', '.join(details)})" if num_of_kind > 1 else baseline
        features = BASELINE_ROWS[baseline]
        cells = [_measured(by_seed.values(), column, features) for column in columns]
        if any(cells):
            rows[name] = cells
    return rows


def column_title(column: Column) -> str:
    """Return the title of a column of results."""
    return f"{sections.evaluation_title(column[0])}, {column[1]}"
