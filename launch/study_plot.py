"""Plot the first columns of a study's table, beside raw pixels and the random backbone."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ssl_pretrain.eval.table_text import deviation, mean
from ssl_pretrain.launch import study_style
from ssl_pretrain.launch.study_table import Comparison, describe_deviation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_PANELS = 2
MIN_POINTS = (
    10.0  # smallest range of an axis in percent, so that noise does not look like an effect
)


def draw(comparison: Comparison, path: Path) -> None:
    """Plot the first two columns, over `plot_against` or with one row per variant.

    Points are means over seeds, with the standard deviation as an error bar. Small points are the
    runs. No bar is drawn, so an axis need not start at 0, and its label says if it does not.
    """
    columns = comparison.columns[:MAX_PANELS]
    is_curve = bool(comparison.plot_against)
    height = 3.8 if is_curve else max(3.0, 1.4 + 0.32 * len(comparison.variants))
    figure = study_style.build_figure(height)
    panels = figure.subplots(1, len(columns), sharey=not is_curve, squeeze=False)[0]
    for number, (panel, column) in enumerate(zip(panels, columns)):
        color = study_style.COLORS[number]
        if is_curve:
            _draw_against(panel, comparison, column, color)
        else:
            _draw_rows(panel, comparison, column, color)
        study_style.clean(panel, column)
    if not is_curve:
        panels[0].invert_yaxis()
    study_style.save(figure, path, describe_deviation(comparison, "Error bars"), panels)


def axis_range(
    column: str, numbers: Sequence[float], has_references: bool = True
) -> tuple[float, float]:
    """Return the range of an axis that shows all numbers and does not exaggerate differences.

    A percentage has a range of at least `MIN_POINTS`, inside 0 to 100. Other numbers, and those
    without references to compare with, start at 0.
    """
    finite = [number for number in numbers if math.isfinite(number)] or [0.0]
    low, high = min(finite), max(finite)
    if not column.endswith("%") or not has_references:
        return min(0.0, 1.1 * low), max(0.0, 1.1 * high) or 1.0
    margin = max(0.1 * (high - low), (MIN_POINTS - (high - low)) / 2, 1.0)
    start, end = low - margin, high + margin
    if start < 0 or high - low > 40:  # a wide range costs nothing by starting at 0
        start = min(0.0, start if low < 0 else 0.0)
    if low >= 0 and high <= 100:
        end = min(end, 102.0)  # a point at 100 is not cut off
    return start, max(end, start + MIN_POINTS)


def _label(column: str, limits: tuple[float, float]) -> str:
    """Return the label of an axis, which names its range unless it starts at 0."""
    if limits[0] <= 0:
        return column
    return f"{column} (axis from {limits[0]:.0f} to {limits[1]:.0f})"


def _limits(comparison: Comparison, column: str) -> tuple[float, float]:
    """Return the range of a column's axis, which shows the ends of the error bars too."""
    references = comparison.references(column)
    groups = [comparison.values(variant, column) for variant in comparison.variants]
    groups += references.values()
    ends = []
    for values in groups:
        spread = deviation(values)
        if math.isfinite(spread):
            ends += [mean(values) - spread, mean(values) + spread]
    numbers = [*(value for values in groups for value in values), *ends]
    return axis_range(column, numbers, has_references=bool(references))


def _draw_against(panel: "Axes", comparison: Comparison, column: str, color: str) -> None:
    """Draw the mean over seeds over a numeric key on a logarithmic axis."""
    variants = [variant for variant in comparison.variants if comparison.results_of(variant)]
    ticks = [comparison.x[variant] for variant in variants]
    for x, variant in zip(ticks, variants):
        values = comparison.values(variant, column)
        panel.plot([x] * len(values), values, ".", color="#555555", markersize=4, zorder=3)
    samples = [comparison.values(variant, column) for variant in variants]
    bars = [deviation(values) for values in samples]
    panel.errorbar(
        ticks,
        [mean(values) for values in samples],
        yerr=bars if any(map(math.isfinite, bars)) else None,
        fmt="o-",
        color=color,
        capsize=4,
        linewidth=1.5,
    )
    for name, values in comparison.references(column).items():
        study_style.draw_reference(panel.axhline, mean(values), name)
    limits = _limits(comparison, column)
    panel.set_ylim(*limits)
    panel.set_ylabel(_label(column, limits))
    panel.set_xscale("log" if min(ticks) > 0 else "linear")
    panel.set_xticks(ticks, [f"{x:g}" for x in ticks])
    panel.minorticks_off()
    panel.set_xlabel(comparison.plot_against.rpartition(".")[2])


def _draw_rows(panel: "Axes", comparison: Comparison, column: str, color: str) -> None:
    """Draw the mean over seeds of each variant in a row of its own."""
    for row, variant in enumerate(comparison.variants):
        values = comparison.values(variant, column)
        if not values:
            panel.text(0.02, row, "not run", transform=panel.get_yaxis_transform(), va="center")
            continue
        panel.plot(values, [row] * len(values), ".", color="#555555", markersize=4, zorder=3)
        spread = deviation(values)
        panel.errorbar(
            [mean(values)],
            [row],
            xerr=[spread] if math.isfinite(spread) else None,
            fmt="o",
            color=color,
            capsize=4,
        )
    for name, values in comparison.references(column).items():
        study_style.draw_reference(panel.axvline, mean(values), name)
    limits = _limits(comparison, column)
    panel.set_xlim(*limits)
    panel.set_xlabel(_label(column, limits))
    panel.set_yticks(range(len(comparison.variants)), comparison.variants)
    panel.set_ylim(-0.5, len(comparison.variants) - 0.5)
