"""Classifiers of frozen features that learn from a few labeled images per class."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from ssl_pretrain.eval.frozen import few_labels

# google-research/big_vision at 0127fb6b, evaluators/fewshot_lsr.py and configs/common_fewshot.py.
L2_REGULARIZATION = 2.0**10
BIAS_CONSTANT = 100.0
STD_EPSILON = 1e-5
# Features and labels of the few images, features of the test images, number of classes. The result
# is the predicted class of each test image.
Classifier = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def least_squares(train: Tensor, labels: Tensor, test: Tensor, num_classes: int) -> Tensor:
    """Predict by least squares with L2 regularization, the few-shot protocol of big_vision.

    Features are standardized by the few images. A constant feature of 100 is the bias, which is
    thereby hardly regularized. The targets are 1 for the class and -1 for the others.
    """
    train, test = train.double(), test.double()
    mean, std = train.mean(dim=0), train.std(dim=0, correction=0) + STD_EPSILON
    x, x_test = (
        torch.nn.functional.pad((values - mean) / std, (0, 1), value=BIAS_CONSTANT)
        for values in (train, test)
    )
    y = 2 * torch.nn.functional.one_hot(labels, num_classes).double() - 1
    # Both forms have the same weights. The smaller matrix is inverted.
    if len(x) >= x.shape[1]:
        identity = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        weights = torch.linalg.solve(x.T @ x + L2_REGULARIZATION * identity, x.T @ y)
    else:
        identity = torch.eye(len(x), dtype=x.dtype, device=x.device)
        weights = x.T @ torch.linalg.solve(x @ x.T + L2_REGULARIZATION * identity, y)
    return (x_test @ weights).argmax(dim=1)


def logistic_regression(train: Tensor, labels: Tensor, test: Tensor, _num_classes: int) -> Tensor:
    """Predict by logistic regression on standardized features, as `few_labels` does."""
    std, mean = torch.std_mean(train, dim=0, correction=0)
    scale = train.shape[1] ** -0.5 / std.masked_fill(std <= 1e-6 * std.max(), torch.inf)
    classifier = few_labels.fit_classifier((train - mean) * scale, labels)
    predictions = classifier.predict(((test - mean) * scale).cpu().numpy())
    return torch.from_numpy(predictions).to(test.device)


def nearest_centroid(train: Tensor, labels: Tensor, test: Tensor, num_classes: int) -> Tensor:
    """Predict the class whose mean direction has the largest cosine with the feature."""
    directions = torch.nn.functional.normalize(train.double(), dim=1)
    sums = torch.zeros(num_classes, train.shape[1], dtype=torch.float64, device=train.device)
    sums.index_add_(0, labels, directions)
    centroids = torch.nn.functional.normalize(sums, dim=1)
    return (torch.nn.functional.normalize(test.double(), dim=1) @ centroids.T).argmax(dim=1)


CLASSIFIERS: Mapping[str, Classifier] = {
    "big_vision": least_squares,
    "logistic": logistic_regression,
    "centroid": nearest_centroid,
}
DESCRIPTIONS = {
    "big_vision": "least squares with L2 regularization 2^10 on features standardized by the few"
    " images, and a constant feature of 100 (google-research/big_vision at 0127fb6b,"
    " evaluators/fewshot_lsr.py)",
    "logistic": f"logistic regression (scikit-learn, C = {few_labels.C}) on features standardized"
    " by the few images and divided by the square root of their dimension",
    "centroid": "largest cosine with the mean direction of a class",
}


def accuracies(
    classifier: Classifier,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    num_classes: int,
    draws: list[np.ndarray],
) -> list[float]:
    """Return the accuracy on the test images in percent, for each draw of few images.

    Args:
        classifier: Function that predicts classes.
        train: Features (n, dim) and labels (n,) of all training images.
        test: Features and labels of the test images.
        num_classes: Number of classes.
        draws: Rows of the few images.
    """
    result = []
    for rows in draws:
        index = torch.from_numpy(rows).to(train[0].device)
        predictions = classifier(train[0][index], train[1][index], test[0], num_classes)
        result.append(100 * (predictions == test[1]).double().mean().item())
    return result
