"""Charts, training figures, maps and colors of the pages."""

import itertools
import re

import numpy as np
import pytest

from ssl_pretrain.eval.html import (
    axes,
    charts,
    colors,
    image_maps,
    nearest_images,
    training_figures,
)


def read_curve_points(chart, number=0):
    """Read the points of one curve from a chart's SVG. Heights grow upward."""
    (path,) = re.findall(rf'<g id="curve-{number}"><path [^>]* d="([^"]*)"', chart)
    return [(float(x), -float(y)) for x, y in re.findall(r"[ML](\S+) ([\d.]+)", path)]


def test_a_curve_shows_the_finite_points_to_scale():
    nan = float("nan")
    points = [(0, 0.0), (5, 50.0), (10, 100.0), (11, nan)]
    (x0, y0), (x1, y1), (x2, y2) = read_curve_points(charts.line_chart({"": points}, "y"))
    assert x0 < x2 and y0 < y2
    assert (x1, y1) == pytest.approx(((x0 + x2) / 2, (y0 + y2) / 2))
    assert charts.line_chart({"": [(1, nan)]}, "y") == ""
    assert "<circle" in charts.line_chart({"": [(1, 2.0)]}, "y")  # a single point has a marker


def test_long_curves_are_averaged_to_the_largest_number_of_points():
    chart = charts.line_chart({"": [(x, 2 * x) for x in range(3 * charts.MAX_POINTS)]}, "y")
    assert len(read_curve_points(chart)) == charts.MAX_POINTS


def test_logarithmic_curves_are_straight_for_a_power_law():
    power_law = [(10.0**i, 10.0 ** (-2 * i)) for i in range(4)]
    series = {"a": power_law, "b": [(1.0, 0.0), (1000.0, 1.0)]}
    chart = charts.line_chart(series, "y", has_log_axes=True)
    points = read_curve_points(chart)
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(points)]
    assert slopes == pytest.approx([slopes[0]] * 3, rel=0.01) and slopes[0] < 0
    assert len(read_curve_points(chart, 1)) == 1  # zero has no logarithm


def test_a_small_change_does_not_look_like_a_crash():
    axis = axes.fit(np.array([0.9975, 0.9985]), (178, 12))
    assert axis.high - axis.low >= axes.MIN_RELATIVE_SPAN * 0.99
    assert [text for _, text in axis.labels()] == ["0.98", "1.00", "1.02"]
    assert axes.format_ticks([0.0, 1e-4, 2e-4], axis) == ["0", "1e-4", "2e-4"]


def test_curves_without_information_are_named_instead_of_drawn():
    records = [
        {"step": i, "epoch": i, "loss": 10 / i, "nt_xent": 5 / i, "weight_decay": 1e-6}
        for i in range(1, 6)
    ]
    (group,) = training_figures.draw_run_groups({"": records}, "run")
    assert [figure.caption for figure in group.figures] == ["Loss"]
    assert group.notes == ["Constant: weight decay 1e-6.", "NT-Xent is 0.5 times loss."]


def test_healthy_ranges_and_limits_of_alerts_are_drawn():
    records = [{"step": i, "epoch": i, "embedding_std": 0.9 - i / 100} for i in range(1, 6)]
    (group,) = training_figures.draw_run_groups({"": records}, "run")
    (figure,) = group.figures
    assert 'class="healthy"' in figure.image and 'class="limit"' in figure.image
    assert figure.note.endswith("Healthy: 0.2 to 1, alert below 0.2")


def test_every_thumbnail_of_a_map_has_a_cell_of_its_own_near_its_place():
    positions = np.random.default_rng(0).normal(size=(60, 2))
    cells = image_maps.assign_cells(positions, num_columns=12, num_rows=8)
    assert len({tuple(cell) for cell in cells}) == 60
    correlations = [np.corrcoef(positions[:, axis], cells[:, axis])[0, 1] for axis in (0, 1)]
    assert min(correlations) > 0.9


def test_the_perplexity_is_below_the_number_of_images():
    assert nearest_images.tsne_perplexity(500) == 30
    assert nearest_images.tsne_perplexity(10) == 3


def test_colors_are_legible_on_both_pages():
    for number in (10, 200):
        for index in range(number):
            shown = colors.color(index, number)
            assert colors.contrast(shown, "#fdfdfc") >= 3, shown
            assert colors.contrast(shown, "#16181a") >= 3, shown
