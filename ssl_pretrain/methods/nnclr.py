"""NNCLR (Dwibedi et al., ICCV 2021, arXiv:2104.14548): the positive of an image is its nearest neighbour among past embeddings.

There is no official code; heads follow the paper as lightly at e8d317fc and solo-learn at 9187ea39 (nnclr.py) read it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_pretrain.losses.contrastive import info_nce
from ssl_pretrain.methods.base import Embeddings, Method, MethodConfig, Views, two_views, wide
from ssl_pretrain.models.backbones import Backbone
from ssl_pretrain.models.heads import mlp
from ssl_pretrain.models.queue import Queue, check_queue
from ssl_pretrain.schema import setting

SMALL = {
    "projector_dims": [256, 256, 128],
    "predictor_dim": 512,
    "queue_size": 4096,
    "temperature": 0.2,
}


@dataclass
class Config(MethodConfig):
    """Configuration of NNCLR."""

    name: str = "nnclr"
    projector_dims: list[int] = setting([2048, 2048, 256], "Widths of the projector's layers.")
    predictor_dim: int = setting(4096, "Width of the predictor's hidden layer.")
    temperature: float = setting(0.1, "Divisor of the cosine similarities.")
    queue_size: int = setting(98304, "Number of past embeddings searched for nearest neighbors.")

    def check(self, run: Any, world_size: int) -> None:
        check_queue(self.queue_size, run.global_batch_size)

    def build(self, backbone: Backbone) -> NNCLR:
        return NNCLR(self, backbone)


class NNCLR(Method):
    couples_batch = True

    def __init__(self, config: Config, backbone: Backbone):
        super().__init__(config, backbone)
        self.projector = mlp(backbone.feature_dim, *config.projector_dims, last_batch_norm=True)
        dim = config.projector_dims[-1]
        self.predictor = mlp(dim, config.predictor_dim, dim)
        self.queue = Queue(config.queue_size, dim)

    def forward(self, batch: Views) -> Embeddings:
        z_a, z_b = (self.projector(self.backbone(view)) for view in two_views("nnclr", batch))
        p_a, p_b = self.predictor(z_a), self.predictor(z_b)
        return {
            "z_a": z_a.detach(),
            "z_b": z_b.detach(),
            "p_a": p_a,
            "p_b": p_b,
        }  # (local_batch, dim)

    def loss(self, embeddings: Embeddings, targets: Embeddings) -> tuple[Tensor, dict[str, Tensor]]:
        near_a, near_b = (nearest(embeddings[name], self.queue.rows) for name in ("z_a", "z_b"))
        a_to_b = info_nce(near_a, embeddings["p_b"], temperature=self.config.temperature)
        b_to_a = info_nce(near_b, embeddings["p_a"], temperature=self.config.temperature)
        similarity = F.cosine_similarity(near_a, wide(embeddings["z_a"].detach())).mean()
        return (a_to_b + b_to_a) / 2, {"neighbour_cosine": similarity}

    @torch.no_grad()
    def after_step(self, progress: float, embeddings: Embeddings, targets: Embeddings) -> None:
        self.queue.push(F.normalize(wide(embeddings["z_a"])), self.stepped)


@torch.no_grad()
def nearest(z: Tensor, past: Tensor) -> Tensor:
    """The row of `past` (queue_size, dim), of unit length, with the largest cosine to each of `z` (local_batch, dim)."""
    return past[(F.normalize(wide(z)) @ past.to(wide(z).dtype).T).argmax(1)].to(wide(z).dtype)
