"""Studies: YAMLs of configs/sweeps/ that pretrain several variants and compare them."""

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ssl_pretrain import config as configuration
from ssl_pretrain import methods, schema
from ssl_pretrain.config import ConfigError, RunConfig
from ssl_pretrain.launch import local, pretrain, slurm, study_table
from ssl_pretrain.system.exit_status import STOPPED


@dataclass
class Variant:
    """One row of a study's table."""

    name: str = "???"
    set: list[str] = field(default_factory=list)  # overrides of the base configuration


@dataclass
class Study:
    """Contents of a YAML of configs/sweeps/."""

    title: str = ""
    base: str = "configs/methods_digits.yaml"
    set: list[str] = field(default_factory=list)  # overrides of all variants
    small_heads: bool = False  # apply SMALL_CONFIG and PRESET_OVERRIDES of the method's file
    every_method: bool = False  # add one variant per method
    columns: list[str] = field(default_factory=lambda: list(study_table.DEFAULT_COLUMNS))
    plot_against: str = ""  # numeric key for the x-axis; empty: one bar per variant
    runs: list[Variant] = field(default_factory=list)

    def evaluations(self) -> list[str]:
        """Return the evaluations that the columns are read from."""
        names = [study_table.COLUMNS[column].evaluation for column in self.columns]
        return list(dict.fromkeys(name for name in names if name))


@dataclass
class PlannedRun:
    """One run of a study: a variant with a seed."""

    variant: str
    config: RunConfig
    overrides: list[str]  # with the base configuration, these give `config`

    def is_done(self) -> bool:
        """Return True if every evaluation of the run has a result."""
        results = Path(self.config.output) / "eval"
        return all((results / f"{name}.json").exists() for name in self.config.evaluation.at_end)


def load(path: str | Path) -> Study | None:
    """Return the study in a YAML, or None if the YAML configures a single run.

    Raises:
        ConfigError: A key or column is unknown, or the study has no runs.
    """
    if not Path(path).is_file():
        return None
    tree = configuration.read_yaml(Path(path))
    if "runs" not in tree:
        return None
    try:
        study: Study = schema.build(Study, tree)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    if study.every_method:
        names = methods.names()
        study.runs = [*(Variant(name, [f"method.name={name}"]) for name in names), *study.runs]
    if not study.runs:
        raise ConfigError(f"{path}: runs: is empty; give each a name and what it sets")
    unknown = [column for column in study.columns if column not in study_table.COLUMNS]
    if unknown or not study.columns:
        raise ConfigError(
            f"{path}: columns: {unknown}; choose one or more of: {list(study_table.COLUMNS)}"
        )
    return study


def plan(
    study: Study, path: str | Path, base: str | None, overrides: Sequence[str]
) -> list[PlannedRun]:
    """Plan every variant with every seed, in the order of the table.

    Args:
        study: The study.
        path: Its YAML, which names the default output folder.
        base: Configuration to use instead of the study's own.
        overrides: key=value for all runs. seed=0,1,2 plans three runs per variant.
    """
    base = base or study.base
    common = dict(override.partition("=")[::2] for override in overrides)
    seeds = common.pop("seed", "0").split(",")
    folder = common.pop("output", f"runs/{Path(path).stem}_{Path(base).stem}")
    runs = []
    for variant in study.runs:
        slug = re.sub(r"[^a-z0-9.]+", "_", variant.name.lower()).strip("_")
        specific = [*study.set, *variant.set]
        for seed in seeds:
            every = [
                *(small_model_overrides(specific) if study.small_heads else []),
                *specific,
                *(f"{key}={value}" for key, value in common.items()),
                f"seed={seed}",
                f"output={folder}/{slug}_{seed}",
                f"evaluation.at_end=[{','.join(study.evaluations())}]",
            ]
            runs.append(PlannedRun(variant.name, configuration.load(base, every), every))
    return runs


def small_model_overrides(overrides: Sequence[str]) -> list[str]:
    """Return what the method named in `overrides` changes in a CPU preset: its head and exceptions.

    The list is empty if no method is named.
    """
    names = [
        value for key, _, value in (o.partition("=") for o in overrides) if key == "method.name"
    ]
    if not names:
        return []
    method = methods.find(names[-1])
    heads = [f"method.{key}={value}" for key, value in method.SMALL_CONFIG.items()]
    return [f"method.name={names[-1]}", *heads, *getattr(method, "PRESET_OVERRIDES", [])]


class Stopped(Exception):
    """Raised when the study is asked to stop."""


def run_all(runs: Sequence[PlannedRun], base: str) -> list[str]:
    """Pretrain and evaluate the runs that are not done.

    `linear` evaluates raw pixels and the random backbone once per seed, because they are the same
    for all variants.

    Returns:
        The folders of the runs that failed.

    Raises:
        Stopped: A run was asked to stop. No further run is started.
    """
    failed = []
    compared = {
        run.config.seed
        for run in runs
        if run.is_done() and study_table.has_reference_rows(run.config)
    }
    for number, run in enumerate(runs, start=1):
        if run.is_done():
            continue
        seed = run.config.seed
        print(f"=== {number} of {len(runs)}: {run.variant}, seed {seed}", flush=True)
        options = {"linear": ["--rows", "pretrained"]} if seed in compared else {}
        status = pretrain.pretrain_and_evaluate(run.config, base, run.overrides, options)[0]
        if status == STOPPED:
            raise Stopped(
                f"stopped in run {number} of {len(runs)}; the same command goes on from there"
            )
        if status:
            failed.append(run.config.output)
        else:
            compared.add(seed)
    return failed


def main(
    study: Study,
    path: str,
    base: str | None,
    overrides: Sequence[str],
    table: Path | None,
    only: str,
) -> int:
    """Run a study and write its table and plot.

    Args:
        study: The study.
        path: Its YAML.
        base: Configuration to use instead of the study's own.
        overrides: key=value for all runs.
        table: Markdown file to write. None: a file beside the runs.
        only: "list" prints the runs, "table" writes the table of the runs that are done, and ""
            does the whole study.

    Returns:
        The exit status.
    """
    runs = plan(study, path, base, overrides)
    for run in runs:
        _check_machine(run)
    if only == "list":
        print("\n".join(run.config.output for run in runs))
        return 0
    try:
        failed = [] if only == "table" else run_all(runs, base or study.base)
    except Stopped as stopped:
        print(stopped, flush=True)
        return STOPPED
    folder = Path(runs[0].config.output).parent
    done = [(run.variant, run.config) for run in runs if run.is_done()]
    if not done:
        print(
            f"error: {folder}: no run of this study has been evaluated, so no table was written; "
            "run it first",
            file=sys.stderr,
        )
        return 2 if only == "table" else 1
    missing = list(dict.fromkeys(run.variant for run in runs if not run.is_done()))
    table = table or folder / f"{Path(path).stem}.md"
    command = _command_to_show(path, base, overrides)
    comparison = study_table.Comparison(study.title, study.columns, done, study.plot_against)
    study_table.write(comparison, missing, command, table)
    print(f"{table} and {table.with_suffix('.png').name}")
    if failed:
        print(f"error: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _check_machine(run: PlannedRun) -> None:
    """Raise ConfigError for keys of a cluster: the runs follow each other on this machine."""
    if run.config.launch.cluster == "slurm":
        raise ConfigError(
            "launch.cluster: slurm: these runs follow each other on this machine; leave it out"
        )
    local.check_one_machine(run.config)
    slurm.check_not_submitted(run.config, run.overrides)


def _command_to_show(path: str, base: str | None, overrides: Sequence[str]) -> str:
    """Return the study's command without this machine's paths and settings."""
    shown = []
    for key, equals, value in (override.partition("=") for override in overrides):
        if key == "data.root":
            value = Path(value).name
        if key != "output" and not key.startswith(("launch.", "log.")):
            shown.append(f"{key}{equals}{value}")
    other_base = ["--base", base] if base else []
    return shlex.join(["python", "launch/sweep.py", path, *other_base, *shown])
