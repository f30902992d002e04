"""Draw the nearest neighbors of ten test images, by pixels and by learned features.

PYTHONPATH=. .venv/bin/python tests/bench/neighbors.py runs/demo docs/results/neighbors.png

A neighbor of another class than its query has a red frame. The queries are those of the report.
"""

import sys
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ssl_pretrain.eval import runs
from ssl_pretrain.eval.html import nearest_images
from ssl_pretrain.eval.html.nearest_images import LabeledImage, Query

matplotlib.use("agg")
NUM_SHOWN = 3  # neighbors of each kind
GAP = 0.35  # space between the three groups of rows, in images
WRONG = "#d62728"


def main(run_path: str, out: str) -> None:
    """Draw the picture of a run and print how many neighbors have the class of their query."""
    run = runs.load_run(Path(run_path))
    bank, candidates, _ = nearest_images.open_bank_and_query_candidates(run)
    queries = nearest_images.find_neighbors(run, bank, candidates)
    num_rows = 1 + 2 * NUM_SHOWN
    figure = Figure(figsize=(1 + 0.62 * len(queries), 0.62 * (num_rows + 2 * GAP)), dpi=110)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(-2.3, len(queries))
    axes.set_ylim(num_rows + 2 * GAP, 0)
    axes.set_aspect("equal")
    axes.axis("off")
    for column, query in enumerate(queries):
        draw_column(axes, column, query)
    middle = (NUM_SHOWN - 1) / 2 + 0.5
    labels = {
        0.5: "query",
        1 + GAP + middle: "nearest\nby pixels",
        1 + NUM_SHOWN + 2 * GAP + middle: "nearest\nby learned\nfeatures",
    }
    for y, label in labels.items():
        axes.text(-0.2, y, label, ha="right", va="center", fontsize=10)
    figure.savefig(out, facecolor="white", bbox_inches="tight", pad_inches=0.06)
    for kind in ("pixel", "feature"):
        right = sum(
            label == query.label
            for query in queries
            for _, label in getattr(query, f"{kind}_neighbors")[:NUM_SHOWN]
        )
        print(f"by {kind}s: {right} of {NUM_SHOWN * len(queries)} neighbors have the query's class")


def draw_column(axes: Axes, column: int, query: Query) -> None:
    """Draw a query and its neighbors below it."""
    draw_image(axes, column, 0, (query.image, query.label), query.label)
    groups = [query.pixel_neighbors, query.feature_neighbors]
    for group, neighbors in enumerate(groups):
        for position, neighbor in enumerate(neighbors[:NUM_SHOWN]):
            row = 1 + group * NUM_SHOWN + (1 + group) * GAP + position
            draw_image(axes, column, row, neighbor, query.label)


def draw_image(axes: Axes, column: int, row: float, image: LabeledImage, label: int) -> None:
    """Draw one image, in a red frame if its label is another one."""
    pixels, own_label = image
    extent = (column + 0.04, column + 0.96, row + 0.96, row + 0.04)
    axes.imshow(np.moveaxis(pixels, 0, 2), extent=extent, interpolation="nearest")
    if own_label != label:
        x = [extent[0], extent[1], extent[1], extent[0], extent[0]]
        y = [extent[2], extent[2], extent[3], extent[3], extent[2]]
        axes.plot(x, y, color=WRONG, linewidth=2)


if __name__ == "__main__":
    main(*sys.argv[1:])
