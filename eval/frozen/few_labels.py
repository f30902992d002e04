"""Accuracy when only a few images of each class have a label."""

from __future__ import annotations

import warnings

import numpy as np
from torch import Tensor

from ssl_pretrain.rng import Purpose, permutation

NUM_DRAWS = 10
C = 1.0  # scikit-learn's inverse regularization; the same for all features, as one label per class leaves nothing to choose it on
PROTOCOL = (
    f"logistic regression (scikit-learn, C = {C}, fixed beforehand) on standardized features divided by the root of their number;"
    f" mean ± deviation over {NUM_DRAWS} fixed draws of the labelled images, the same for all rows"
)


def draws(labels: np.ndarray, number: int, classes: list[str]) -> list[np.ndarray]:
    """`number` images of each class, NUM_DRAWS times: each (number * classes,) numbers of training images.

    Raises:
        ValueError: a class has fewer images, or number is not positive.
    """
    if number < 1:
        raise ValueError(f"labels-per-class: {number} is not a number of labels; give at least 1")
    counts = np.bincount(labels, minlength=len(classes))
    if counts.min() < number:
        smallest = classes[counts.argmin()]
        raise ValueError(
            f"labels-per-class: {number} is more than the {counts.min()} training images of class {smallest!r}; give fewer"
        )
    orders = [permutation(draw, 0, len(labels), Purpose.SUBSET) for draw in range(NUM_DRAWS)]
    return [
        np.concatenate([order[labels[order] == label][:number] for label in range(len(classes))])
        for order in orders
    ]


def accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    drawn: list[np.ndarray],
) -> tuple[float, float]:
    """(mean, standard deviation) over the draws, in percent. Features are standardized already."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    scale = train_features.shape[1] ** -0.5  # so that C weighs 96 features and 3,072 pixels alike
    test, truth = (test_features * scale).cpu().numpy(), test_labels.cpu().numpy()
    reached = []
    for chosen in drawn:
        classifier = LogisticRegression(C=C, max_iter=1000)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            classifier.fit(
                (train_features[chosen] * scale).cpu().numpy(), train_labels[chosen].cpu().numpy()
            )
        reached.append(100 * float((classifier.predict(test) == truth).mean()))
    return float(np.mean(reached)), float(np.std(reached))
