"""Similarities and distances between embeddings, and means over their positive pairs."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_pretrain.distributed import collectives, process_group


def upcast(z: Tensor) -> Tensor:
    """Return `z` in float32, or unchanged if it is float64.

    Embeddings are bfloat16 under autocast, which is too coarse for similarities and exponentials.
    """
    return z if z.dtype == torch.float64 else z.float()


def row_products(a: Tensor, b: Tensor) -> Tensor:
    """Return the dot product of each row of `a` with the same row of `b`."""
    # torch.linalg.vecdot copies one of them.
    return torch.einsum("nd,nd->n", a, b)


def inverse_lengths(z: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """Return `scale` over the lengths of the rows of `z`, in float32 or wider, without a graph."""
    dtype = torch.promote_types(z.dtype, torch.float32)
    lengths = torch.linalg.vector_norm(z.detach(), dim=1, dtype=dtype)
    return scale / lengths.clamp(min=1e-12)  # the minimum of F.normalize


def normalization_gradient(rows: Tensor, scale: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of rows and of their scale, and overwrite `grad`.

    It takes no memory for a normalized copy of the rows.

    Args:
        rows: Rows before normalization, shape (num_rows, dim).
        scale: Factors of the normalized rows, shape (num_rows,).
        grad: Gradient of the normalized rows times `scale`, shape (num_rows, dim).
    """
    factors = inverse_lengths(rows)
    scale_grad = factors * row_products(rows, grad)
    grad.addcmul_(rows, (-factors * scale_grad)[:, None]).mul_((factors * scale)[:, None])
    return grad, scale_grad


def mean_cosine(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosine similarity of the rows of two (rows, dim) tensors, averaged over rows."""
    return F.cosine_similarity(upcast(a), upcast(b), dim=1).mean()


@dataclass(frozen=True)
class Pairs:
    """Pairs of this rank's embeddings, the anchors, with all embeddings of the global batch.

    Every tensor has shape (2 * local_batch, 2 * global_batch), because images have two views.

    Attributes:
        squared_distance: Squared Euclidean distance. Gradients flow to both embeddings.
        is_positive: True for two different embeddings of the same group.
        is_negative: True for embeddings of different groups.
    """

    squared_distance: Tensor
    is_positive: Tensor
    is_negative: Tensor

    def mean(self, terms: Tensor, mask: Tensor) -> Tensor:
        """Return a scalar whose mean over ranks is the mean of `terms` over all masked pairs.

        Args:
            terms: One number per pair of this rank.
            mask: True for the pairs to average, such as `is_positive`.
        """
        count = collectives.reduce_sum(mask.sum().to(terms.dtype))
        return process_group.world_size() * (terms * mask).sum() / count.clamp(min=1)


def all_pairs(z_a: Tensor, z_b: Tensor, groups: Tensor) -> Pairs:
    """Pair each embedding of this rank with all embeddings of the global batch.

    Args:
        z_a: Embeddings of the first view, shape (local_batch, dim).
        z_b: Embeddings of the second view, same shape.
        groups: Group of each image, integers of shape (local_batch,), such as its label or index.
            Images of the same group are positives of each other.
    """
    anchors, groups = torch.cat([z_a, z_b]), groups.repeat(2)
    candidates, candidate_groups = collectives.gather(anchors), collectives.gather(groups)
    squared_norms = anchors.square().sum(1)[:, None] + candidates.square().sum(1)
    with torch.autocast(z_a.device.type, enabled=False):
        squared_distance = squared_norms - 2 * anchors @ candidates.T
    same_group = groups[:, None] == candidate_groups
    rows = torch.arange(len(anchors), device=z_a.device) + process_group.rank() * len(anchors)
    same_embedding = rows[:, None] == torch.arange(len(candidates), device=z_a.device)
    return Pairs(squared_distance.clamp(min=0), same_group & ~same_embedding, ~same_group)


def class_indices(labels: Tensor) -> Tensor:
    """Number the classes from 0 and return the number of each label's class.

    `torch.unique` would make the host wait for the device. This function does not.

    Args:
        labels: Integers of any size, shape (rows,).
    """
    ascending, order = labels.sort()
    is_first = torch.ones_like(ascending)
    is_first[1:] = ascending[1:] != ascending[:-1]
    return torch.empty_like(labels).scatter_(0, order, is_first.cumsum(0) - 1)


def mean_positive_logits(
    z: Tensor, all_z: Tensor, classes: Tensor, local_start: int, scale: float
) -> Tensor:
    """Return the mean of the logits scale * z_i @ z_j over the positives j of each anchor i.

    The positives of an anchor are the other embeddings of its class. Sums per class replace sums
    over pairs, so the cost is linear in the number of embeddings.

    Args:
        z: Embeddings of this rank, shape (rows, dim).
        all_z: Embeddings of all ranks, shape (all_rows, dim).
        classes: Class indices of all ranks' embeddings, shape (all_rows,).
        local_start: Index of this rank's first row in `all_z`.
        scale: Factor of the similarities, 1 / temperature.

    Returns:
        Tensor of shape (rows,), with 0 for anchors without positives.
    """
    local_rows = slice(local_start, local_start + len(z))
    sums = _class_sums(all_z, classes)[classes[local_rows]]
    return ((sums - z) * z).sum(1) * scale / _num_positives(classes)[local_rows]


def mean_positive_logits_gradient(
    z: Tensor, all_z: Tensor, classes: Tensor, local_start: int, all_grad: Tensor
) -> Tensor:
    """Return the gradient with respect to `z` of all ranks' mean logits, divided by `scale`.

    Args:
        z: As in `mean_positive_logits`.
        all_z: As in `mean_positive_logits`.
        classes: As in `mean_positive_logits`.
        local_start: As in `mean_positive_logits`.
        all_grad: Gradient of the loss with respect to all ranks' means, shape (all_rows,).
    """
    local_rows = slice(local_start, local_start + len(z))
    grad_per_positive = (all_grad / _num_positives(classes))[:, None]
    sums = _class_sums(all_z, classes)[classes[local_rows]]
    weighted_sums = _class_sums(all_z * grad_per_positive, classes)[classes[local_rows]]
    local_grad = grad_per_positive[local_rows]
    return local_grad * (sums - z) + weighted_sums - local_grad * z


def _class_sums(rows: Tensor, classes: Tensor) -> Tensor:
    return torch.zeros_like(rows).index_add_(0, classes, rows)


def _num_positives(classes: Tensor) -> Tensor:
    """Return the number of other rows in each row's class, at least 1."""
    sizes = torch.zeros_like(classes).index_add_(0, classes, torch.ones_like(classes))
    return (sizes[classes] - 1).clamp(min=1)
