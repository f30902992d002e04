"""Triplet loss with semi-hard mining (Schroff, Kalenichenko, Philbin, CVPR 2015, arXiv:1503.03832).

Each anchor-positive pair is completed by the closest negative that is farther from the anchor than
the positive. If there is no such negative, the farthest one is taken. Negatives are mined from the
global batch, as in tensorflow/addons 0.20 (losses/triplet.py).
"""

from dataclasses import dataclass
from typing import Literal

from ssl_pretrain.losses.metric_learning import triplet_terms
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

    negatives = "mined"

    def loss(self, embeddings: Embeddings, targets: Embeddings) -> LossOutput:
        """Return the mean triplet loss of positive pairs, and log the fraction of nonzero terms."""
        terms = triplet_terms(  # equation 3
            embeddings["z_a"],
            embeddings["z_b"],
            targets["groups"],
            margin=self.config.margin,
        )
        return LossOutput(terms.loss, {"active": terms.active})
