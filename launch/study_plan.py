"""Read the YAML of a study, and plan one run per variant and seed."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ssl_pretrain import config as configuration
from ssl_pretrain import methods, schema
from ssl_pretrain.checkpoint.folder import is_finished
from ssl_pretrain.launch import study_columns


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
    every_method: bool = False  # add one variant per method of images alone
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
        method_variants = [
            Variant(name, [f"method.name={name}"]) for name in methods.image_methods()
        ]
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

    Raises:
        ConfigError: If a seed is no number or given twice, two variants have one output folder, or
            `plot_against` is not a number of the configuration.
    """
    shared_settings = dict(override.partition("=")[::2] for override in overrides)
    seeds = _parse_seeds(shared_settings.pop("seed", ",".join(map(str, study.seeds))))
    has_own_bases = base is None and any(variant.base for variant in study.runs)
    base_name = "" if has_own_bases else f"_{Path(base or study.base).stem}"
    folder = shared_settings.pop("output", f"runs/{Path(path).stem}{base_name}")
    runs = []
    for variant in study.runs:
        variant_base = base or variant.base or study.base
        slug = re.sub(r"[^\w.]+", "_", variant.name.lower()).strip("_")
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
        runs.sort(key=lambda run: seeds.index(run.config.seed))  # a stable sort
    _check_outputs(runs, path)
    if study.plot_against:
        _check_axis(study.plot_against, runs, path)
    return runs


def _parse_seeds(text: str) -> list[int]:
    try:
        seeds = [int(seed) for seed in text.split(",")]
    except ValueError:
        seeds = []
    if not seeds or len(set(seeds)) < len(seeds):
        raise configuration.ConfigError(
            f"seed: {text!r} is not a list of distinct whole numbers; give such as seed=0,1,2"
        )
    return seeds


def _check_outputs(runs: Sequence[PlannedRun], path: str | Path) -> None:
    """Refuse variants that would write into one folder."""
    owners: dict[str, str] = {}
    for run in runs:
        owner = owners.setdefault(run.config.output, run.variant)
        if owner != run.variant:
            raise configuration.ConfigError(
                f"{path}: runs: {owner!r} and {run.variant!r} have the same output "
                f"{run.config.output}; give them names that differ in letters or digits"
            )


def _check_axis(key: str, runs: Sequence[PlannedRun], path: str | Path) -> None:
    """Refuse an x-axis that the table could not draw after all runs are trained."""
    for run in runs:
        value = schema.flatten(configuration.to_dict(run.config)).get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise configuration.ConfigError(
                f"{path}: plot_against: {key} is {value!r} for {run.variant!r}; give a key that is "
                "a number in every run, such as method.temperature"
            )


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
