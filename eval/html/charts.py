"""Line charts as inline SVG, with their data embedded.

A chart is complete without JavaScript. `templates/charts.js` adds what reacts to the reader: it
shows the values under the pointer or the keyboard's cursor, and saves the chart as SVG or CSV.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

from ssl_pretrain.eval.html import axes
from ssl_pretrain.eval.html.axes import Axis
from ssl_pretrain.eval.html.colors import color
from ssl_pretrain.monitoring.healthy_ranges import Range

Points = Sequence[tuple[float, float]]

MAX_POINTS = 600  # longer curves are averaged in this many bins
WIDTH, HEIGHT = 400, 216  # units of the drawing; the page scales it
LEFT, RIGHT, TOP, BOTTOM = 54, 390, 12, 178  # the frame, the same in every chart
BASELINE = 4  # from the middle of a line of text to its baseline
LABEL_GAP = 7  # from the frame to the labels of its ticks
MARKER_RADIUS = 2.6


@dataclass(frozen=True)
class Guides:
    """Healthy values, limits and ranges of a chart, in the unit of the vertical axis.

    Attributes:
        healthy: Values of healthy runs, drawn as a band.
        alert_below: Limit of an alert, drawn as a dashed line.
        scale: Range that the vertical axis covers in any case.
        is_log: True for a logarithmic vertical axis, if all values are positive.
        x_range: Range of the horizontal axis. Default: that of the points.
    """

    healthy: Range | None = None
    alert_below: float | None = None
    scale: tuple[float, float] | None = None
    is_log: bool = False
    x_range: tuple[float, float] | None = None


NO_GUIDES = Guides()


def line_chart(
    series: Mapping[str, Points],
    y_label: str,
    x_label: str = "epoch",
    *,
    has_markers: bool = False,
    has_log_axes: bool = False,
    guides: Guides = NO_GUIDES,
    colors: Sequence[str] = (),
) -> Markup:
    """Draw curves in one frame, or return empty markup if no point can be drawn.

    Args:
        series: The (x, y) points of each curve, keyed by its name.
        y_label: Name of the vertical axis, for screen readers and downloads.
        x_label: Name of the horizontal axis.
        has_markers: Draw a marker at each point. Intended for curves with few points.
        has_log_axes: Use logarithmic axes, and leave out points that are not positive.
        guides: Healthy values, limits and ranges.
        colors: Color of each curve. Default: those of the palette.
    """
    curves = {name: _drawable_points(points, has_log_axes) for name, points in series.items()}
    if not any(len(points) for points in curves.values()):
        return Markup("")
    values = np.concatenate(list(curves.values()))
    is_log = has_log_axes or (guides.is_log and bool((values[:, 1] > 0).all()))
    x_values = np.append(values[:, 0], guides.x_range) if guides.x_range else values[:, 0]
    x_axis = axes.fit(x_values, (LEFT, RIGHT), is_log=has_log_axes, is_tight=True)
    y_axis = axes.fit(values[:, 1], (BOTTOM, TOP), scale=guides.scale, is_log=is_log)
    line_colors = list(colors) or [color(i, max(2, len(curves))) for i in range(len(curves))]
    drawing = [
        *_draw_guides(guides, y_axis),
        *_draw_axes(x_axis, y_axis, x_label),
        *(
            _draw_curve(index, points, x_axis, y_axis, line_color, has_markers)
            for index, (points, line_color) in enumerate(zip(curves.values(), line_colors))
            if len(points)
        ),
    ]
    data = {
        "x_label": x_label,
        "y_label": y_label,
        "frame": [LEFT, RIGHT, TOP, BOTTOM],
        "x_axis": [x_axis.low, x_axis.high, int(x_axis.is_log)],
        "y_axis": [y_axis.low, y_axis.high, int(y_axis.is_log)],
        "series": [
            {
                "name": name,
                "color": line_color,
                "x": _short(points[:, 0]),
                "y": _short(points[:, 1]),
            }
            for (name, points), line_color in zip(curves.items(), line_colors)
        ],
    }
    name = f"{y_label} against {x_label}"
    return Markup(
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0"'
        f' aria-label="{escape(name)}"'
        f" data-chart='{_attribute(data)}'>{''.join(drawing)}</svg>"
    )


def _drawable_points(points: Points, is_log: bool) -> np.ndarray:
    """Return the finite points, shape (n, 2), averaged to at most MAX_POINTS."""
    values = np.array([point for point in points if np.isfinite(point).all()]).reshape(-1, 2)
    if is_log:
        values = values[(values > 0).all(axis=1)]
    if len(values) > MAX_POINTS:
        values = np.array(
            [points_in_bin.mean(axis=0) for points_in_bin in np.array_split(values, MAX_POINTS)]
        )
    return values


def _draw_guides(guides: Guides, y_axis: Axis) -> list[str]:
    """Draw the healthy band and the limit of the alert, as far as they are in the frame."""
    drawing = []
    if guides.healthy:
        low, high = max(guides.healthy.low, y_axis.low), min(guides.healthy.high, y_axis.high)
        if low < high:
            top, bottom = y_axis.position(high), y_axis.position(low)
            drawing.append(
                f'<rect class="healthy" x="{LEFT}" y="{top:.1f}" width="{RIGHT - LEFT}"'
                f' height="{bottom - top:.1f}"/>'
            )
    if guides.alert_below is not None and y_axis.low < guides.alert_below < y_axis.high:
        y = y_axis.position(guides.alert_below)
        drawing.append(f'<path class="limit" d="M{LEFT} {y:.1f}H{RIGHT}"/>')
    return drawing


def _draw_axes(x_axis: Axis, y_axis: Axis, x_label: str) -> list[str]:
    drawing = [f'<path class="axis" d="M{LEFT} {BOTTOM}H{RIGHT}"/>']
    for y, text in y_axis.labels():
        drawing.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{RIGHT}"/>')
        drawing.append(
            f'<text x="{LEFT - LABEL_GAP}" y="{y + BASELINE:.1f}" text-anchor="end">{text}</text>'
        )
    for x, text in x_axis.labels():
        drawing.append(
            f'<text x="{x:.1f}" y="{BOTTOM + 2 * LABEL_GAP}" text-anchor="middle">{text}</text>'
        )
    drawing.append(f'<text x="{RIGHT}" y="{HEIGHT - 8}" text-anchor="end">{escape(x_label)}</text>')
    return drawing


def _draw_curve(
    index: int, points: np.ndarray, x_axis: Axis, y_axis: Axis, line_color: str, has_markers: bool
) -> str:
    positions = [(x_axis.position(x), y_axis.position(y)) for x, y in points]
    path = "L".join(f"{x:.2f} {y:.2f}" for x, y in positions)
    markers = ""
    if has_markers or len(positions) == 1:
        markers = "".join(
            f'<circle cx="{x:.2f}" cy="{y:.2f}" r="{MARKER_RADIUS}" fill="{line_color}"/>'
            for x, y in positions
        )
    curve = f'<path class="curve" stroke="{line_color}" d="M{path}"/>'
    return f'<g id="curve-{index}">{curve}{markers}</g>'


def _short(values: np.ndarray) -> list[float]:
    """Return the numbers with six significant digits."""
    return [float(f"{value:.6g}") for value in values]


def _attribute(data: object) -> str:
    """Return data as JSON for an attribute in single quotes."""
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("'", "&#39;")
