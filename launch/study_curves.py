"""Curves of a study: metrics of every run during its training, one panel per group of variants."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ssl_pretrain.eval import results
from ssl_pretrain.eval.table_text import deviation, mean
from ssl_pretrain.launch import study_style
from ssl_pretrain.launch.study_columns import RunResults
from ssl_pretrain.launch.study_table import Comparison, describe_deviation
from ssl_pretrain.monitoring import metric_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS_PER_ROW = 2  # if there is a single metric
PANEL_HEIGHT = 2.6  # inches
NOT_RECORDED = "not recorded"
TEST_IMAGES = "k-NN on test images"
TEST_IMAGES_RANDOM = "k-NN on test images, random backbone"


def draw(comparison: Comparison, metrics: Sequence[str], path: Path) -> None:
    """Draw metrics during training, as the mean over seeds with a band of one deviation.

    Several metrics are columns of panels, and groups of variants are rows. The panels of a single
    metric are in two columns. If the runs have a k-NN evaluation, a panel of the k-NN accuracy
    shows it at the end of the curves, and that of the random backbone.

    Args:
        comparison: The runs of the study.
        metrics: Names of metrics in `metrics.jsonl`, such as knn or top5_ratio.
        path: Path of the image.
    """
    from matplotlib.ticker import MaxNLocator

    groups = comparison.families()
    num_columns = len(metrics) if len(metrics) > 1 else min(PANELS_PER_ROW, len(groups))
    num_panels = len(metrics) * len(groups)
    num_rows = -(-num_panels // num_columns)
    figure = study_style.build_figure(num_rows * PANEL_HEIGHT + 0.8)
    panels = figure.subplots(num_rows, num_columns, squeeze=False)
    flat_panels = list(panels.flat)
    for panel in flat_panels[num_panels:]:  # free places in the last row
        panel.set_axis_off()
    combinations = [(group, metric) for group in groups for metric in metrics]
    for panel, (group, metric) in zip(flat_panels, combinations):
        _draw_panel(panel, comparison, groups[group], metric)
        info = metric_names.metric_info(metric)
        study_style.clean(panel, group)
        panel.set_ylabel(f"{info.title}, %" if info.is_percentage else info.title, fontsize=9)
        panel.set_xlabel("epoch")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    for metric in metrics:
        _share_limits(
            [panel for panel, (_, name) in zip(flat_panels, combinations) if name == metric]
        )
    has_legends = len(groups) > 1 and any(len(variants) > 1 for variants in groups.values())
    if has_legends:  # each row of panels has lines of its own
        for panel in flat_panels[: num_panels : len(metrics)]:
            if panel.lines:
                panel.legend(fontsize=7, frameon=False)
    note = describe_deviation(comparison, "Bands")
    study_style.save(figure, path, note, [] if has_legends else flat_panels[:num_panels])


def _draw_panel(
    panel: "Axes", comparison: Comparison, variants: Sequence[str], metric: str
) -> None:
    """Draw one metric of a group of variants."""
    is_recorded = False
    for number, variant in enumerate(variants):
        runs = comparison.results_of(variant)
        points = mean_curve(runs, metric)
        if not points:
            continue
        is_recorded = True
        epochs, means, spreads = zip(*points)
        style = study_style.line_style(number)
        label = variant if len(variants) > 1 else "mean over seeds"
        panel.plot(
            epochs,
            means,
            label=label,
            linewidth=1.4,
            color=style.color,
            linestyle=style.linestyle,
        )
        if any(map(math.isfinite, spreads)):
            lower, upper = ([m + sign * s for m, s in zip(means, spreads)] for sign in (-1, 1))
            panel.fill_between(epochs, lower, upper, color=style.color, alpha=0.2, linewidth=0)
        if metric == "knn":
            _draw_test_accuracy(panel, runs, epochs[-1], style.color)
    if not is_recorded:
        panel.text(0.5, 0.5, NOT_RECORDED, transform=panel.transAxes, ha="center", va="center")


def _draw_test_accuracy(
    panel: "Axes", runs: Sequence[RunResults], last_epoch: float, color: str
) -> None:
    """Draw the accuracy on test images after training, if the runs have a k-NN evaluation."""
    tables = [run.tables["knn"] for run in runs if "knn" in run.tables]
    if not tables:
        return
    values = [table["pretrained"]["clean"] for table in tables]
    spread = deviation(values)
    panel.errorbar(
        [last_epoch],
        [mean(values)],
        yerr=[spread] if math.isfinite(spread) else None,
        fmt="o",
        color=color,
        capsize=3,
        label=TEST_IMAGES,
    )
    rows = [table[results.BETTER_RANDOM] for table in tables if results.BETTER_RANDOM in table]
    if rows:
        study_style.draw_reference(
            panel.axhline,
            mean([row["clean"] for row in rows]),
            study_style.RANDOM_BACKBONE,
            TEST_IMAGES_RANDOM,
        )


def mean_curve(runs: Sequence[RunResults], metric: str) -> list[tuple[float, float, float]]:
    """Return the epoch, the mean over runs and their deviation of each record with the metric.

    Only epochs that every run with the metric recorded count. A deviation of one run is NaN.
    """
    scale = 100.0 if metric_names.metric_info(metric).is_percentage else 1.0
    curves = [
        {
            record["epoch"]: scale * record[metric]
            for record in run.records
            if isinstance(record.get(metric), int | float)
        }
        for run in runs
    ]
    curves = [curve for curve in curves if curve]
    epochs = sorted(set.intersection(*map(set, curves))) if curves else []
    samples = [[curve[epoch] for curve in curves] for epoch in epochs]
    return [(epoch, mean(values), deviation(values)) for epoch, values in zip(epochs, samples)]


def _share_limits(panels: Sequence["Axes"]) -> None:
    """Give the panels of a metric one range, which starts at 0 unless there are lower values."""
    recorded = [panel for panel in panels if panel.lines]
    if not recorded:
        return
    low = min(panel.get_ylim()[0] for panel in recorded)
    high = max(panel.get_ylim()[1] for panel in recorded)
    values = [np.asarray(line.get_ydata(), float) for panel in recorded for line in panel.lines]
    lowest = min(line.min() for line in values)
    for panel in recorded:
        panel.set_ylim(low if lowest < 0 else 0.0, high)
