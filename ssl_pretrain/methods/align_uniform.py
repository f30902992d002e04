"""Alignment and uniformity (Wang and Isola, ICML 2020, arXiv:2005.10242): views of an image close, images spread over the sphere.

The loss follows the authors' code (ssnl/align_uniform, README): uniformity of each view alone, the mean of both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.losses.tiles import log_sum_exp_among
from ssl_pretrain.methods.base import Embeddings, Method, MethodConfig, Views, two_views, wide
from ssl_pretrain.models.backbones import Backbone
from ssl_pretrain.models.heads import mlp
from ssl_pretrain.schema import setting

SMALL = {"projector_dims": [256, 128]}


@dataclass
class Config(MethodConfig):
    """Configuration of align_uniform."""

    name: str = "align_uniform"
    align_weight: float = setting(1.0, "Weight of the alignment loss.")
    uniform_weight: float = setting(1.0, "Weight of the uniformity loss.")
    alpha: float = setting(2.0, "Power of the distance between two views of an image.")
    t: float = setting(2.0, "Sharpness of the Gaussian between two images.")
    projector_dims: list[int] = setting([2048, 128], "Widths of the projector's layers.")

    def build(self, backbone: Backbone) -> AlignUniform:
        return AlignUniform(self, backbone)


class AlignUniform(Method):
    couples_batch = True

    def __init__(self, config: Config, backbone: Backbone):
        super().__init__(config, backbone)
        self.projector = mlp(backbone.feature_dim, *config.projector_dims, batch_norm=False)

    def forward(self, batch: Views) -> Embeddings:
        z_a, z_b = self.projector(
            self.backbone(torch.cat(two_views("align_uniform", batch)))
        ).chunk(2)
        return {"z_a": z_a, "z_b": z_b}  # (local_batch, dim)

    def loss(self, embeddings: Embeddings, targets: Embeddings) -> tuple[Tensor, dict[str, Tensor]]:
        z_a, z_b = F.normalize(wide(embeddings["z_a"])), F.normalize(wide(embeddings["z_b"]))
        align = (
            (z_a - z_b).square().sum(1).clamp(min=1e-12).pow(self.config.alpha / 2).mean()
        )  # L_align, section 4.1
        uniform = (
            log_mean_gaussian(z_a, self.config.t) + log_mean_gaussian(z_b, self.config.t)
        ) / 2  # L_uniform
        loss = self.config.align_weight * align + self.config.uniform_weight * uniform
        return loss, {"align": align.detach(), "uniform": uniform.detach()}


def log_mean_gaussian(z: Tensor, t: float) -> Tensor:
    """log of the mean over all pairs of the global batch of exp(-t |z_i - z_j|^2), z of unit length: at most 0."""
    others, _ = log_sum_exp_among(
        z, scale=2 * t
    )  # of exp(2 t z_i z_j); the squared distance is 2 - 2 z_i z_j
    count = len(z) * process_group.world_size()
    return torch.log(collectives.reduce_sum(torch.exp(others - 2 * t).sum())) - math.log(
        count * (count - 1)
    )
