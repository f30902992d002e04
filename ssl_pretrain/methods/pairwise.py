"""Pairwise contrastive loss (Hadsell, Chopra, LeCun, CVPR 2006, equation 4).

Positive pairs are pulled together and negative pairs are pushed apart up to a margin. Positives
are images of one class, or two views of one image. Both kinds of pairs have weight one half
however many there are, as the paper samples them equally often. There is no official code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch.nn import functional as F

from ssl_pretrain.losses.pairs import all_pairs
from ssl_pretrain.losses.upcast import upcast
from ssl_pretrain.methods.base import Embeddings, GroupedPairs, LossOutput, MethodConfig
from ssl_pretrain.models.backbones import Backbone
from ssl_pretrain.models.heads import mlp
from ssl_pretrain.schema import setting

SMALL = {"projector_dims": [256, 128], "unit_length": True}


@dataclass
class Config(MethodConfig):
    """Configuration of the pairwise contrastive loss."""

    name: str = "pairwise"
    pairs: Literal["views", "labels"] = setting(
        "views", "Positives. views: two views of an image. labels: images of one class."
    )
    margin: float = setting(1.0, "Distance beyond which a negative no longer counts.")
    unit_length: bool = setting(False, "Normalize the embeddings. The paper does not.")
    projector_dims: list[int] = setting([2048, 128], "Widths of the projector's layers.")

    def build(self, backbone: Backbone) -> Pairwise:
        """Build the pairwise contrastive method on top of a backbone."""
        return Pairwise(self, backbone)


class Pairwise(GroupedPairs):
    """Contrastive loss with a margin over all pairs of embeddings in the global batch."""

    def __init__(self, config: Config, backbone: Backbone):
        super().__init__(config, backbone, mlp(backbone.feature_dim, *config.projector_dims))

    def loss(self, embeddings: Embeddings, targets: Embeddings) -> LossOutput:
        """Return the average of the mean losses of positive and negative pairs, and log both."""
        z_a, z_b = upcast(embeddings["z_a"]), upcast(embeddings["z_b"])
        if self.config.unit_length:
            z_a, z_b = F.normalize(z_a), F.normalize(z_b)
        pairs = all_pairs(z_a, z_b, targets["groups"])
        distance = pairs.squared_distance.clamp(min=1e-12).sqrt()
        hinge = F.relu(self.config.margin - distance)
        pulled = pairs.mean(pairs.squared_distance / 2, pairs.positive)
        pushed = pairs.mean(hinge.square() / 2, pairs.negative)
        return LossOutput((pulled + pushed) / 2, {"pulled": pulled, "pushed": pushed})
