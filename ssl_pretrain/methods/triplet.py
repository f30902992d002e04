"""Triplet loss with semi-hard mining (Schroff, Kalenichenko, Philbin, CVPR 2015, arXiv:1503.03832).

Every pair of an anchor and a positive is compared with the closest negative that is farther away
than the positive, or else with the farthest one. That is the mining of tensorflow/addons at 0.20
(losses/triplet.py), over the global batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_pretrain.losses.pairs import Pairs, all_pairs
from ssl_pretrain.losses.upcast import upcast
from ssl_pretrain.methods.base import Embeddings, GroupedPairs, LossOutput, MethodConfig
from ssl_pretrain.models.backbones import Backbone
from ssl_pretrain.models.heads import mlp
from ssl_pretrain.schema import setting

SMALL = {"projector_dims": [256, 128]}


@dataclass
class Config(MethodConfig):
    """Configuration of the triplet loss."""

    name: str = "triplet"
    pairs: Literal["views", "labels"] = setting(
        "views", "Positives. views: two views of an image. labels: images of one class."
    )
    margin: float = setting(0.2, "Margin alpha between squared distances of unit vectors.")
    projector_dims: list[int] = setting([2048, 128], "Widths of the projector's layers.")

    def build(self, backbone: Backbone) -> Triplet:
        """Build the triplet method on top of a backbone."""
        return Triplet(self, backbone)


class Triplet(GroupedPairs):
    """Triplet loss with semi-hard negatives mined from the global batch."""

    def __init__(self, config: Config, backbone: Backbone):
        super().__init__(config, backbone, mlp(backbone.feature_dim, *config.projector_dims))

    def loss(self, embeddings: Embeddings, targets: Embeddings) -> LossOutput:
        """Return the mean triplet loss over positive pairs, and log the share of nonzero terms."""
        z_a, z_b = F.normalize(upcast(embeddings["z_a"])), F.normalize(upcast(embeddings["z_b"]))
        pairs = all_pairs(z_a, z_b, targets["groups"])
        negative_distance = semi_hard_distance(pairs)
        terms = F.relu(self.config.margin + pairs.squared_distance - negative_distance)
        loss = pairs.mean(terms, pairs.positive)  # equation 3
        active = (terms.detach() > 0).to(terms.dtype)
        return LossOutput(loss, {"active": pairs.mean(active, pairs.positive)})


def semi_hard_distance(pairs: Pairs) -> Tensor:
    """Return the squared distance of the negative that each pair is compared with.

    That is the closest negative farther away than the pair's candidate, or else the farthest one.
    The result has the shape of `pairs.squared_distance` and carries its gradient.
    """
    distance = pairs.squared_distance.detach()
    ascending, candidate = distance.masked_fill(~pairs.negative, float("inf")).sort(dim=1)
    last = (pairs.negative.sum(1, keepdim=True) - 1).clamp(min=0)
    position = torch.searchsorted(ascending, distance, right=True).minimum(last)
    return pairs.squared_distance.gather(1, candidate.gather(1, position))
