"""Charts of a run's metrics. Metrics without information are listed in words instead."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssl_pretrain.eval.html import axes, charts, page, run_files
from ssl_pretrain.eval.html.charts import Guides, Points
from ssl_pretrain.eval.html.colors import color
from ssl_pretrain.eval.html.run_files import Record
from ssl_pretrain.monitoring import healthy_ranges, metric_names

NUM_SPECTRA = 4  # curves in one chart, from the first spectrum to the last
MAX_SPARSE_POINTS = 60  # curves of k-NN up to this length have markers
PROPORTIONAL_TOLERANCE = 1e-4  # relative to the largest value
MIN_PROPORTIONAL_POINTS = 3


@dataclass(frozen=True)
class ChartGroup:
    """The charts of one group of metrics."""

    name: str
    figures: list[page.Figure]
    notes: list[str]  # sentences about the metrics without a chart of their own


def draw_groups(run_path: Path, metrics: list[Record]) -> list[ChartGroup]:
    """Draw the curves of each group, with the spectra and spreads of the embeddings over time."""
    groups = draw_run_groups({"": metrics}, run_path.resolve().name)
    embedding_figures = draw_embedding_figures(run_files.read_metrics(run_path, "plots.jsonl"))
    if not embedding_figures:
        return groups
    names = [group.name for group in groups]
    if metric_names.COLLAPSE in names:
        groups[names.index(metric_names.COLLAPSE)].figures.extend(embedding_figures)
        return groups
    return [*groups, ChartGroup(metric_names.COLLAPSE, embedding_figures, [])]


def draw_run_groups(
    metrics: Mapping[str, list[Record]], file_prefix: str, colors: Sequence[str] = ()
) -> list[ChartGroup]:
    """Draw the curves of one or more runs in shared charts, grouped by the metrics' groups.

    Args:
        metrics: Records of each run by its name.
        file_prefix: Start of the names of downloaded files.
        colors: Color of each run. Default: those of the palette.
    """
    epochs = [r["epoch"] for records in metrics.values() for r in records if "epoch" in r]
    x_range = (0.0, max(epochs, default=1.0))
    groups = []
    for group in metric_names.GROUPS:
        keys = [
            key for records in metrics.values() for key in run_files.recorded_keys(records, group)
        ]
        curves_by_key = {
            key: {name: run_files.metric_points(records, key) for name, records in metrics.items()}
            for key in dict.fromkeys(keys)
        }
        drawn, notes = _select_informative(curves_by_key)
        figures = [
            draw_metric(key, curves_by_key[key], file_prefix, x_range, colors) for key in drawn
        ]
        if figures or notes:
            groups.append(ChartGroup(group, figures, notes))
    return groups


def draw_metric(
    key: str,
    series: Mapping[str, Points],
    file_prefix: str,
    x_range: tuple[float, float],
    colors: Sequence[str] = (),
) -> page.Figure:
    """Draw the curves of one metric, with its healthy range and the limit of its alert."""
    info = metric_names.metric_info(key)
    factor = 100 if info.is_percentage else 1
    healthy, limit = healthy_ranges.healthy_range(key), healthy_ranges.ALERT_LIMITS.get(key)
    scale = healthy_ranges.WHOLE_SCALES.get(key)
    is_log = key.startswith(("gradient_norm", healthy_ranges.UPDATE_RATIO_PREFIX))
    guides = Guides(
        healthy=healthy.scaled(factor) if healthy else None,
        alert_below=factor * limit if limit is not None else None,
        scale=(factor * scale.low, factor * scale.high) if scale else None,
        is_log=is_log and _spans_decades(series),
        x_range=x_range,
    )
    remarks = [info.description] if info.description else []
    if guides.healthy:
        unit = " %" if info.is_percentage else ""
        text = f"Healthy: {guides.healthy}{unit}"
        remarks.append(f"{text}, alert below {limit:g}" if limit is not None else text)
    if guides.is_log:
        remarks.append("Logarithmic axis")
    longest = max(map(len, series.values()))
    if longest > charts.MAX_POINTS:
        remarks.append(f"{charts.MAX_POINTS} means of {longest:,} records")
    is_sparse = key in ("knn", "probe") and longest <= MAX_SPARSE_POINTS
    title = metric_title(key)
    chart = charts.line_chart(series, title, has_markers=is_sparse, guides=guides, colors=colors)
    return page.Figure(
        chart,
        title,
        note=". ".join(map(page.capitalize, remarks)),
        reading=_describe_reading(series, info.is_percentage) if len(series) == 1 else "",
        file_name=f"{file_prefix}_{key}",
    )


def metric_title(key: str) -> str:
    """Return the title of a metric's chart with its unit."""
    info = metric_names.metric_info(key)
    return page.capitalize(info.title) + (", %" if info.is_percentage else "")


def _describe_reading(series: Mapping[str, Points], is_percentage: bool) -> str:
    """Return the last value of the only curve."""
    (points,) = series.values()
    return f"{axes.format_value(points[-1][1])}{' %' if is_percentage else ''}"


def _spans_decades(series: Mapping[str, Points]) -> bool:
    values = [value for points in series.values() for _, value in points]
    return min(values) > 0 and max(values) >= 10 * min(values)


def _select_informative(
    curves_by_key: Mapping[str, Mapping[str, Points]],
) -> tuple[list[str], list[str]]:
    """Return the metrics to draw, and sentences about the others.

    A curve is not drawn if it is constant, has a single point, or is proportional to an earlier
    one and has no healthy range.
    """
    drawn: list[str] = []
    constants, copies = [], []
    for key, series in curves_by_key.items():
        curves = [np.array(points) for points in series.values() if len(points)]
        if not curves:
            continue
        title = metric_names.metric_info(key).title
        values = np.concatenate(curves)[:, 1]
        if (values == values[0]).all():
            unit = " %" if metric_names.metric_info(key).is_percentage else ""
            constants.append(f"{title} {axes.format_value(float(values[0]))}{unit}")
        elif max(map(len, curves)) == 1 and len(series) == 1:
            constants.append(f"{title} {axes.format_value(float(values[0]))} (measured once)")
        elif not healthy_ranges.healthy_range(key) and (
            copy := next(
                (c for k in drawn if (c := _describe_copy(series, curves_by_key[k], k))), ""
            )
        ):
            copies.append(f"{title} is {copy}")
        else:
            drawn.append(key)
    notes = [f"Constant: {', '.join(constants)}."] if constants else []
    return drawn, [*notes, *(f"{page.capitalize(text)}." for text in copies)]


def _describe_copy(
    series: Mapping[str, Points], other: Mapping[str, Points], other_key: str
) -> str:
    """Describe curves that are proportional to those of another metric, or return ""."""
    points = [np.array(curve).reshape(-1, 2) for curve in series.values()]
    pairs = [
        (curve, np.array(other_curve).reshape(-1, 2))
        for curve, other_curve in zip(points, other.values())
        if len(curve)
    ]
    if any(a.shape != b.shape or (a[:, 0] != b[:, 0]).any() for a, b in pairs):
        return ""
    y, x = (np.concatenate(curves)[:, 1] for curves in zip(*pairs))
    norm = float(x @ x)
    if len(y) < MIN_PROPORTIONAL_POINTS or not norm:
        return ""
    factor = float(x @ y) / norm
    if np.abs(y - factor * x).max() > PROPORTIONAL_TOLERANCE * np.abs(y).max():
        return ""
    title = metric_names.metric_info(other_key).title
    is_equal = abs(factor - 1) < PROPORTIONAL_TOLERANCE
    return f"the same as {title}" if is_equal else f"{axes.format_value(factor, 3)} times {title}"


def evenly_spaced(items: Sequence[Any], max_items: int) -> list[Any]:
    """Return at most `max_items` of the items, including the first and the last."""
    indices = np.linspace(0, len(items) - 1, min(max_items, len(items))).round().astype(int)
    return [items[index] for index in indices]


def series_legend(names: Sequence[str], colors: Sequence[str] = ()) -> tuple[tuple[str, str], ...]:
    """Return the name and the color of each series, as `charts.line_chart` draws them."""
    colors = colors or [color(i, max(2, len(names))) for i in range(len(names))]
    return tuple(dict.fromkeys(zip(names, colors)))


def draw_embedding_figures(plots: list[Record]) -> list[page.Figure]:
    """Draw the spectrum and the spread of the embeddings at evenly spaced steps."""
    spectra, spreads = {}, {}
    for entry in evenly_spaced(plots, NUM_SPECTRA):
        name = f"step {entry['step']:,}"
        spectra[name] = list(zip(entry["spectrum_index"], entry["spectrum"]))
        deviations = entry["deviations"]
        spreads[name] = list(zip(np.linspace(0, 100, len(deviations)), deviations))
    if not spectra:
        return []
    legend = series_legend(list(spectra))
    return [
        page.Figure(
            charts.line_chart(
                spectra, "Covariance spectrum", "number of the eigenvalue", has_log_axes=True
            ),
            "Covariance spectrum of the embeddings",
            legend,
            note="Variance along each principal direction. Logarithmic axes",
            file_name="covariance_spectrum",
        ),
        page.Figure(
            charts.line_chart(spreads, "Spread of the dimensions", "percent of the dimensions"),
            "Spread of each dimension",
            legend,
            note="Standard deviation of each dimension, in ascending order",
            file_name="spread_of_dimensions",
        ),
    ]
