"""Losses on distances between groups of images: triplets, N-pairs and pairs with a margin.

A group is the two views of an image, or with labels all images of one class. Pairs are formed over
the global batch.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.losses.arguments import (
    check_embeddings,
    check_labels,
    check_not_negative,
    check_two_images,
)
from ssl_pretrain.losses.similarity import Pairs, all_pairs, upcast


class TripletTerms(NamedTuple):
    """The triplet loss and the fraction of positive pairs whose term is not 0."""

    loss: Tensor
    active: Tensor


def triplet(
    z_a: Tensor, z_b: Tensor, labels: Tensor | None = None, *, margin: float = 0.2
) -> Tensor:
    """Triplet loss with semi-hard negatives, mined from the global batch.

    Implements equation 3 of Schroff, Kalenichenko and Philbin, CVPR 2015 (arXiv:1503.03832). Each
    anchor-positive pair is completed by the closest negative that is farther from the anchor than
    the positive, or else by the farthest negative.

    Args:
        z_a: Embeddings of the first view, shape (local_batch, dim). Normalized inside.
        z_b: Embeddings of the second view, same shape. Row i is the same image as ``z_a[i]``.
        labels: Class of each image, integers of shape (local_batch,). Embeddings of one class are
            positives of each other. The global batch needs at least two classes. By default only
            the two views of an image are positives.
        margin: Amount by which the squared distance to the negative should exceed that to the
            positive. Squared distances of unit vectors are at most 4. The paper uses 0.2.

    Returns:
        Scalar loss whose mean over ranks is the mean over all positive pairs of the global batch,
        in units of squared distance.

    Raises:
        ValueError: If the shapes do not match, the labels are not integers, the margin is
            negative, or the global batch is a single image.

    Example:
        >>> same = torch.ones(4, 3)
        >>> triplet(same, same)  # the margin, the loss after a collapse
        tensor(0.2000)
    """
    return triplet_terms(z_a, z_b, labels, margin=margin).loss


def triplet_terms(
    z_a: Tensor, z_b: Tensor, labels: Tensor | None, *, margin: float
) -> TripletTerms:
    """Return the loss of `triplet` and the fraction of its terms that are not 0.

    The arguments and errors are those of `triplet`.
    """
    groups = _check_groups("triplet", z_a, z_b, labels)
    check_not_negative("triplet", margin=margin)
    pairs = all_pairs(F.normalize(upcast(z_a)), F.normalize(upcast(z_b)), groups)
    to_negative = squared_semi_hard_distance(pairs)
    terms = F.relu(margin + pairs.squared_distance - to_negative)
    active = (terms.detach() > 0).to(terms.dtype)
    loss = pairs.mean(terms, pairs.is_positive)  # equation 3
    return TripletTerms(loss, pairs.mean(active, pairs.is_positive))


def squared_semi_hard_distance(pairs: Pairs) -> Tensor:
    """Return the squared distance from the anchor to the semi-hard negative of each pair.

    The semi-hard negative is the closest negative that is farther from the anchor than the pair's
    candidate. If there is none, it is the farthest negative. The result has the shape of
    `pairs.squared_distance`, and gradients flow through it.
    """
    distances = pairs.squared_distance.detach()
    negative_distances = distances.masked_fill(~pairs.is_negative, float("inf"))
    sorted_distances, sorted_candidates = negative_distances.sort(dim=1)
    last_position = (pairs.is_negative.sum(1, keepdim=True) - 1).clamp(min=0)
    position = torch.searchsorted(sorted_distances, distances, right=True)
    negatives = sorted_candidates.gather(1, position.minimum(last_position))
    return pairs.squared_distance.gather(1, negatives)


class NPairTerms(NamedTuple):
    """Cross entropy of the N-pair loss, and the sum of both views' mean squared lengths."""

    n_pair: Tensor
    squared_length: Tensor

    def weighted_sum(self, *, length_weight: float) -> Tensor:
        """Return the loss, whose penalty is a quarter of the squared length times its weight."""
        return self.n_pair + length_weight / 4 * self.squared_length


def n_pair(
    z_a: Tensor, z_b: Tensor, labels: Tensor | None = None, *, length_weight: float = 0.002
) -> Tensor:
    """Multi-class N-pair loss, over the global batch.

    Implements equation 7 of Sohn, NeurIPS 2016. Each ``z_a`` is an anchor whose positive, in
    ``z_b``, competes with the positives of all other pairs. Logits are inner products. If several
    pairs belong to one class, they share the target equally, as in TensorFlow Addons.

    Args:
        z_a: Embeddings of the anchors, shape (local_batch, dim). Not normalized.
        z_b: Embeddings of their positives, same shape.
        labels: Class of each pair, integers of shape (local_batch,). By default each pair is a
            class of its own.
        length_weight: Weight of the penalty on the length of the embeddings. The penalty is a
            quarter of the sum of the mean squared lengths of both tensors.

    Returns:
        Scalar mean over this rank's anchors, in nats, plus the penalty. The mean over ranks is the
        global loss.

    Raises:
        ValueError: If the shapes do not match, the labels are not integers, the weight is negative,
            or the global batch is a single image.

    Example:
        >>> z = torch.eye(4)
        >>> n_pair(z, z, length_weight=0.0)  # ln(1 + 3 / e)
        tensor(0.74...)
    """
    check_not_negative("n_pair", length_weight=length_weight)
    return n_pair_terms(z_a, z_b, labels).weighted_sum(length_weight=length_weight)


def n_pair_terms(z_a: Tensor, z_b: Tensor, labels: Tensor | None) -> NPairTerms:
    """Return the two terms of `n_pair`, before they are weighted.

    The arguments and errors are those of `n_pair`.
    """
    groups = _check_groups("n_pair", z_a, z_b, labels)
    z_a, z_b = upcast(z_a), upcast(z_b)
    with torch.autocast(z_a.device.type, enabled=False):
        logits = z_a @ collectives.gather(z_b).T
    same_group = (groups[:, None] == collectives.gather(groups)).to(z_a.dtype)
    targets = same_group / same_group.sum(1, keepdim=True)
    cross_entropy = F.cross_entropy(logits, targets)  # equation 7
    squared_length = z_a.square().sum(1).mean() + z_b.square().sum(1).mean()
    return NPairTerms(cross_entropy, squared_length)


class PairwiseTerms(NamedTuple):
    """Mean losses of the positive and of the negative pairs."""

    attraction: Tensor
    repulsion: Tensor

    def mean(self) -> Tensor:
        """Return the loss, in which positive and negative pairs have weight one half."""
        return (self.attraction + self.repulsion) / 2


def pairwise(
    z_a: Tensor,
    z_b: Tensor,
    labels: Tensor | None = None,
    *,
    margin: float = 1.0,
    unit_length: bool = False,
) -> Tensor:
    """Contrastive loss with a margin, over all pairs of the global batch.

    Implements equation 4 of Hadsell, Chopra and LeCun, CVPR 2006. Positive pairs are pulled
    together, and negative pairs are pushed apart up to a margin. Positive and negative pairs each
    have weight one half, because the paper samples them equally often.

    Args:
        z_a: Embeddings of the first view, shape (local_batch, dim).
        z_b: Embeddings of the second view, same shape. Row i is the same image as ``z_a[i]``.
        labels: Class of each image, integers of shape (local_batch,). Embeddings of one class are
            positive pairs. By default only the two views of an image are.
        margin: Distance beyond which negative pairs have no loss.
        unit_length: Normalize the embeddings. The paper does not.

    Returns:
        Scalar loss whose mean over ranks is the loss of the global batch, in units of squared
        distance.

    Raises:
        ValueError: If the shapes do not match, the labels are not integers, the margin is
            negative, or the global batch is a single image.

    Example:
        >>> same = torch.zeros(4, 3)
        >>> pairwise(same, same, margin=2.0)  # margin ** 2 / 4
        tensor(1.0000)
    """
    return pairwise_terms(z_a, z_b, labels, margin=margin, unit_length=unit_length).mean()


def pairwise_terms(
    z_a: Tensor, z_b: Tensor, labels: Tensor | None, *, margin: float, unit_length: bool
) -> PairwiseTerms:
    """Return the mean losses of the positive and the negative pairs of `pairwise`.

    The arguments and errors are those of `pairwise`.
    """
    groups = _check_groups("pairwise", z_a, z_b, labels)
    check_not_negative("pairwise", margin=margin)
    z_a, z_b = upcast(z_a), upcast(z_b)
    if unit_length:
        z_a, z_b = F.normalize(z_a), F.normalize(z_b)
    pairs = all_pairs(z_a, z_b, groups)
    distance = pairs.squared_distance.clamp(min=1e-12).sqrt()
    hinge = F.relu(margin - distance)
    attraction = pairs.mean(pairs.squared_distance / 2, pairs.is_positive)
    repulsion = pairs.mean(hinge.square() / 2, pairs.is_negative)
    return PairwiseTerms(attraction, repulsion)


def _check_groups(loss: str, z_a: Tensor, z_b: Tensor, labels: Tensor | None) -> Tensor:
    """Return the group of each image, shape (local_batch,), from checked arguments.

    The group is the label, or else the index of the image in the global batch.

    Raises:
        ValueError: If the shapes do not match, the labels are not integers, or the global batch is
            a single image.
    """
    check_embeddings(loss, z_a=z_a, z_b=z_b)
    check_two_images(loss, z_a)
    if labels is None:
        return torch.arange(len(z_a), device=z_a.device) + process_group.rank() * len(z_a)
    check_labels(loss, labels, len(z_a))
    return labels
