"""Contrastive learning with hard negatives (Robinson et al., ICLR 2021, arXiv:2010.04592).

Close negatives get a larger weight. The projector, the loss and a separate forward pass for each
view follow joshr17/HCL at 7b4647fa (image/main.py). With beta = 0 the loss is the
debiased contrastive loss.
"""

from dataclasses import dataclass

from ssl_pretrain.losses import negatives, similarity
from ssl_pretrain.methods.base import Embeddings, LossOutput, Method, MethodConfig, SeparatePairs
from ssl_pretrain.models.components import Backbone, mlp
from ssl_pretrain.schema import DIMENSIONLESS, setting

SMALL_CONFIG = {"projector_dims": [256, 128]}


@dataclass
class Config(MethodConfig):
    """Configuration of contrastive learning with hard negatives."""

    name: str = "hard_negative"
    temperature: float = setting(0.5, "Divisor of the cosine similarities.")
    tau_plus: float = setting(
        0.1, "Probability that a negative has the anchor's class.", unit=DIMENSIONLESS
    )
    beta: float = setting(1.0, "Concentration on hard negatives.", unit=DIMENSIONLESS)
    projector_dims: list[int] = setting([512, 128], "Widths of the projector's layers.")

    def build(self, backbone: Backbone) -> Method:
        """Build the hard-negative method on top of a backbone."""
        return HardNegative(self, backbone)


class HardNegative(SeparatePairs):
    """Debiased contrastive learning in which close negatives get larger weights."""

    negatives = "embeddings"

    def __init__(self, config: Config, backbone: Backbone):
        super().__init__(config, backbone)
        self.projector = mlp(backbone.feature_dim, *config.projector_dims)

    def loss(self, embeddings: Embeddings, targets: Embeddings) -> LossOutput:
        """Return the hard-negative loss, and log the mean cosine similarity of positive pairs."""
        z_a, z_b = embeddings["z_a"], embeddings["z_b"]
        loss = negatives.hard_negative(  # equation 4
            z_a,
            z_b,
            temperature=self.config.temperature,
            tau_plus=self.config.tau_plus,
            beta=self.config.beta,
        )
        return LossOutput(
            loss, {"positive_cosine": similarity.mean_cosine(z_a.detach(), z_b.detach())}
        )
