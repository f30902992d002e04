"""Triplet loss with semi-hard mining (Schroff, Kalenichenko, Philbin: FaceNet, CVPR 2015, arXiv:1503.03832).

Every pair of an anchor and an image alike meets the closest negative that is farther away than that image or, where there is
none, the farthest: the mining of tensorflow/addons at 0.20 (losses/triplet.py), over the global batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_pretrain.losses.pairs import Pairs, every_pair
from ssl_pretrain.methods.base import Embeddings, Method, MethodConfig, Views, two_views, wide
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
        return Triplet(self, backbone)


class Triplet(Method):
    couples_batch = True

    def __init__(self, config: Config, backbone: Backbone):
        super().__init__(config, backbone)
        self.needs_labels = config.pairs == "labels"
        self.projector = mlp(backbone.feature_dim, *config.projector_dims)

    def forward(self, batch: Views) -> Embeddings:
        z_a, z_b = (self.projector(self.backbone(view)) for view in two_views("triplet", batch))
        return {"z_a": z_a, "z_b": z_b}  # (local_batch, dim)

    @torch.no_grad()
    def targets(self, batch: Views) -> Embeddings:
        return {"groups": batch.labels if self.needs_labels else batch.indices}

    def loss(self, embeddings: Embeddings, targets: Embeddings) -> tuple[Tensor, dict[str, Tensor]]:
        pairs = every_pair(
            F.normalize(wide(embeddings["z_a"])),
            F.normalize(wide(embeddings["z_b"])),
            targets["groups"],
        )
        terms = F.relu(self.config.margin + pairs.squared_distance - semi_hard(pairs))  # eq. 3
        return pairs.mean(terms, pairs.alike), {
            "active": pairs.mean((terms.detach() > 0).to(terms.dtype), pairs.alike)
        }


def semi_hard(pairs: Pairs) -> Tensor:
    """For each anchor and candidate, the squared distance of the negative it is compared with, with its gradient."""
    distance = pairs.squared_distance.detach()
    ordered, number = distance.masked_fill(~pairs.unlike, float("inf")).sort(dim=1)
    last = (pairs.unlike.sum(1, keepdim=True) - 1).clamp(min=0)
    chosen = torch.searchsorted(ordered, distance, right=True).minimum(last)
    return pairs.squared_distance.gather(1, number.gather(1, chosen))
