"""Multi-class N-pair loss (Sohn, NeurIPS 2016; no arXiv): an anchor's positive against the positives of all other pairs.

Inner products, not cosines, held in check by a penalty on the embeddings' squared length; where several pairs are of one
class, the target is shared among them, as in TensorFlow's npairs_loss (tensorflow/addons at 0.20, losses/npairs.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_pretrain.distributed import collectives
from ssl_pretrain.methods.base import Embeddings, Method, MethodConfig, Views, two_views, wide
from ssl_pretrain.models.backbones import Backbone
from ssl_pretrain.models.heads import mlp
from ssl_pretrain.schema import setting

SMALL = {"projector_dims": [256, 128]}


@dataclass
class Config(MethodConfig):
    """Configuration of the N-pair loss."""

    name: str = "n_pair"
    pairs: Literal["views", "labels"] = setting(
        "views", "Positives. views: two views of an image. labels: images of one class."
    )
    length_weight: float = setting(
        0.002, "Weight of a quarter of the embeddings' mean squared length."
    )
    projector_dims: list[int] = setting([2048, 128], "Widths of the projector's layers.")

    def build(self, backbone: Backbone) -> NPair:
        return NPair(self, backbone)


class NPair(Method):
    couples_batch = True

    def __init__(self, config: Config, backbone: Backbone):
        super().__init__(config, backbone)
        self.needs_labels = config.pairs == "labels"
        self.projector = mlp(backbone.feature_dim, *config.projector_dims)

    def forward(self, batch: Views) -> Embeddings:
        z_a, z_b = (self.projector(self.backbone(view)) for view in two_views("n_pair", batch))
        return {"z_a": z_a, "z_b": z_b}  # (local_batch, dim)

    @torch.no_grad()
    def targets(self, batch: Views) -> Embeddings:
        return {"groups": batch.labels if self.needs_labels else batch.indices}

    def loss(self, embeddings: Embeddings, targets: Embeddings) -> tuple[Tensor, dict[str, Tensor]]:
        z_a, z_b = wide(embeddings["z_a"]), wide(embeddings["z_b"])
        same = (targets["groups"][:, None] == collectives.gather(targets["groups"])).to(z_a.dtype)
        n_pair = F.cross_entropy(
            z_a @ collectives.gather(z_b).T, same / same.sum(1, keepdim=True)
        )  # eq. 7
        length = z_a.square().sum(1).mean() + z_b.square().sum(1).mean()
        return n_pair + self.config.length_weight / 4 * length, {
            "n_pair": n_pair.detach(),
            "squared_length": length.detach() / 2,
        }
