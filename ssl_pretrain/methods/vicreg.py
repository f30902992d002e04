"""VICReg (Bardes, Ponce, LeCun, ICLR 2022, arXiv:2105.04906).

The loss needs neither negatives nor a teacher. The projector and the loss follow
facebookresearch/vicreg at 4e12602f (main_vicreg.py). The variance term is averaged over both views,
and the covariance term is summed over them. Both are computed over the global batch.
"""

from dataclasses import dataclass

from ssl_pretrain.losses import redundancy
from ssl_pretrain.methods.base import Embeddings, LossOutput, Method, MethodConfig, SeparatePairs
from ssl_pretrain.models.components import Backbone, mlp
from ssl_pretrain.schema import setting

SMALL_CONFIG = {"projector_dims": [512, 512, 512]}


@dataclass
class Config(MethodConfig):
    """Configuration of VICReg."""

    name: str = "vicreg"
    projector_dims: list[int] = setting([8192, 8192, 8192], "Widths of the projector's layers.")
    invariance_weight: float = setting(25.0, "Weight lambda of the invariance term.")
    variance_weight: float = setting(25.0, "Weight mu of the variance term.")
    covariance_weight: float = setting(1.0, "Weight nu of the covariance term.")

    def build(self, backbone: Backbone) -> Method:
        """Build VICReg on top of a backbone."""
        return VICReg(self, backbone)


class VICReg(SeparatePairs):
    """Variance, invariance and covariance regularization of two views' embeddings."""

    def __init__(self, config: Config, backbone: Backbone):
        super().__init__(config, backbone)
        self.projector = mlp(
            backbone.feature_dim, *config.projector_dims, hidden_bias=True, last_bias=False
        )

    def loss(self, embeddings: Embeddings, targets: Embeddings) -> LossOutput:
        """Return the weighted sum of the three terms, and log each term."""
        terms = redundancy.vicreg_terms(embeddings["z_a"], embeddings["z_b"])
        loss = terms.weighted_sum(  # equation 6
            invariance_weight=self.config.invariance_weight,
            variance_weight=self.config.variance_weight,
            covariance_weight=self.config.covariance_weight,
        )
        return LossOutput(loss, terms._asdict())
