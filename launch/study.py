"""A question asked of several runs, from a YAML of configs/sweeps/: pretrains, evaluates, ends in a table and a plot."""

from __future__ import annotations

import re
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssl_pretrain import config as configuration
from ssl_pretrain import schema
from ssl_pretrain.config import ConfigError, RunConfig
from ssl_pretrain.eval import results
from ssl_pretrain.launch import local, methods, pretrain, slurm
from ssl_pretrain.system import markdown
from ssl_pretrain.system.exit_status import STOPPED

BESIDE = ("raw pixels", results.BETTER_RANDOM)
ACCURACY, SHARE = "linear, %", "top-5 of all, %"
COLUMNS = {  # column -> (evaluation, its column)
    ACCURACY: ("linear", "all labels"),
    SHARE: ("spectrum", "embeddings, top-5 of all"),
    "effective rank": ("spectrum", "embeddings, rank"),
    "variance, %": ("spectrum", "embeddings, variance"),
    "features' top-5, %": ("spectrum", "features, top-5 of all"),
    "features' rank": ("spectrum", "features, rank"),
}


@dataclass
class OneRun:
    """A row of the table: what it is called, and what it sets."""

    name: str = "???"
    set: list[str] = field(default_factory=list)


@dataclass
class Study:
    """What a YAML of configs/sweeps/ holds."""

    title: str = ""
    base: str = "configs/methods_digits.yaml"
    set: list[str] = field(default_factory=list)
    small_heads: bool = False
    plot_against: str = ""  # a numeric key: curves over it; empty: a bar for each run
    runs: list[OneRun] = field(default_factory=list)


Planned = tuple[
    str, RunConfig, list[str]
]  # (row of the table, the run's config, the overrides that make it of the base)


def load(path: str | Path) -> Study | None:
    """The study of a YAML; None for a YAML that is a run's configuration.

    Raises:
        ConfigError: a key that a study does not have, or a study without runs.
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
    if not study.runs:
        raise ConfigError(f"{path}: runs: is empty; give each a name and what it sets")
    return study


def plan(
    study: Study, path: str | Path, base: str | None, overrides: Sequence[str]
) -> list[Planned]:
    """Every run of the study, in the table's order, once a seed. `overrides` are of all runs; seed=0,1,2 makes three of each."""
    base = base or study.base
    given = dict(override.partition("=")[::2] for override in overrides)
    seeds = given.pop("seed", "0").split(",")
    folder = given.pop("output", f"runs/{Path(path).stem}_{Path(base).stem}")
    planned = []
    for run in study.runs:
        own = [*study.set, *run.set]
        name = next(
            (
                value.partition("=")[2]
                for value in reversed(own)
                if value.startswith("method.name=")
            ),
            "",
        )
        heads = methods.overrides_of(name) if study.small_heads and name else []
        for seed in seeds:
            slug = re.sub(r"[^a-z0-9.]+", "_", run.name.lower()).strip("_")
            every = [
                *heads, *own, *(f"{key}={value}" for key, value in given.items()),
                f"seed={seed}", f"output={folder}/{slug}_{seed}", "evaluation.at_end=[linear,spectrum]",
            ]  # fmt: skip
            planned.append((run.name, configuration.load(base, every), every))
    return planned


class Stopped(Exception):
    """The study was asked to stop."""


def run_all(planned: Sequence[Planned], base: str) -> list[str]:
    """Pretrains and evaluates what is not done; the folders of those that failed.

    Raises:
        Stopped: a run was asked to stop, and so no further one is started.

    Raw pixels and the random backbone are judged once, of the first run of each seed: they are the same in all.
    """
    failed = []
    compared = {
        config.seed
        for _, config, _ in planned
        if done(config) and BESIDE[0] in read(Path(config.output))
    }
    for number, (name, config, overrides) in enumerate(planned, start=1):
        if done(config):
            continue
        print(f"=== {number} of {len(planned)}: {name}, seed {config.seed}", flush=True)
        options = {"linear": ["--rows", "pretrained"]} if config.seed in compared else {}
        status = pretrain.pretrain_and_evaluate(config, base, overrides, options)[0]
        if status == STOPPED:
            raise Stopped(
                f"stopped in run {number} of {len(planned)}; the same command goes on from there"
            )
        if status:
            failed.append(config.output)
        else:
            compared.add(config.seed)
    return failed


def done(config: RunConfig) -> bool:
    return all(
        (Path(config.output) / "eval" / f"{name}.json").exists() for name in ("linear", "spectrum")
    )


def write(study: Study, planned: Sequence[Planned], command: str, table: Path) -> None:
    """The table as Markdown at `table`, and beside it the plot, a PNG of the same name."""
    finished = [
        (name, config, read(Path(config.output))) for name, config, _ in planned if done(config)
    ]
    table.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"# {study.title}", "", f"Command: `{command}`", ""]
    assert finished, "a table without rows is not written"
    rows: dict[str, list[dict[str, float]]] = {}
    for name, _, numbers in finished:
        rows.setdefault(name, []).append(numbers)
    cells = [
        [name, len(seeds), *(cell(seeds, column) for column in COLUMNS)]
        for name, seeds in rows.items()
    ]
    lines += [
        *about(finished[0][1], rows),
        "",
        markdown.table(["run", "seeds", *COLUMNS], cells),
    ]
    missing = [name for name, config, _ in planned if not done(config)]
    if missing:
        lines += ["", f"Not run: {', '.join(dict.fromkeys(missing))}."]
    picture = table.with_suffix(".png")
    draw(study, finished, rows, picture)
    table.write_text("\n".join([*lines, "", f"![{study.title}]({picture.name})"]) + "\n")


def about(config: RunConfig, rows: dict[str, list[dict[str, float]]]) -> list[str]:
    beside = {
        row: seed[row] for seeds in rows.values() for seed in seeds for row in BESIDE if row in seed
    }
    images = (
        f"{config.data.subset:,} images of {config.data.source}"
        if config.data.subset
        else config.data.source
    )
    return [
        f"{config.backbone.name}, {images}, batch {config.global_batch_size}, {config.epochs} epochs. {ACCURACY}: a linear classifier on "
        f"frozen features, learning rate chosen on held-out training images, accuracy on the test images; raw pixels reach "
        f"{beside['raw pixels']:.1f}, the random backbone {beside[results.BETTER_RANDOM]:.1f}. {SHARE}: of the covariance of embeddings scaled to "
        "length 1, the share of the five largest eigenvalues in the sum of all; effective rank: exp of the entropy of the eigenvalues' "
        "shares; variance: the sum itself, 100 for embeddings all over the sphere, 0 for one point. The same of features in the last two "
        "columns. ± is the deviation over seeds."
    ]


def read(run: Path) -> dict[str, float]:
    """The numbers of a run's row, and linear accuracy of raw pixels and the random backbone where this run judged them."""
    found = {
        result["name"]: {row["features"]: row["metrics"] for row in result["rows"]}
        for result in results.load(run)
    }
    numbers = {column: found[name]["pretrained"][key] for column, (name, key) in COLUMNS.items()}
    return numbers | {
        row: found["linear"][row]["all labels"] for row in BESIDE if row in found["linear"]
    }


def cell(seeds: Sequence[dict[str, float]], column: str) -> str:
    values = [seed[column] for seed in seeds]
    return f"{statistics.mean(values):.1f}" + (
        f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    )


def draw(
    study: Study,
    finished: Sequence[tuple[str, RunConfig, dict[str, float]]],
    rows: dict[str, list[dict[str, float]]],
    path: Path,
) -> None:
    """Two panels, accuracy and the top-5 share: curves with every seed's point over `plot_against`, or a bar for each run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(1, 2, sharey=not study.plot_against)
    for panel, column, colour in zip(panels, (ACCURACY, SHARE), ("#1f5fa8", "#c8443c")):
        if study.plot_against:
            points = [
                (float(value_at(config, study.plot_against)), numbers[column])
                for _, config, numbers in finished
            ]
            places = sorted({x for x, _ in points})
            panel.plot(
                places,
                [statistics.mean(y for x, y in points if x == place) for place in places],
                color=colour,
            )
            panel.plot(
                [x for x, _ in points], [y for _, y in points], "o", color=colour, markersize=5
            )
            panel.set_xscale("log")
            panel.set_xticks(places, [f"{place:g}" for place in places])
            panel.minorticks_off()
            panel.set_xlabel(study.plot_against)
        else:
            names = list(rows)
            values = [[seed[column] for seed in rows[name]] for name in names]
            panel.barh(names, [statistics.mean(each) for each in values], color=colour, alpha=0.75)
            panel.plot(
                [value for each in values for value in each],
                [name for name, each in zip(names, values) for _ in each],
                "k.",
                markersize=4,
            )
        panel.set_title(column, fontsize=11)
        panel.grid(alpha=0.3, axis="y" if study.plot_against else "x")
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    if not study.plot_against:
        panels[0].invert_yaxis()
    figure.savefig(path, dpi=130)


def value_at(config: RunConfig, key: str) -> Any:
    """The value of a dotted key."""
    found: Any = config
    for part in key.split("."):
        found = getattr(found, part)
    return found


def check_local(config: RunConfig, overrides: Sequence[str]) -> None:
    """Raise ConfigError for keys of a cluster: the runs of a study follow each other on this machine."""
    if config.launch.cluster == "slurm":
        raise ConfigError(
            "launch.cluster: slurm: these runs follow each other on this machine; leave it out"
        )
    local.check_one_machine(config)
    slurm.check_here(config, overrides)


def main(
    study: Study,
    path: str,
    base: str | None,
    overrides: Sequence[str],
    table: Path | None,
    only: str,
) -> int:
    """`only`: "" runs all, "list" names the runs, "table" writes the table of those that are there."""
    planned = plan(study, path, base, overrides)
    for _, config, every in planned:
        check_local(config, every)
    if only == "list":
        print("\n".join(config.output for _, config, _ in planned))
        return 0
    try:
        failed = [] if only == "table" else run_all(planned, base or study.base)
    except Stopped as stopped:
        print(stopped, flush=True)
        return STOPPED
    if not any(done(config) for _, config, _ in planned):
        place = Path(planned[0][1].output).parent
        print(
            f"error: {place}: no run of this study has been evaluated, so no table was written; run it first",
            file=sys.stderr,
        )
        return 2 if only == "table" else 1
    table = table or Path(planned[0][1].output).parent / f"{Path(path).stem}.md"
    shown = [
        override
        for override in overrides
        if not override.startswith(("output=", "launch.", "log."))
    ]
    command = shlex.join(
        [
            "python",
            "launch/sweep.py",
            path,
            *(["--base", base] if base else []),
            *(_plain(override) for override in shown),
        ]
    )
    write(study, planned, command, table)
    print(
        f"{table} and {table.with_suffix('.png').name}"
        + (f"; failed: {', '.join(failed)}" if failed else "")
    )
    if failed:
        print(f"error: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _plain(override: str) -> str:
    """A path of this machine is no part of the command that a table shows."""
    key, _, value = override.partition("=")
    return f"{key}={Path(value).name}" if key == "data.root" else override
