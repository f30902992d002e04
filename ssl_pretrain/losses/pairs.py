"""All pairs of this rank's embeddings with those of the global batch, for losses over distances."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ssl_pretrain.distributed import collectives, process_group


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
    anchors = torch.cat([z_a, z_b])
    candidates, candidate_groups = collectives.gather(anchors), collectives.gather(groups.repeat(2))
    squared_norms = anchors.square().sum(1)[:, None] + candidates.square().sum(1)
    squares = squared_norms - 2 * anchors @ candidates.T
    same_group = groups.repeat(2)[:, None] == candidate_groups
    device = anchors.device
    rows = torch.arange(len(anchors), device=device) + process_group.rank() * len(anchors)
    different_embeddings = rows[:, None] != torch.arange(len(candidates), device=device)
    return Pairs(squares.clamp(min=0), same_group & different_embeddings, ~same_group)
