"""Train linear classifiers on features that are computed once, and select hyperparameters."""

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssl_pretrain import rng
from ssl_pretrain.distributed import process_group
from ssl_pretrain.eval import results
from ssl_pretrain.eval.frozen import features, few_labels, linear_heads, named_features
from ssl_pretrain.eval.frozen.evaluation_split import (
    EvaluationSplit,
    describe_splits,
    hold_out,
    labeled_splits,
)
from ssl_pretrain.eval.runs import Run

LEARNING_RATES = (0.0001, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
WEIGHT_DECAYS = (0.0, 1e-6)  # DINO and MoCo use 0, SimCLR 1e-6
NUM_SETTINGS = len(LEARNING_RATES) * len(WEIGHT_DECAYS)
MOMENTUM = 0.9
BATCH_SIZE = 256
PROTOCOL = {
    "normalization": "every feature and every raw pixel is scaled to mean 0 and standard deviation"
    " 1 over the training images",
    "classifier": f"linear, SGD with Nesterov momentum {MOMENTUM}, batch {BATCH_SIZE},"
    " {epochs} epochs, cosine schedule to 0, weights initialized to zero",
    "selection": f"learning rate from {', '.join(f'{lr:g}' for lr in LEARNING_RATES)} and weight"
    f" decay from {', '.join(f'{decay:g}' for decay in WEIGHT_DECAYS)}, by accuracy on a held-out"
    " tenth of the training images; then trained on all of them",
}


def evaluate(
    run: Run,
    epochs: int = 50,
    labels_per_class: Sequence[int] = (),
    rows: Sequence[str] = features.ROWS,
    feature: str = named_features.POOLED,
) -> dict[str, Any]:
    """Measure the accuracy in percent of each row's features and save it to RUN/eval/linear.json.

    Args:
        run: Run to evaluate.
        epochs: Passes over the training images.
        labels_per_class: Numbers of labels per class that are evaluated in addition to all labels.
        rows: Names of the features to evaluate, from `features.ROWS`.
        feature: Name of the networks' feature, see `named_features`.

    Returns:
        The content of the result file.

    Raises:
        ValueError: If the images have no labels, a class has too few labels, or the backbone does
            not have the feature.
    """
    start = time.monotonic()
    train, test = labeled_splits(run, "the linear evaluation")
    subsets_by_column = {
        f"{number} per class": few_labels.draw_rows(train.labels, number, train.classes)
        for number in labels_per_class
    }
    table, grid = [], []
    for representation in features.representations(run, train, rows, feature):
        table_row, grid_row = _measure(representation, train, test, epochs, subsets_by_column)
        results.print_progress(table_row.summary())
        table.append(table_row)
        grid.append(grid_row)
    protocol = describe_splits(run, train, test, has_random_row="random" in rows, feature=feature)
    protocol |= {key: text.format(epochs=epochs) for key, text in PROTOCOL.items()}
    if subsets_by_column:
        protocol["few labels"] = few_labels.PROTOCOL
    grid_protocol = protocol | {
        "accuracy": "on the held-out tenth of the training images, by learning rate (lr) and weight"
        " decay (wd)"
    }
    return results.save_with_grid(
        run.path,
        f"linear{results.suffix_of_feature(feature)}",
        (protocol, table),
        (grid_protocol, grid),
        run.provenance(),
        time.monotonic() - start,
        results.measure_of_feature(results.ACCURACY, feature),
    )


def _measure(
    representation: features.Representation,
    train: EvaluationSplit,
    test: EvaluationSplit,
    epochs: int,
    subsets_by_column: Mapping[str, list[np.ndarray]],
) -> tuple[results.Row, results.Row]:
    """Return the row of the result table, and the row of the grid, which lists every setting."""
    train_features, train_labels = features.embed_split(representation.embed, train)
    test_features, test_labels = features.embed_split(representation.embed, test)
    standardize = fit_standardization(train_features)
    train_features, test_features = standardize(train_features), standardize(test_features)
    num_classes = len(train.classes)
    selected = select_setting(train_features, train_labels, num_classes, epochs)
    lrs, weight_decays = [selected.lr], [selected.weight_decay]
    weights = train_heads(train_features, train_labels, num_classes, lrs, weight_decays, epochs)
    accuracy = 100 * linear_heads.scores(weights, test_features, test_labels)[0].item()
    row = results.Row(
        representation.name, {"all labels": accuracy}, notes={"all labels": str(selected)}
    )
    for column, subsets in subsets_by_column.items():
        row.metrics[column], row.spread[column] = few_labels.accuracy_and_deviation(
            train_features, train_labels, test_features, test_labels, subsets
        )
    return row, results.Row(representation.name, selected.percentages)


def fit_standardization(train_features: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the function that maps every training feature to mean 0 and standard deviation 1.

    A constant feature is mapped to 0.
    """
    std, mean = torch.std_mean(train_features, dim=0, correction=0)
    is_constant = std <= 1e-6 * std.max().clamp(min=1e-30)
    divisor = std.masked_fill(is_constant, torch.inf)
    return lambda raw: (raw - mean) / divisor


@dataclass
class Selection:
    """Hyperparameters with the highest accuracy on held-out training images."""

    lr: float
    weight_decay: float
    held_out_accuracy: float
    percentages: dict[str, float]  # held-out accuracy in percent, by name of the setting

    def __str__(self) -> str:
        return (
            f"learning rate {self.lr:g}{linear_heads.edge_note(self.lr, LEARNING_RATES)},"
            f" weight decay {self.weight_decay:g} ({100 * self.held_out_accuracy:.1f} % of held-out"
            " training images)"
        )


def select_setting(
    train_features: Tensor, train_labels: Tensor, num_classes: int, epochs: int
) -> Selection:
    """Select the learning rate and weight decay on held-out training images.

    The highest accuracy wins. Ties go to the lowest cross entropy.
    """
    train_rows, held_out_rows = hold_out(len(train_features))
    grid = list(itertools.product(LEARNING_RATES, WEIGHT_DECAYS))
    lrs, weight_decays = map(list, zip(*grid))
    weights = train_heads(
        train_features[train_rows],
        train_labels[train_rows],
        num_classes,
        lrs,
        weight_decays,
        epochs,
    )
    accuracies, losses = linear_heads.scores(
        weights, train_features[held_out_rows], train_labels[held_out_rows]
    )
    best = linear_heads.best_setting(accuracies.tolist(), losses.tolist())
    percentages = {
        linear_heads.setting_name(*setting): 100 * accuracy
        for setting, accuracy in zip(grid, accuracies.tolist())
    }
    return Selection(*grid[best], accuracies[best].item(), percentages)


def train_heads(
    train_features: Tensor,
    train_labels: Tensor,
    num_classes: int,
    lrs: list[float],
    weight_decays: list[float],
    epochs: int,
) -> Tensor:
    """Train one linear classifier per setting, all on the same batches.

    Each equals a linear layer that starts at zero and is trained by torch.optim.SGD(nesterov=True)
    with a cosine schedule. Every rank has all features and trains on its rows of every batch.

    Args:
        train_features: Features, shape (num_images, dim).
        train_labels: Classes of the images, shape (num_images,).
        num_classes: Number of classes.
        lrs: Learning rate of each classifier.
        weight_decays: Weight decay of each classifier.
        epochs: Passes over the features.

    Returns:
        Weights, shape (num_heads, dim + 1, num_classes). The last row of each head is the bias.
    """
    num_images, dim = train_features.shape
    heads = linear_heads.LinearHeads(
        dim, num_classes, lrs, weight_decays, like=train_features, momentum=MOMENTUM
    )
    for epoch in range(epochs):
        order = torch.from_numpy(rng.permutation(0, epoch, num_images)).to(train_features.device)
        batches = order.split(BATCH_SIZE)
        for step, batch in enumerate(batches):
            rows = batch[process_group.rank() :: process_group.world_size()]
            progress = (epoch + step / len(batches)) / epochs
            lr_factor = 0.5 * (1 + math.cos(math.pi * progress))
            heads.step(train_features[rows], train_labels[rows], lr_factor, len(batch))
    return heads.weights.transpose(0, 1)
