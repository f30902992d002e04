"""What evaluations by published protocols share: splits, the choice of a setting, and its row."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ssl_pretrain.eval import results
from ssl_pretrain.eval.frozen import linear_heads
from ssl_pretrain.eval.frozen.evaluation_split import EvaluationSplit, labeled_splits
from ssl_pretrain.eval.runs import Run
from ssl_pretrain.views.recipe import Interpolation

# The result file's description of each value of --select.
SELECTIONS: dict[str, str] = {
    "held-out": "by accuracy on {num_held_out:,} held-out training images, which the final heads"
    " are not trained on",
    "published": "no selection; the published setting is trained on all training images",
    "test": "ON THE TEST IMAGES, as in DINO's convention; this is an upper bound and not comparable"
    " with other selections",
}


@dataclass(frozen=True)
class Scores:
    """Results of every setting on one split."""

    accuracies: list[float]  # in [0, 1]
    losses: list[float]  # cross entropies
    percentages: list[float]


def open_splits(
    run: Run, rows: Sequence[str], interpolation: Interpolation, evaluation: str
) -> tuple[Run, EvaluationSplit, EvaluationSplit]:
    """Return the run with the interpolation of the protocol, and its training and test images.

    Args:
        run: Run to evaluate.
        rows: Rows of the table.
        interpolation: Interpolation of the test images.
        evaluation: What needs labels, for messages, such as "the linear evaluation".

    Raises:
        ValueError: If the images have no labels, or `rows` includes "raw".
    """
    if "raw" in rows:
        raise ValueError(
            "--rows raw: the published protocols only evaluate networks; leave it out or give"
            " --protocol cached"
        )
    settings = replace(run.config.evaluation, interpolation=interpolation)
    run = replace(run, config=replace(run.config, evaluation=settings))
    return run, *labeled_splits(run, evaluation)


def build_rows(
    network: str,
    names: list[str],
    lrs: list[float],
    test: Scores,
    *,
    selection: str,
    score_held_out: Callable[[], Scores],
    published: int | None,
) -> tuple[results.Row, list[results.Row]]:
    """Return a network's row of the table, and its rows of the grid of all settings.

    Args:
        network: Name of the row.
        names: Name of each setting.
        lrs: Learning rate of each setting.
        test: Results on the test images.
        selection: A key of `SELECTIONS`.
        score_held_out: Measures the settings on held-out training images. It is called if they
            decide.
        published: Index of the published setting, to be shown, or None.
    """
    row = results.Row(network, {})
    grid_rows = [results.Row(f"{network}, test images", dict(zip(names, test.percentages)))]
    if published is not None:
        row.metrics["published setting"] = test.percentages[published]
    if selection == "published":
        return row, grid_rows
    scores, column = test, "chosen on the test images"
    if selection == "held-out":
        scores, column = score_held_out(), "chosen on held-out images"
        held_out = dict(zip(names, scores.percentages))
        grid_rows.insert(0, results.Row(f"{network}, held-out images", held_out))
    best = linear_heads.best_setting(scores.accuracies, scores.losses)
    row.metrics[column] = test.percentages[best]
    row.notes[column] = names[best] + linear_heads.edge_note(lrs[best], lrs)
    return row, grid_rows
