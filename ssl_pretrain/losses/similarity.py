"""Similarities and distances between embeddings, and means over their positive pairs."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_pretrain.distributed import collectives, process_group


def upcast(z: Tensor) -> Tensor:
    """Return `z` in float32, or unchanged if it is float64.

    Under autocast embeddings are bfloat16, which is too coarse for similarities and exponentials.
    """
    return z if z.dtype == torch.float64 else z.float()


def mean_cosine(a: Tensor, b: Tensor) -> Tensor:
    """Return the mean over rows of the cosine similarity of two (rows, dim) tensors."""
    return F.cosine_similarity(upcast(a), upcast(b), dim=1).mean()


@dataclass(frozen=True)
class Pairs:
    """Pairs of an anchor of this rank with a candidate of the global batch, both views of each.

    Every tensor has shape (2 * local_batch, 2 * global_batch).

    Attributes:
        squared_distance: Squared Euclidean distance. Gradients flow to both embeddings.
        positive: True where both belong to the same group and are not the same embedding.
        negative: True where they belong to different groups.
    """

    squared_distance: Tensor
    positive: Tensor
    negative: Tensor

    def mean(self, terms: Tensor, mask: Tensor) -> Tensor:
        """Return this rank's share of the mean of `terms` over the masked pairs of all ranks.

        The mean of the shares over ranks is the mean over all ranks' pairs.
        """
        count = collectives.reduce_sum(mask.sum().to(terms.dtype))
        return process_group.world_size() * (terms * mask).sum() / count.clamp(min=1)


def all_pairs(z_a: Tensor, z_b: Tensor, groups: Tensor) -> Pairs:
    """Pair each embedding of this rank with all embeddings of the global batch.

    Args:
        z_a: Embeddings of the first view, shape (local_batch, dim).
        z_b: Embeddings of the second view, same shape.
        groups: Group of each image, integers of shape (local_batch,), such as its label or its
            number. Images of the same group are positives of each other.
    """
    anchors, groups = torch.cat([z_a, z_b]), groups.repeat(2)
    candidates, candidate_groups = collectives.gather(anchors), collectives.gather(groups)
    squared_norms = anchors.square().sum(1)[:, None] + candidates.square().sum(1)
    squares = squared_norms - 2 * anchors @ candidates.T
    same_group = groups[:, None] == candidate_groups
    rows = torch.arange(len(anchors), device=z_a.device) + process_group.rank() * len(anchors)
    same_embedding = rows[:, None] == torch.arange(len(candidates), device=z_a.device)
    return Pairs(squares.clamp(min=0), same_group & ~same_embedding, ~same_group)


def number_classes(labels: Tensor) -> Tensor:
    """Replace labels by numbers below len(labels). The host does not wait for the device."""
    ascending, order = labels.sort()
    is_first = torch.ones_like(ascending)
    is_first[1:] = ascending[1:] != ascending[:-1]
    return torch.empty_like(labels).scatter_(0, order, is_first.cumsum(0) - 1)


def mean_positive(
    z: Tensor, all_z: Tensor, classes: Tensor, local_start: int, scale: float
) -> Tensor:
    """Return the mean of scale * z_i @ z_j over the positives j of each anchor i.

    The positives of an anchor are the other embeddings of its class. Sums per class replace sums
    over pairs, so the cost is linear in the number of embeddings.

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
    sums = _class_sums(all_z, classes)[classes[local]]
    return ((sums - z) * z).sum(1) * scale / _num_positives(classes)[local]


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
    sums = _class_sums(all_z, classes)[classes[local]]
    weighted_sums = _class_sums(all_z * shares, classes)[classes[local]]
    return shares[local] * (sums - z) + weighted_sums - shares[local] * z


def _class_sums(rows: Tensor, classes: Tensor) -> Tensor:
    return torch.zeros_like(rows).index_add_(0, classes, rows)


def _num_positives(classes: Tensor) -> Tensor:
    """Return the number of other rows in each row's class, at least 1."""
    sizes = torch.zeros_like(classes).index_add_(0, classes, torch.ones_like(classes))
    return (sizes[classes] - 1).clamp(min=1)
