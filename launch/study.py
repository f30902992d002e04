"""Pretrain the variants of a study and compare them. configs/sweeps/ has the studies' YAMLs."""

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import yaml

from ssl_pretrain import config as configuration
from ssl_pretrain import methods, schema
from ssl_pretrain.checkpoint.folder import is_finished
from ssl_pretrain.config.resume_policy import resume_policy
from ssl_pretrain.launch import (
    local,
    pretrain,
    slurm,
    study_columns,
    study_curves,
    study_plot,
    study_spectrum,
    study_table,
)
from ssl_pretrain.system import program
from ssl_pretrain.system.exit_status import STOPPED, USER_ERROR


@dataclass
class Variant:
    """One row of a study's table."""

    name: str = "???"
    set: list[str] = field(default_factory=list)  # overrides, applied after those of the study
    base: str = ""  # configuration to use instead of the study's


@dataclass
class Study:
    """Contents of a study's YAML."""

    title: str = ""
    base: str = "configs/methods_digits.yaml"
    set: list[str] = field(default_factory=list)  # overrides for all variants
    small_heads: bool = False  # apply each method's SMALL_CONFIG and PRESET_OVERRIDES
    every_method: bool = False  # add one variant per method
    seeds: list[int] = field(default_factory=lambda: [0])  # one run of every variant per seed
    seed_by_seed: bool = False  # start all variants with one seed before the next seed
    columns: list[str] = field(default_factory=lambda: list(study_columns.DEFAULT_COLUMNS))
    plot_against: str = ""  # numeric key on the x-axis; if empty, a bar is drawn per variant
    curves: bool = False  # also plot `curve_metrics` during training
    curve_metrics: list[str] = field(default_factory=lambda: ["knn"])
    spectrum: bool = False  # also plot all eigenvalues of the covariance
    runs: list[Variant] = field(default_factory=list)

    def evaluation_names(self) -> list[str]:
        """Return the names of the evaluations whose results fill the columns."""
        names = [study_columns.COLUMNS[column].evaluation for column in self.columns]
        return list(dict.fromkeys(name for name in names if name))


@dataclass
class PlannedRun:
    """One variant of a study with one seed."""

    variant: str
    base: str  # the configuration that `overrides` apply to
    config: configuration.RunConfig
    overrides: list[str]

    def is_evaluated(self) -> bool:
        """Return True if the run is finished and every evaluation has a result."""
        if not self.config.evaluation.at_end:  # the columns are all from training
            return is_finished(self.config.output)
        results = Path(self.config.output) / "eval"
        return all((results / f"{name}.json").exists() for name in self.config.evaluation.at_end)


def load(path: str | Path) -> Study | None:
    """Return the study in a YAML, or None if the file is missing or configures a single run.

    Raises:
        ConfigError: If a key or column is unknown, or the study has no runs.
    """
    tree = configuration.read_yaml(Path(path))
    if "runs" not in tree:
        return None
    try:
        study: Study = schema.build(Study, tree)
    except ValueError as error:
        raise configuration.ConfigError(f"{path}: {error}") from None
    if study.every_method:
        method_variants = [Variant(name, [f"method.name={name}"]) for name in methods.names()]
        study.runs = [*method_variants, *study.runs]
    if not study.runs:
        raise configuration.ConfigError(
            f"{path}: runs: the list is empty; add runs, each with the keys name and set"
        )
    unknown = [column for column in study.columns if column not in study_columns.COLUMNS]
    if unknown or not study.columns:
        raise configuration.ConfigError(
            f"{path}: columns: {unknown}; choose one or more of: {list(study_columns.COLUMNS)}"
        )
    return study


def plan_runs(
    study: Study, path: str | Path, base: str | None, overrides: Sequence[str]
) -> list[PlannedRun]:
    """Plan every variant with every seed, in the order in which they are run.

    Args:
        study: The study.
        path: YAML of the study. Its name is part of the default output folder.
        base: Base configuration to use instead of those of the study and its variants.
        overrides: key=value settings for all runs. seed=0,1,2 plans three runs per variant,
            instead of one per seed of the study.
    """
    shared_settings = dict(override.partition("=")[::2] for override in overrides)
    seeds = shared_settings.pop("seed", ",".join(map(str, study.seeds))).split(",")
    has_own_bases = base is None and any(variant.base for variant in study.runs)
    base_name = "" if has_own_bases else f"_{Path(base or study.base).stem}"
    folder = shared_settings.pop("output", f"runs/{Path(path).stem}{base_name}")
    runs = []
    for variant in study.runs:
        variant_base = base or variant.base or study.base
        slug = re.sub(r"[^a-z0-9.]+", "_", variant.name.lower()).strip("_")
        settings = [*study.set, *variant.set]
        small_model = small_model_overrides(settings) if study.small_heads else []
        for seed in seeds:
            run_overrides = [
                *small_model,
                *settings,
                *(f"{key}={value}" for key, value in shared_settings.items()),
                f"seed={seed}",
                f"output={folder}/{slug}_{seed}",
                f"evaluation.at_end=[{','.join(study.evaluation_names())}]",
            ]
            config = configuration.load(variant_base, run_overrides)
            config, run_overrides = with_group(config, run_overrides)
            runs.append(PlannedRun(variant.name, variant_base, config, run_overrides))
    if study.seed_by_seed:
        runs.sort(key=lambda run: seeds.index(str(run.config.seed)))  # a stable sort
    return runs


def with_group(
    config: configuration.RunConfig, overrides: list[str]
) -> tuple[configuration.RunConfig, list[str]]:
    """Group the runs of a study in W&B by the folder that they share, unless they have a group."""
    if config.log.group:
        return config, overrides
    config.log.group = Path(config.output).parent.name
    return config, [*overrides, f"log.group={config.log.group}"]


def small_model_overrides(overrides: Sequence[str]) -> list[str]:
    """Return the overrides that adapt a small CPU configuration to the method in `overrides`.

    They are the method's SMALL_CONFIG and PRESET_OVERRIDES. The list is empty if `overrides` names
    no method.
    """
    prefix = "method.name="
    names = [text.removeprefix(prefix) for text in overrides if text.startswith(prefix)]
    if not names:
        return []
    method = methods.find(names[-1])
    small_config = [f"method.{key}={value}" for key, value in method.SMALL_CONFIG.items()]
    return [f"{prefix}{names[-1]}", *small_config, *getattr(method, "PRESET_OVERRIDES", [])]


def check_finished(runs: Sequence[PlannedRun]) -> None:
    """Refuse runs that were finished with other settings than the study has now.

    Raises:
        ConfigError: If a setting that changes the results differs.
    """
    for run in runs:
        path = Path(run.config.output) / "config.yaml"
        if run.is_evaluated() and path.is_file():
            saved = schema.flatten(yaml.safe_load(path.read_text()))
            planned = schema.flatten(configuration.to_dict(run.config))
            differences = [
                f"{key} was {saved[key]!r} and is now {planned[key]!r}"
                for key in saved.keys() & planned.keys()
                if saved[key] != planned[key]
                and resume_policy(key, type(run.config.method)) != "free"
            ]
            if differences:
                raise configuration.ConfigError(
                    f"{run.config.output} is finished, with a different configuration: "
                    f"{'; '.join(sorted(differences))}. Give the study another output, or delete "
                    "this folder"
                )


def run_all(runs: Sequence[PlannedRun]) -> int:
    """Pretrain and evaluate the runs without results, and return the exit status.

    The random backbone is the same in all variants of one base configuration, so `linear` evaluates
    it only once per seed. Raw pixels are the same for all seeds as well.
    """
    base_by_output = {run.config.output: run.base for run in runs}

    def evaluation_args_for(config: configuration.RunConfig) -> dict[str, list[str]]:
        seeds = [
            run.config.seed
            for run in runs
            if run.base == base_by_output[config.output]
            and run.is_evaluated()
            and study_columns.has_random_row(Path(run.config.output))
        ]
        if not seeds:
            return {}
        rows = ["pretrained"] if config.seed in seeds else ["random", "pretrained"]
        return {"linear": ["--rows", *rows]}

    remaining = [run for run in runs if not run.is_evaluated()]
    exit_status = 0
    for base, group in groupby(remaining, key=lambda run: run.base):
        pairs = [(run.config, run.overrides) for run in group]
        status = pretrain.pretrain_series(pairs, base, evaluation_args_for)
        if status == STOPPED:
            return STOPPED
        exit_status = exit_status or status
    return exit_status


def run_and_compare(study: Study, options: argparse.Namespace) -> int:
    """Run a study, write its table and plot, and return the exit status.

    Args:
        study: The study.
        options: Options of launch/sweep.py.
    """
    path = options.config
    runs = plan_runs(study, path, options.base, options.overrides)
    for run in runs:
        if run.config.launch.cluster == "slurm":
            raise configuration.ConfigError(
                "launch.cluster: slurm cannot be used for a study, whose runs start one after the "
                "other on this machine; leave it out"
            )
        local.check_no_hosts(run.config)
        slurm.check_no_slurm_keys(run.config, run.overrides)
    if options.list:
        print("\n".join(run.config.output for run in runs))
        return 0
    check_finished(runs)
    status = 0 if options.table_only else run_all(runs)
    if status == STOPPED:
        return status
    folder = Path(runs[0].config.output).parent
    finished = [(run.variant, run.config) for run in runs if run.is_evaluated()]
    if not finished:
        print(
            f"error: {folder}: no run of this study has been evaluated, so no table was written; "
            "run the study first",
            file=sys.stderr,
        )
        return USER_ERROR if options.table_only else 1
    comparison = study_table.Comparison(
        study.title,
        study.columns,
        finished,
        study.plot_against,
        missing=[(run.variant, run.config) for run in runs if not run.is_evaluated()],
        variants=[variant.name for variant in study.runs],
    )
    command = _portable_command(path, options.base, options.overrides)
    table = options.table or folder / f"{Path(path).stem}.md"
    files = write_page(study, comparison, command, table)
    print(f"wrote {table} and {', '.join(file.name for file in files if file != table)}")
    return status


def write_page(
    study: Study, comparison: study_table.Comparison, command: str, table: Path
) -> list[Path]:
    """Write the table and the plots of a study, and return the paths of the files."""
    table.parent.mkdir(parents=True, exist_ok=True)
    plots = [table.with_suffix(".png")]
    study_plot.draw(comparison, plots[0])
    if study.spectrum:
        path = table.with_name(f"{table.stem}_spectrum.png")
        plots += [path] if study_spectrum.draw(comparison, path) else []
    if study.curves:
        plots.append(table.with_name(f"{table.stem}_curves.png"))
        study_curves.draw(comparison, study.curve_metrics, plots[-1])
    return [*study_table.write(comparison, command, table, plots), *plots]


def _portable_command(path: str, base: str | None, overrides: Sequence[str]) -> str:
    """Return the study's command without this machine's paths and settings."""
    pairs = [override.partition("=")[::2] for override in overrides]
    portable_overrides = [
        f"{key}={Path(value).name if key == 'data.root' else value}"
        for key, value in pairs
        if key != "output" and not key.startswith(("launch.", "log."))
    ]
    base_option = ["--base", base] if base else []
    return shlex.join([program.SCRIPT, "sweep", path, *base_option, *portable_overrides])
