"""Line charts and scatter plots as inline SVG, drawn by matplotlib."""

import colorsys
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

Points = Sequence[tuple[float, float]]

MAX_POINTS = 600  # longer curves are averaged in this many bins
GRAY = "#858b91"  # legible on white and near-black backgrounds
PALETTE = (
    "#4e79a7",
    "#f28e2b",
    "#e15759",
    "#4fa8a0",
    "#59a14f",
    "#c9a227",
    "#b07aa1",
    "#ff7f93",
    "#9c755f",
    "#8a8a8a",
)
# Text is not drawn as paths, so the page's font applies. Curves keep all their points.
STYLE: Any = {"svg.fonttype": "none", "path.simplify": False, "font.size": 10}


def color(index: int, num_colors: int) -> str:
    """Return the color of series or class `index`, legible on white and near-black backgrounds.

    Negative indices, the labels of unlabeled images, are gray.
    """
    if index < 0:
        return GRAY
    if num_colors <= len(PALETTE):
        return PALETTE[index]
    hue = index * 137.508 / 360 % 1  # steps of the golden angle give neighbors different hues
    lightness, saturation = 0.48 + 0.1 * (index % 3 == 0), 0.55 + 0.2 * (index % 2)
    return to_hex(colorsys.hls_to_rgb(hue, lightness, saturation))


@rc_context(STYLE)
def line_chart(
    series: Mapping[str, Points],
    y_label: str,
    x_label: str = "epoch",
    *,
    has_markers: bool = False,
    has_log_axes: bool = False,
) -> Markup:
    """Draw curves in one frame, or return empty markup if no point can be drawn.

    Args:
        series: The (x, y) points of each curve, keyed by its name.
        y_label: Name of the vertical axis, for screen readers only.
        x_label: Name of the horizontal axis.
        has_markers: Draw a marker at each point. Intended for curves with few points.
        has_log_axes: Use logarithmic axes, and leave out points that are not positive.
    """
    figure = Figure((4.6, 2.5))
    axes: Axes = figure.add_axes((0.13, 0.17, 0.85, 0.8))
    for index, points in enumerate(series.values()):
        values = np.array([point for point in points if np.isfinite(point).all()]).reshape(-1, 2)
        if has_log_axes:
            values = values[(values > 0).all(axis=1)]
        if len(values) > MAX_POINTS:
            bins = np.array_split(values, MAX_POINTS)
            values = np.array([points_in_bin.mean(axis=0) for points_in_bin in bins])
        if len(values):
            axes.plot(
                *values.T,
                gid=f"curve-{index}",
                color=color(index, max(2, len(series))),
                linewidth=1.6,
                marker="o" if has_markers or len(values) == 1 else "",
                markersize=3.5,
            )
    if not axes.lines:
        return Markup("")
    if has_log_axes:
        axes.set(xscale="log", yscale="log")
    axes.set_xlabel(x_label, loc="right", color=GRAY)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(GRAY)
    axes.tick_params(which="both", length=0, colors=GRAY)
    return _svg(figure, "chart", f"{y_label} against {x_label}")


@rc_context(STYLE)
def scatter_plot(positions: np.ndarray, labels: np.ndarray, num_classes: int) -> Markup:
    """Draw points (n, 2), each in the color of its class, or gray if its label is -1."""
    figure = Figure((4.4, 4.4))
    axes: Axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    colors = [color(int(label), num_classes) for label in labels]
    axes.scatter(positions[:, 0], positions[:, 1], s=22, c=colors, alpha=0.82, linewidths=0)
    return _svg(figure, "scatter", f"projection of {len(positions)} images")


def _svg(figure: Figure, css_class: str, label: str) -> Markup:
    """Return the figure as an inline SVG without a background and without URLs."""
    content = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(content, format="svg", transparent=True, metadata=no_metadata)
    text = content.getvalue()
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text[text.index("<svg") :])
    svg = re.sub(r'width="[^"]*pt" height="[^"]*pt"', "", svg, count=1)
    head = Markup('<svg class="{}" role="img" aria-label="{}"').format(css_class, label)
    return head + Markup(svg.removeprefix("<svg"))
