"""Pretrain the variants of a study and compare them. configs/sweeps/ has the studies' YAMLs."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from ssl_pretrain import config as configuration
from ssl_pretrain import schema
from ssl_pretrain.config.resume_policy import resume_policy
from ssl_pretrain.eval import saved_settings
from ssl_pretrain.launch import (
    local,
    pretrain,
    slurm,
    study_columns,
    study_curves,
    study_plan,
    study_plot,
    study_spectrum,
    study_table,
)
from ssl_pretrain.system import program
from ssl_pretrain.system.exit_status import STOPPED, USER_ERROR


def check_finished(runs: Sequence[study_plan.PlannedRun]) -> None:
    """Refuse runs that were finished with other settings than the study has now.

    Raises:
        ConfigError: If a setting that changes the results differs.
    """
    for run in runs:
        if run.is_evaluated():
            saved = schema.flatten(saved_settings.read(Path(run.config.output)))
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


def run_all(runs: Sequence[study_plan.PlannedRun]) -> int:
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


def run_and_compare(study: study_plan.Study, options: argparse.Namespace) -> int:
    """Run a study, write its table and plot, and return the exit status.

    Args:
        study: The study.
        options: Options of launch/sweep.py.
    """
    path = options.config
    runs = study_plan.plan_runs(study, path, options.base, options.overrides)
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
    study: study_plan.Study, comparison: study_table.Comparison, command: str, table: Path
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
