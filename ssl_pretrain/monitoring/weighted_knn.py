"""Exact weighted k-NN classifier of InstDisc and DINO.

Wu et al., CVPR 2018, arXiv:1805.01978, section 3.4.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_SIMILARITIES = 2**24  # largest number in memory at a time, 64 MiB in float32


def predict(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    *,
    k: int,
    temperature: float,
    num_classes: int,
) -> Tensor:
    """Classify queries by a weighted vote of their k nearest training images, in float32.

    Args:
        train_features: Features of the training images, shape (num_train, dim). Normalized inside.
        train_labels: Classes of the training images in [0, num_classes), shape (num_train,).
        test_features: Features of the queries, shape (num_test, dim). Normalized inside.
        k: Number of neighbors that vote.
        temperature: Divisor of the similarities.
        num_classes: Number of classes.

    Returns:
        Predicted classes, int64, shape (num_test,).

    Raises:
        ValueError: If k is not in [1, num_train], or the temperature is not positive.
    """
    check_arguments(k, temperature, len(train_features))
    normalized_features = F.normalize(train_features.float(), dim=1)
    predictions = []
    for queries in test_features.split(max(1, MAX_SIMILARITIES // len(normalized_features))):
        similarities, neighbors = (
            F.normalize(queries.float(), dim=1) @ normalized_features.T
        ).topk(k, dim=1)
        predictions.append(vote(similarities, train_labels[neighbors], temperature, num_classes))
    return torch.cat(predictions) if predictions else train_labels.new_empty(0)


def check_arguments(k: int, temperature: float, num_train: int, key_prefix: str = "") -> None:
    """Raise ValueError unless k is in [1, num_train] and the temperature is positive.

    Args:
        k: Number of neighbors that vote.
        temperature: Divisor of the similarities.
        num_train: Number of training images.
        key_prefix: Prefix of the configuration keys in the message.
    """
    if not 1 <= k <= num_train:
        raise ValueError(
            f"{key_prefix}k: {k} neighbors cannot be found among {num_train} training images; "
            f"choose a value from 1 to {num_train}"
        )
    if temperature <= 0:
        raise ValueError(
            f"{key_prefix}temperature: {temperature} is not positive; choose a value such as 0.07"
        )


def vote(similarities: Tensor, labels: Tensor, temperature: float, num_classes: int) -> Tensor:
    """Return the class with the largest vote per query, shape (num_queries,).

    The weight of a neighbor is exp(similarity / temperature). The largest similarity is subtracted
    first, which avoids overflow and does not change the result.

    Args:
        similarities: Cosine similarities of the neighbors, nearest first, shape (num_queries, k).
        labels: Classes of the neighbors, shape (num_queries, k).
        temperature: Divisor of the similarities.
        num_classes: Number of classes.
    """
    weights = ((similarities - similarities[:, :1]) / temperature).exp()
    scores = weights.new_zeros(len(labels), num_classes).scatter_add_(1, labels, weights)
    return scores.argmax(dim=1)
