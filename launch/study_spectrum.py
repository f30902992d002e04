"""Plot the eigenvalues of a study's embeddings and features, one row of panels per group."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ssl_pretrain.launch import study_style
from ssl_pretrain.launch.study_columns import RANDOM_BACKBONE
from ssl_pretrain.launch.study_table import Comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes

VECTORS = ("embeddings", "features")
FLOOR = 1e-9  # smaller eigenvalues are close to the rounding errors of float32 vectors
PANEL_HEIGHT = 2.7  # inches


def draw(comparison: Comparison, path: Path) -> bool:
    """Draw the sorted eigenvalues, as the geometric mean over seeds with a band of their range.

    The vectors are scaled to length 1, so the eigenvalues of a covariance add up to at most 1.
    Values below `FLOOR` are drawn on the lower edge.

    Returns:
        False if no run has a file of eigenvalues. Then nothing is written.
    """
    groups = comparison.families()
    if not any(run.eigenvalues() for run in comparison.results):
        return False
    figure = study_style.build_figure(len(groups) * PANEL_HEIGHT + 0.8)
    panels = figure.subplots(len(groups), len(VECTORS), sharey=True, squeeze=False)
    for row, (group, variants) in zip(panels, groups.items()):
        for panel, vectors in zip(row, VECTORS):
            _draw_panel(panel, comparison, variants, vectors)
            study_style.clean(panel, f"{group}, {vectors}" if group else vectors)
            panel.set_xlabel("index of the eigenvalue")
        row[0].set_ylabel("eigenvalue")
        if len(groups) > 1:
            for panel in row:
                panel.legend(fontsize=7, frameon=False, loc="upper right")
    note = "Lines: geometric mean over seeds. Bands: smallest to largest."
    if comparison.num_seeds() == [1]:
        note = "One seed per line."
    note += f" Eigenvalues below {FLOOR:g} are drawn at {FLOOR:g}."
    study_style.save(figure, path, note, list(panels[0]) if len(groups) == 1 else [])
    return True


def _draw_panel(
    panel: "Axes", comparison: Comparison, variants: Sequence[str], vectors: str
) -> None:
    """Draw the spectrum of each variant, and of the random backbone's features."""
    random_style = study_style.REFERENCE_STYLES[RANDOM_BACKBONE]
    random_key, has_random = ("random, as built", vectors), False
    for number, variant in enumerate(variants):
        runs = [run.eigenvalues() for run in comparison.results_of(variant)]
        spectra = [run["pretrained", vectors] for run in runs if ("pretrained", vectors) in run]
        if not spectra:
            continue
        style = study_style.line_style(number)
        columns = list(zip(*spectra))
        index = range(1, len(columns) + 1)
        means = [geometric_mean(values) for values in columns]
        panel.plot(
            index,
            means,
            label=variant,
            linewidth=1.4,
            color=style.color,
            linestyle=style.linestyle,
        )
        if len(spectra) > 1:
            lower, upper = ([max(FLOOR, bound(c)) for c in columns] for bound in (min, max))
            panel.fill_between(index, lower, upper, color=style.color, alpha=0.2, linewidth=0)
        random = next((run[random_key] for run in runs if random_key in run), None)
        if random and not has_random and vectors == "features":
            has_random = True
            panel.plot(
                range(1, len(random) + 1),
                [max(FLOOR, value) for value in random],
                label=RANDOM_BACKBONE,
                linewidth=1.0,
                color=random_style.color,
                linestyle=random_style.linestyle,
            )
    panel.set_yscale("log")
    panel.set_ylim(FLOOR, 1.0)


def geometric_mean(values: Sequence[float]) -> float:
    """Return the geometric mean of eigenvalues, of which none counts as less than `FLOOR`."""
    return math.exp(sum(math.log(max(FLOOR, value)) for value in values) / len(values))
