"""VICReg (Bardes, Ponce, LeCun, ICLR 2022, arXiv:2105.04906): two views, no negatives, no teacher.

Projector and loss follow facebookresearch/vicreg at 4e12602f (main_vicreg.py): the variance term is the mean of both
branches', the covariance term their sum, both over the global batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from ssl_pretrain.losses.second_moments import Block, covariance
from ssl_pretrain.methods.base import Embeddings, Method, MethodConfig, Views, two_views, wide
from ssl_pretrain.models.backbones import Backbone
from ssl_pretrain.models.heads import mlp
from ssl_pretrain.schema import setting

SMALL = {"projector_dims": [512, 512, 512]}


@dataclass
class Config(MethodConfig):
    """Configuration of VICReg."""

    name: str = "vicreg"
    projector_dims: list[int] = setting([8192, 8192, 8192], "Widths of the expander's layers.")
    invariance_weight: float = setting(25.0, "Weight lambda of the invariance term.")
    variance_weight: float = setting(25.0, "Weight mu of the variance term.")
    covariance_weight: float = setting(1.0, "Weight nu of the covariance term.")

    def build(self, backbone: Backbone) -> VICReg:
        return VICReg(self, backbone)


class VICReg(Method):
    couples_batch = True

    def __init__(self, config: Config, backbone: Backbone):
        super().__init__(config, backbone)
        self.projector = mlp(
            backbone.feature_dim, *config.projector_dims, hidden_bias=True, last_bias=False
        )

    def forward(self, batch: Views) -> Embeddings:
        z_a, z_b = (self.projector(self.backbone(view)) for view in two_views("vicreg", batch))
        return {"z_a": z_a, "z_b": z_b}  # (local_batch, dim)

    def loss(self, embeddings: Embeddings, targets: Embeddings) -> tuple[Tensor, dict[str, Tensor]]:
        z_a, z_b = wide(embeddings["z_a"]), wide(embeddings["z_b"])
        of_a, of_b = covariance(z_a), covariance(z_b)
        terms = {
            "invariance": F.mse_loss(z_a, z_b),  # over images and dimensions
            "variance": (too_little_variance(of_a) + too_little_variance(of_b)) / 2,
            "covariance": squared_covariance(of_a) + squared_covariance(of_b),
        }
        loss = (  # eq. 6
            self.config.invariance_weight * terms["invariance"]
            + self.config.variance_weight * terms["variance"]
            + self.config.covariance_weight * terms["covariance"]
        )
        return loss, {name: term.detach() for name, term in terms.items()}


def too_little_variance(covariance: Block) -> Tensor:
    """The mean over dimensions of the hinge below a deviation of 1: eq. 1."""
    deviation = (covariance.diagonal() + 1e-4).sqrt()
    return covariance.share * F.relu(1 - deviation).sum() / len(covariance.values)


def squared_covariance(covariance: Block) -> Tensor:
    """The sum of squares off the diagonal, over the dimension: eq. 4."""
    return covariance.share * covariance.off_diagonal().square().sum() / len(covariance.values)
