"""Alignment and uniformity (Wang and Isola, ICML 2020, arXiv:2005.10242).

The two views of an image are pulled together while all images spread over the unit sphere.
Uniformity is computed for each view separately and averaged, as in the authors' code (README of
ssnl/align_uniform).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.losses import similarity, tiles
from ssl_pretrain.methods.base import Embeddings, LossOutput, Method, MethodConfig
from ssl_pretrain.models.components import Backbone, mlp
from ssl_pretrain.schema import DIMENSIONLESS, setting
from ssl_pretrain.views.batch import Batch

SMALL_CONFIG = {"projector_dims": [256, 128]}


@dataclass
class Config(MethodConfig):
    """Configuration of alignment and uniformity."""

    name: str = "align_uniform"
    align_weight: float = setting(1.0, "Weight of the alignment loss.")
    uniform_weight: float = setting(1.0, "Weight of the uniformity loss.")
    alpha: float = setting(
        2.0, "Power of the distance between two views of an image.", unit=DIMENSIONLESS
    )
    t: float = setting(
        2.0, "Sharpness of the Gaussian kernel between two images.", unit=DIMENSIONLESS
    )
    projector_dims: list[int] = setting([2048, 128], "Widths of the projector's layers.")

    def build(self, backbone: Backbone) -> Method:
        """Build the alignment and uniformity method on top of a backbone."""
        return AlignUniform(self, backbone)


class AlignUniform(Method):
    """Alignment of the views of an image, and uniformity of all images on the unit sphere."""

    couples = "embeddings"

    def __init__(self, config: Config, backbone: Backbone):
        super().__init__(config, backbone)
        self.projector = mlp(backbone.feature_dim, *config.projector_dims, batch_norm=False)

    def forward(self, batch: Batch) -> Embeddings:
        """Return the embeddings of both views from one forward pass, each (local_batch, dim)."""
        z_a, z_b = self.projector(self.backbone(torch.cat(self.two_views(batch)))).chunk(2)
        return {"z_a": z_a, "z_b": z_b}

    def loss(self, embeddings: Embeddings, targets: Embeddings) -> LossOutput:
        """Return the weighted sum of the alignment and uniformity losses, and log both."""
        z_a, z_b = (
            F.normalize(similarity.upcast(embeddings["z_a"])),
            F.normalize(similarity.upcast(embeddings["z_b"])),
        )
        alpha, t = self.config.alpha, self.config.t
        squared_distance = (z_a - z_b).square().sum(1).clamp(min=1e-12)
        align = squared_distance.pow(alpha / 2).mean()  # L_align of section 4.1
        uniform = (log_mean_gaussian(z_a, t) + log_mean_gaussian(z_b, t)) / 2  # L_uniform
        loss = self.config.align_weight * align + self.config.uniform_weight * uniform
        return LossOutput(loss, {"align": align, "uniform": uniform})


def log_mean_gaussian(z: Tensor, t: float) -> Tensor:
    """Return the logarithm of the mean of exp(-t |z_i - z_j|^2) over all pairs of the global batch.

    Args:
        z: Embeddings of unit length, shape (local_batch, dim).
        t: Sharpness of the Gaussian kernel.

    Returns:
        Scalar, at most 0 and the same on all ranks.
    """
    # |z_i - z_j|^2 = 2 - 2 z_i @ z_j for unit vectors
    log_row_sums, _ = tiles.symmetric_log_sum_exp(z, scale=2 * t)
    total = collectives.reduce_sum(torch.exp(log_row_sums - 2 * t).sum())
    num_rows = len(z) * process_group.world_size()
    return torch.log(total) - math.log(num_rows * (num_rows - 1))
