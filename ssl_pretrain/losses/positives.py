"""Means over the positives of each anchor, which are the other embeddings with its label.

Sums per class replace sums over pairs, so the cost is linear in the number of embeddings.
"""

import torch
from torch import Tensor


def number_classes(labels: Tensor) -> Tensor:
    """Replace labels by numbers below len(labels), without reading the device."""
    ascending, order = labels.sort()
    is_first = torch.ones_like(ascending)
    is_first[1:] = ascending[1:] != ascending[:-1]
    return torch.empty_like(labels).scatter_(0, order, is_first.cumsum(0) - 1)


def mean_positive(
    z: Tensor, all_z: Tensor, classes: Tensor, local_start: int, scale: float
) -> Tensor:
    """Return the mean of scale * z_i @ z_j over the positives j of each anchor i.

    Args:
        z: Embeddings of this rank, shape (rows, dim).
        all_z: Embeddings of all ranks, shape (all_rows, dim).
        classes: Class numbers of all ranks' embeddings, shape (all_rows,).
        local_start: Index of this rank's first row in `all_z`.
        scale: 1 / temperature.

    Returns:
        Tensor of shape (rows,), 0 for an anchor without positives.
    """
    local = slice(local_start, local_start + len(z))
    sums, num_positives = _class_sums(all_z, classes), _num_positives(classes)
    return ((sums[classes[local]] - z) * z).sum(1) * scale / num_positives[local]


def mean_positive_gradient(
    z: Tensor, all_z: Tensor, classes: Tensor, local_start: int, all_grad: Tensor
) -> Tensor:
    """Return the gradient with respect to `z` of `mean_positive` of all ranks, divided by `scale`.

    Args:
        z: As in `mean_positive`.
        all_z: As in `mean_positive`.
        classes: As in `mean_positive`.
        local_start: As in `mean_positive`.
        all_grad: Gradient with respect to the means of all ranks, shape (all_rows,).
    """
    local = slice(local_start, local_start + len(z))
    shares = (all_grad / _num_positives(classes))[:, None]
    sums, weighted = _class_sums(all_z, classes), _class_sums(all_z * shares, classes)
    local_classes, local_shares = classes[local], shares[local]
    as_anchor = local_shares * (sums[local_classes] - z)
    return as_anchor + weighted[local_classes] - local_shares * z


def _class_sums(rows: Tensor, classes: Tensor) -> Tensor:
    return torch.zeros_like(rows).index_add_(0, classes, rows)


def _num_positives(classes: Tensor) -> Tensor:
    """Return the number of other rows of each row's class, at least 1."""
    sizes = torch.zeros_like(classes).index_add_(0, classes, torch.ones_like(classes))
    return (sizes[classes] - 1).clamp(min=1)
