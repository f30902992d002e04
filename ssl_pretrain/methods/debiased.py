"""Debiased contrastive learning (Chuang et al., NeurIPS 2020, arXiv:2007.00224).

The loss of SimCLR is corrected for negatives that share the anchor's class. The projector, the loss
and the separate forward pass of each view follow chingyaoc/DCL at 30189fb7 (main.py, model.py).
"""

from dataclasses import dataclass

from ssl_pretrain.losses import negatives, similarity
from ssl_pretrain.methods.base import Embeddings, LossOutput, Method, MethodConfig, SeparatePairs
from ssl_pretrain.models.components import Backbone, mlp
from ssl_pretrain.schema import DIMENSIONLESS, setting

SMALL_CONFIG = {"projector_dims": [256, 128]}


@dataclass
class Config(MethodConfig):
    """Configuration of debiased contrastive learning."""

    name: str = "debiased"
    temperature: float = setting(0.5, "Divisor of the cosine similarities.")
    tau_plus: float = setting(
        0.1, "Probability that a negative has the anchor's class.", unit=DIMENSIONLESS
    )
    projector_dims: list[int] = setting([512, 128], "Widths of the projector's layers.")

    def build(self, backbone: Backbone) -> Method:
        """Build debiased contrastive learning on top of a backbone."""
        return Debiased(self, backbone)


class Debiased(SeparatePairs):
    """SimCLR with the debiased contrastive loss."""

    negatives = "embeddings"

    def __init__(self, config: Config, backbone: Backbone):
        super().__init__(config, backbone)
        self.projector = mlp(backbone.feature_dim, *config.projector_dims)

    def loss(self, embeddings: Embeddings, targets: Embeddings) -> LossOutput:
        """Return the debiased contrastive loss, and log the mean cosine of positive pairs."""
        z_a, z_b = embeddings["z_a"], embeddings["z_b"]
        loss = negatives.debiased(  # equation 8
            z_a, z_b, temperature=self.config.temperature, tau_plus=self.config.tau_plus
        )
        return LossOutput(
            loss, {"positive_cosine": similarity.mean_cosine(z_a.detach(), z_b.detach())}
        )
