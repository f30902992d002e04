"""Pairwise contrastive loss (Hadsell, Chopra, LeCun, CVPR 2006, equation 4).

Positive pairs are pulled together, and negative pairs are pushed apart up to a margin. A positive
pair consists of two views of an image, or of two images of the same class. Positive and negative
pairs each have weight one half, because the paper samples them equally often. There is no official
code.
"""

from dataclasses import dataclass
from typing import Literal

from ssl_pretrain.losses.metric_learning import pairwise_terms
from ssl_pretrain.methods.base import Embeddings, GroupedPairs, LossOutput, MethodConfig
from ssl_pretrain.models.components import Backbone
from ssl_pretrain.schema import DIMENSIONLESS, setting

SMALL_CONFIG = {"projector_dims": [256, 128], "unit_length": True}


@dataclass
class Config(MethodConfig):
    """Configuration of the pairwise contrastive loss."""

    name: str = "pairwise"
    pairs: Literal["views", "labels"] = setting(
        "views", "Positive pairs. views: two views of an image. labels: images of the same class."
    )
    margin: float = setting(
        1.0, "Distance beyond which negative pairs have no loss.", unit=DIMENSIONLESS
    )
    unit_length: bool = setting(False, "Normalize the embeddings. The paper does not.")
    projector_dims: list[int] = setting([2048, 128], "Widths of the projector's layers.")

    def build(self, backbone: Backbone) -> GroupedPairs:
        """Build the pairwise contrastive method on top of a backbone."""
        return Pairwise(self, backbone)


class Pairwise(GroupedPairs):
    """Contrastive loss with a margin over all pairs of embeddings in the global batch."""

    negatives = "embeddings"

    def loss(self, embeddings: Embeddings, targets: Embeddings) -> LossOutput:
        """Return the average of the mean losses of positive and negative pairs, and log both."""
        terms = pairwise_terms(  # equation 4
            embeddings["z_a"],
            embeddings["z_b"],
            targets["groups"],
            margin=self.config.margin,
            unit_length=self.config.unit_length,
        )
        return LossOutput(terms.mean(), {"pulled": terms.attraction, "pushed": terms.repulsion})
