"""Curves of a study: the accuracy of every run during its training, one panel per variant."""

from pathlib import Path
from typing import Any

from ssl_pretrain.eval import results
from ssl_pretrain.launch.study_table import BLUE, RED, Comparison, RunResults

PANELS_PER_ROW = 2
PANEL_SIZE = (4.4, 2.8)  # inches


def draw(comparison: Comparison, path: Path) -> None:
    """Draw the k-NN accuracy during training, and that on test images at the end.

    During training, held-out training images are classified. At the end, test images are, by the
    pretrained and by the random backbone of each run.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    num_rows = -(-len(comparison.results_by_variant) // PANELS_PER_ROW)
    width, height = PANEL_SIZE
    figure = Figure(figsize=(PANELS_PER_ROW * width, num_rows * height), layout="constrained")
    panels = iter(figure.subplots(num_rows, PANELS_PER_ROW, sharey=True, squeeze=False).flat)
    for variant, runs in comparison.results_by_variant.items():
        panel = next(panels)
        for run in runs:
            _draw_run(panel, run, is_first=run is runs[0])
        panel.set_title(variant, fontsize=11)
        panel.set_xlabel("epoch")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.set_ylabel("k-NN accuracy, %")
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels:  # free places in the last row
        panel.set_axis_off()
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=130)


def _draw_run(panel: Any, run: RunResults, is_first: bool) -> None:
    """Draw one run. Only the first run of a panel has entries in the legend."""
    points = {record["epoch"]: 100 * record["knn"] for record in run.records if "knn" in record}
    labels = ["held-out training images", "test images", "test images, random backbone"]
    if not is_first:
        labels = [""] * len(labels)
    panel.plot(list(points), list(points.values()), color=BLUE, linewidth=1.2, label=labels[0])
    table = run.tables["knn"]
    last_epoch = max(points)
    pretrained, random = (table[row]["clean"] for row in ("pretrained", results.BETTER_RANDOM))
    panel.plot([last_epoch], [pretrained], "o", color=BLUE, markersize=5, label=labels[1])
    panel.axhline(random, color=RED, linestyle="--", linewidth=1, label=labels[2])
