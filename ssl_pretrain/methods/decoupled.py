"""Decoupled contrastive learning (Yeh et al., ECCV 2022, arXiv:2110.06848).

This is SimCLR with the positive removed from the denominator of its loss. The loss sums both
directions, as in raindrop313/DCL (dcl.py), which is commonly taken for the authors' code. `sigma`
selects the weighted form, DCLW. Gradients flow through the weights of DCLW, as in that code but not
in lightly.
"""

from dataclasses import dataclass

from ssl_pretrain.losses import negatives, similarity
from ssl_pretrain.methods.base import Embeddings, JointPairs, LossOutput, Method, MethodConfig
from ssl_pretrain.models.components import Backbone, simclr_projector
from ssl_pretrain.schema import DIMENSIONLESS, setting

SMALL_CONFIG = {"projector_dims": [256, 128]}


@dataclass
class Config(MethodConfig):
    """Configuration of the decoupled contrastive losses DCL and DCLW."""

    name: str = "decoupled"
    temperature: float = setting(0.1, "Divisor of the cosine similarities.")
    sigma: float | None = setting(
        None,
        "Parameter of DCLW's von Mises-Fisher weighting (paper: 0.5). null selects DCL.",
        unit=DIMENSIONLESS,
    )
    projector_dims: list[int] = setting([2048, 2048, 128], "Widths of the projector's layers.")

    def build(self, backbone: Backbone) -> Method:
        """Build decoupled contrastive learning on top of a backbone."""
        return Decoupled(self, backbone)


class Decoupled(JointPairs):
    """SimCLR without the positive in the denominator of the loss."""

    negatives = "embeddings"

    def __init__(self, config: Config, backbone: Backbone):
        super().__init__(config, backbone)
        self.projector = simclr_projector(backbone.feature_dim, *config.projector_dims)

    def loss(self, embeddings: Embeddings, targets: Embeddings) -> LossOutput:
        """Return the DCL loss, or DCLW if `sigma` is set, summed over both directions.

        The mean cosine similarity of positive pairs is logged.
        """
        z_a, z_b = embeddings["z_a"], embeddings["z_b"]
        mean_loss = negatives.decoupled(  # equation 6 or 7
            z_a, z_b, temperature=self.config.temperature, sigma=self.config.sigma
        )
        return LossOutput(
            2 * mean_loss, {"positive_cosine": similarity.mean_cosine(z_a.detach(), z_b.detach())}
        )
