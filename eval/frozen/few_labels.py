"""Measure the accuracy when only a few images per class have a label."""

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssl_pretrain import rng

NUM_DRAWS = 10
# Inverse strength of scikit-learn's regularization. It is fixed because with one label per class
# there are no images left to select it on.
C = 1.0
PROTOCOL = (
    f"logistic regression (scikit-learn, C = {C}, fixed beforehand) on standardized features"
    f" divided by the square root of their dimension; mean ± deviation over {NUM_DRAWS} fixed draws"
    " of the labeled images, the same for all rows"
)


def draw_rows(labels: np.ndarray, num_per_class: int, classes: list[str]) -> list[np.ndarray]:
    """Draw the rows of `num_per_class` training images of each class, NUM_DRAWS times.

    Raises:
        ValueError: If a class has fewer images, or `num_per_class` is not positive.
    """
    if num_per_class < 1:
        raise ValueError(
            f"--labels-per-class {num_per_class}: a class needs a labeled image; give at least 1"
        )
    return [
        balanced_rows(labels, num_per_class, classes, seed, f"--labels-per-class {num_per_class}")
        for seed in range(NUM_DRAWS)
    ]


def balanced_rows(
    labels: np.ndarray, num_per_class: int, classes: list[str], seed: int, option: str
) -> np.ndarray:
    """Draw the rows of `num_per_class` images of each class, ordered by class.

    Args:
        labels: Class of each image.
        num_per_class: Number of images per class.
        classes: Names of the classes.
        seed: Seed of the draw.
        option: Command-line option that the error message names.

    Raises:
        ValueError: If a class has fewer images.
    """
    counts = np.bincount(labels, minlength=len(classes))
    if counts.min() < num_per_class:
        raise ValueError(
            f"{option}: takes {num_per_class} images per class, but {classes[counts.argmin()]!r}"
            f" has {counts.min()}; give a smaller number"
        )
    return draw_per_class(labels, num_per_class, len(classes), seed)


def draw_per_class(
    labels: np.ndarray, num_per_class: int, num_classes: int, seed: int
) -> np.ndarray:
    """Draw the rows of at most `num_per_class` images of each class, ordered by class.

    Fewer images of a class are all taken, as in big_vision. More images per class contain those of
    fewer. A draw only depends on its seed.

    Args:
        labels: Class of each image.
        num_per_class: Number of images per class.
        num_classes: Number of classes.
        seed: Seed of the draw.
    """
    order = rng.permutation(seed, 0, len(labels), rng.Purpose.SUBSET)
    return np.concatenate(
        [order[labels[order] == label][:num_per_class] for label in range(num_classes)]
    )


def accuracy_and_deviation(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    draws: list[np.ndarray],
) -> tuple[float, float]:
    """Return the mean and the standard deviation of the accuracy over the draws, in percent.

    The features must be standardized.
    """
    scale = train_features.shape[1] ** -0.5  # so that C means the same at any width
    train, test = train_features * scale, (test_features * scale).cpu().numpy()
    truth, accuracies = test_labels.cpu().numpy(), []
    for draw in draws:
        rows = torch.from_numpy(draw).to(train.device)
        classifier = fit_classifier(train[rows], train_labels[rows])
        accuracies.append(100 * float((classifier.predict(test) == truth).mean()))
    return float(np.mean(accuracies)), float(np.std(accuracies))


def fit_classifier(features: Tensor, labels: Tensor) -> Any:
    """Return scikit-learn's logistic regression of standardized features, with the C above."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=C, max_iter=1000).fit(
            features.cpu().numpy(), labels.cpu().numpy()
        )
