"""Table and plot of a study, with the mean and standard deviation of each variant over seeds."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Any

from ssl_pretrain.config import RunConfig
from ssl_pretrain.eval import results
from ssl_pretrain.monitoring import records
from ssl_pretrain.system import markdown

RAW_PIXELS = "raw pixels"  # name of a reference row, which is the same for all variants
BLUE, RED = "#1f5fa8", "#c8443c"


class RunResults:
    """Evaluation results and training records of one run."""

    def __init__(self, run: Path):
        # Metrics by evaluation, and then by row.
        self.tables: dict[str, dict[str, dict[str, float]]] = {
            result["name"]: {row["features"]: row["metrics"] for row in result["rows"]}
            for result in results.load_newest(run)
        }
        self.records = records.read(run / "metrics.jsonl")

    def minutes(self) -> float:
        """Return the minutes from the first record to the last."""
        return float(self.records[-1]["time"] - self.records[0]["time"]) / 60

    def last_value(self, metric: str) -> float:
        """Return the last value of a training metric, or NaN if there is none."""
        values = [record[metric] for record in self.records if metric in record]
        return float(values[-1]) if values else float("nan")

    def gain_over_random(self, evaluation: str, metric: str) -> float:
        """Return the gain in accuracy over the better random backbone, in points."""
        rows = self.tables[evaluation]
        return rows["pretrained"][metric] - rows[results.BETTER_RANDOM][metric]


@dataclass(frozen=True)
class Column:
    """A column of the table, with one number per run."""

    help: str
    evaluation: str  # evaluation that reports the number, or empty for training records
    metric: str = ""  # column of that evaluation
    row: str = "pretrained"  # row of that evaluation
    compute: Callable[[RunResults], float] | None = None  # replaces the lookup

    def value(self, run: RunResults) -> float:
        """Return the column's number for a run."""
        if self.compute is not None:
            return self.compute(run)
        return run.tables[self.evaluation][self.row][self.metric]


def _gain_column(evaluation: str, metric: str) -> Column:
    return Column(
        "gain in test accuracy over the better random backbone, in percentage points",
        evaluation,
        compute=lambda run: run.gain_over_random(evaluation, metric),
    )


DEFAULT_COLUMNS = {
    "linear, %": Column(
        "test accuracy of a linear classifier on frozen features, with the learning rate chosen "
        "on held-out training images",
        "linear",
        "all labels",
    ),
    "top-5 of all, %": Column(
        "share of the five largest eigenvalues in the covariance of embeddings of length 1",
        "spectrum",
        "embeddings, top-5 of all",
    ),
    "effective rank": Column(
        "exponential of the entropy of the eigenvalues' shares", "spectrum", "embeddings, rank"
    ),
    "variance, %": Column(
        "sum of the eigenvalues, which is 100 for embeddings spread over the whole sphere and 0 "
        "for a single point",
        "spectrum",
        "embeddings, variance",
    ),
    "features' top-5, %": Column(
        "the same share for features", "spectrum", "features, top-5 of all"
    ),
    "features' rank": Column("the effective rank of features", "spectrum", "features, rank"),
}
COLUMNS = DEFAULT_COLUMNS | {
    "k-NN, %": Column("test accuracy of weighted k-NN on frozen features", "knn", "clean"),
    "raw pixels, %": Column(
        "test accuracy of weighted k-NN on raw pixels", "knn", "clean", row=RAW_PIXELS
    ),
    "random backbone, %": Column(
        "test accuracy of weighted k-NN on features of the better random backbone",
        "knn",
        "clean",
        row=results.BETTER_RANDOM,
    ),
    "k-NN above random": _gain_column("knn", "clean"),
    "linear above random": _gain_column("linear", "all labels"),
    "attentive, %": Column(
        "test accuracy of one attention query and a linear classifier on frozen patch tokens, with "
        "the learning rate chosen on held-out training images",
        "attentive",
        "all labels",
    ),
    "attentive above random": _gain_column("attentive", "all labels"),
    "RankMe": Column(
        "effective rank of the embeddings at the end of training",
        "",
        compute=lambda run: run.last_value("rankme"),
    ),
    "k-NN in the run, %": Column(
        "last accuracy of weighted k-NN on held-out training images during training",
        "",
        compute=lambda run: 100 * run.last_value("knn"),
    ),
    "minutes": Column(
        "time from the first training record to the last", "", compute=RunResults.minutes
    ),
}


@dataclass
class Comparison:
    """The finished runs of a study, with one number per run and column."""

    title: str
    columns: list[str]
    runs: list[tuple[str, RunConfig]]  # variant and configuration of each run
    plot_against: str = ""  # numeric key on the x-axis, or empty for one bar per variant

    def __post_init__(self) -> None:
        self.results_by_variant: dict[str, list[RunResults]] = {}
        # Numbers of each run by column, and the same grouped by variant
        self.numbers: list[dict[str, float]] = []
        self.numbers_by_variant: dict[str, list[dict[str, float]]] = {}
        for variant, config in self.runs:
            run = RunResults(Path(config.output))
            self.results_by_variant.setdefault(variant, []).append(run)
            self.numbers.append({name: COLUMNS[name].value(run) for name in self.columns})
            self.numbers_by_variant.setdefault(variant, []).append(self.numbers[-1])


def has_reference_rows(config: RunConfig) -> bool:
    """Return True if the run's linear evaluation includes raw pixels."""
    return RAW_PIXELS in RunResults(Path(config.output)).tables.get("linear", {})


def write(
    comparison: Comparison,
    missing_variants: Sequence[str],
    command: str,
    path: Path,
    plots: Sequence[Path],
) -> None:
    """Write the table as a Markdown file that shows the plots.

    Args:
        comparison: One or more finished runs.
        missing_variants: Variants with unfinished runs, listed below the table.
        command: The study's command, shown above the table.
        path: Path of the Markdown file.
        plots: Images in the same folder.
    """
    assert comparison.runs, "a table needs a finished run"
    rows = [
        [variant, len(runs), *(_format_cell(runs, column) for column in comparison.columns)]
        for variant, runs in comparison.numbers_by_variant.items()
    ]
    blocks = [
        f"# {comparison.title}",
        f"Command: `{command}`",
        describe(comparison),
        markdown.table(["run", "seeds", *comparison.columns], rows),
        *([f"Not run: {', '.join(missing_variants)}."] if missing_variants else []),
        *(f"![{comparison.title}]({plot.name})" for plot in plots),
    ]
    path.write_text("\n\n".join(blocks) + "\n")


def describe(comparison: Comparison) -> str:
    """Describe the runs, the columns and the reference rows in one paragraph."""
    variants_by_settings: dict[str, list[str]] = {}
    for variant in comparison.numbers_by_variant:
        config = next(config for name, config in comparison.runs if name == variant)
        variants_by_settings.setdefault(_describe_settings(config), []).append(variant)
    shared = max(variants_by_settings, key=lambda text: len(variants_by_settings[text]))
    has_shared = len(variants_by_settings) == 1 or len(variants_by_settings[shared]) > 1
    sentences = [
        f"{shared}." if has_shared else "",
        *(
            f"{', '.join(variants)}: {text}."
            for text, variants in variants_by_settings.items()
            if not has_shared or text != shared
        ),
        *(f"{name}: {COLUMNS[name].help}." for name in comparison.columns),
        _reference_sentence(comparison) if has_shared else "",
        "± is the standard deviation over seeds.",
    ]
    return " ".join(filter(None, sentences))


def _describe_settings(config: RunConfig) -> str:
    subset = f"{config.data.subset:,} images of " if config.data.subset else ""
    return (
        f"{config.backbone.name}, {subset}{config.data.source}, batch {config.global_batch_size}, "
        f"{config.epochs} epochs, {config.optim.name}"
    )


def _reference_sentence(comparison: Comparison) -> str:
    """Return a sentence about the reference rows, or "" if no run has evaluated them."""
    name = comparison.columns[0]
    column = COLUMNS[name]
    for run in chain.from_iterable(comparison.results_by_variant.values()):
        table = run.tables.get(column.evaluation, {})
        if {RAW_PIXELS, results.BETTER_RANDOM} <= table.keys():
            return (
                f"{name}: raw pixels reach {table[RAW_PIXELS][column.metric]:.1f}, "
                f"the random backbone {table[results.BETTER_RANDOM][column.metric]:.1f}."
            )
    return ""


def _format_cell(runs: Sequence[dict[str, float]], column: str) -> str:
    """Format a column's mean over a variant's runs, with their standard deviation if possible."""
    values = [numbers[column] for numbers in runs]
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def draw_plot(comparison: Comparison, path: Path) -> None:
    """Plot the first two columns, as curves over `plot_against` or as one bar per variant."""
    from matplotlib.figure import Figure

    height = max(3.4, 0.25 * len(comparison.numbers_by_variant))  # inches
    figure = Figure(figsize=(9, height), layout="constrained")
    columns = comparison.columns[:2]
    panels = figure.subplots(1, len(columns), sharey=not comparison.plot_against, squeeze=False)[0]
    for panel, column, color in zip(panels, columns, (BLUE, RED)):
        if comparison.plot_against:
            _draw_curve(panel, comparison, column, color)
        else:
            _draw_bars(panel, comparison, column, color)
        panel.set_title(column, fontsize=11)
        panel.grid(alpha=0.3, axis="y" if comparison.plot_against else "x")
        panel.spines[["top", "right"]].set_visible(False)
    if not comparison.plot_against:
        panels[0].invert_yaxis()
    figure.savefig(path, dpi=130)


def _draw_curve(panel: Any, comparison: Comparison, column: str, color: str) -> None:
    """Draw the mean over seeds as a curve and every run as a point."""
    values_by_x: dict[float, list[float]] = {}
    read_x = attrgetter(comparison.plot_against)
    for (_, config), numbers in zip(comparison.runs, comparison.numbers):
        values_by_x.setdefault(float(read_x(config)), []).append(numbers[column])
    ticks = sorted(values_by_x)
    panel.plot(ticks, [statistics.mean(values_by_x[x]) for x in ticks], color=color)
    points = [(x, y) for x in ticks for y in values_by_x[x]]
    panel.plot(*zip(*points), "o", color=color, markersize=5)
    panel.set_xscale("log")
    panel.set_xticks(ticks, [f"{x:g}" for x in ticks])
    panel.minorticks_off()
    panel.set_xlabel(comparison.plot_against)


def _draw_bars(panel: Any, comparison: Comparison, column: str, color: str) -> None:
    """Draw the mean over seeds as a bar and every run as a point."""
    for variant, runs in comparison.numbers_by_variant.items():
        values = [numbers[column] for numbers in runs]
        panel.barh(variant, statistics.mean(values), color=color, alpha=0.75)
        panel.plot(values, [variant] * len(values), "k.", markersize=4)
