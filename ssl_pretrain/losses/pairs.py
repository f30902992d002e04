"""What the losses over pairs share: this rank's embeddings as anchors, those of all ranks as candidates, and who is alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ssl_pretrain.distributed import collectives, process_group


@dataclass(frozen=True)
class Pairs:
    """Anchors and candidates of both views. `alike` and `unlike` leave out an anchor's pair with itself."""

    squared_distance: Tensor  # (2 * local_batch, 2 * global_batch), with the gradient of both sides
    alike: Tensor  # of one group, likewise bool
    unlike: Tensor

    def mean(self, terms: Tensor, chosen: Tensor) -> Tensor:
        """This rank's share of the mean of `terms` over the pairs that all ranks chose: its mean over ranks is that mean."""
        count = collectives.reduce_sum(chosen.sum().to(terms.dtype))
        return process_group.world_size() * (terms * chosen).sum() / count.clamp(min=1)


def every_pair(z_a: Tensor, z_b: Tensor, groups: Tensor) -> Pairs:
    """All pairs of an embedding of this rank with one of the global batch.

    Args:
        z_a, z_b: embeddings of two views, (local_batch, dim).
        groups: (local_batch,) integers; images of one group are alike: labels, or the image's number.
    """
    own = torch.cat([z_a, z_b])
    numbers = torch.arange(len(own), device=own.device) + process_group.rank() * len(own)
    everyone, all_groups = collectives.gather(own), collectives.gather(groups.repeat(2))
    squares = own.square().sum(1)[:, None] + everyone.square().sum(1) - 2 * own @ everyone.T
    alike = groups.repeat(2)[:, None] == all_groups
    other = numbers[:, None] != torch.arange(len(everyone), device=own.device)
    return Pairs(squares.clamp(min=0), alike & other, ~alike)
