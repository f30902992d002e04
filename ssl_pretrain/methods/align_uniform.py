"""Alignment and uniformity (Wang and Isola, ICML 2020, arXiv:2005.10242).

The two views of an image are pulled together while all images spread over the unit sphere.
Uniformity is computed for each view separately and averaged, as in the authors' code (README of
ssnl/align_uniform).
"""

from dataclasses import dataclass

from ssl_pretrain.losses import uniformity
from ssl_pretrain.methods.base import Embeddings, JointPairs, LossOutput, Method, MethodConfig
from ssl_pretrain.models.components import Backbone, mlp
from ssl_pretrain.schema import DIMENSIONLESS, setting

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


class AlignUniform(JointPairs):
    """Alignment of the views of an image, and uniformity of all images on the unit sphere."""

    negatives = "images"

    def __init__(self, config: Config, backbone: Backbone):
        super().__init__(config, backbone)
        self.projector = mlp(backbone.feature_dim, *config.projector_dims, batch_norm=False)

    def loss(self, embeddings: Embeddings, targets: Embeddings) -> LossOutput:
        """Return the weighted sum of the alignment and uniformity losses, and log both."""
        terms = uniformity.align_uniform_terms(  # L_align and L_uniform of section 4.1
            embeddings["z_a"], embeddings["z_b"], alpha=self.config.alpha, t=self.config.t
        )
        loss = terms.weighted_sum(
            align_weight=self.config.align_weight, uniform_weight=self.config.uniform_weight
        )
        return LossOutput(loss, terms._asdict())
