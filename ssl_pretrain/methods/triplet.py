"""Triplet loss with semi-hard mining (Schroff, Kalenichenko, Philbin, CVPR 2015, arXiv:1503.03832).

Each anchor-positive pair is completed by the closest negative that is farther from the anchor than
the positive. If there is no such negative, the farthest one is taken. Negatives are mined from the
global batch, as in tensorflow/addons 0.20 (losses/triplet.py).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_pretrain.losses.similarity import Pairs, all_pairs, upcast
from ssl_pretrain.methods.base import Embeddings, GroupedPairs, LossOutput, MethodConfig
from ssl_pretrain.models.components import Backbone
from ssl_pretrain.schema import DIMENSIONLESS, setting

SMALL_CONFIG = {"projector_dims": [256, 128]}


@dataclass
class Config(MethodConfig):
    """Configuration of the triplet loss."""

    name: str = "triplet"
    pairs: Literal["views", "labels"] = setting(
        "views", "Positives. views: two views of an image. labels: images of one class."
    )
    margin: float = setting(
        0.2, "Margin alpha between squared distances of unit vectors.", unit=DIMENSIONLESS
    )
    projector_dims: list[int] = setting([2048, 128], "Widths of the projector's layers.")

    def build(self, backbone: Backbone) -> GroupedPairs:
        """Build the triplet method on top of a backbone."""
        return Triplet(self, backbone)


class Triplet(GroupedPairs):
    """Triplet loss with semi-hard negatives mined from the global batch."""

    def loss(self, embeddings: Embeddings, targets: Embeddings) -> LossOutput:
        """Return the mean triplet loss of positive pairs, and log the fraction of nonzero terms."""
        z_a, z_b = F.normalize(upcast(embeddings["z_a"])), F.normalize(upcast(embeddings["z_b"]))
        pairs = all_pairs(z_a, z_b, targets["groups"])
        to_negative = squared_semi_hard_distance(pairs)
        terms = F.relu(self.config.margin + pairs.squared_distance - to_negative)
        active = (terms.detach() > 0).to(terms.dtype)
        loss = pairs.mean(terms, pairs.is_positive)  # equation 3
        return LossOutput(loss, {"active": pairs.mean(active, pairs.is_positive)})


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
