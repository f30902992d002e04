"""Temperature-free contrastive learning (Bum Jun Kim and Sang Woo Kim, 2025, arXiv:2501.17683).

This is SimCLR with the log-odds of a cosine similarity, log((1 + c) / (1 - c)) = 2 artanh(c), in
place of the cosine divided by a temperature. The views, the projector and the sum over both
directions are SimCLR's. The clamp of cosines near 1 and -1 is an addition of this project, which
`losses.temperature_free` explains.
"""

from dataclasses import dataclass

from ssl_pretrain.losses import contrastive, similarity
from ssl_pretrain.methods.base import Embeddings, JointPairs, LossOutput, Method, MethodConfig
from ssl_pretrain.models.components import Backbone, simclr_projector
from ssl_pretrain.schema import setting

SMALL_CONFIG = {"projector_dims": [256, 128]}


@dataclass
class Config(MethodConfig):
    """Configuration of temperature-free contrastive learning."""

    name: str = "temperature_free"
    projector_dims: list[int] = setting([2048, 2048, 128], "Widths of the projector's layers.")

    def build(self, backbone: Backbone) -> Method:
        """Build temperature-free contrastive learning on top of a backbone."""
        return TemperatureFree(self, backbone)


class TemperatureFree(JointPairs):
    """SimCLR whose logits are the log-odds of the cosine similarities."""

    negatives = "embeddings"

    def __init__(self, config: Config, backbone: Backbone):
        super().__init__(config, backbone)
        self.projector = simclr_projector(backbone.feature_dim, *config.projector_dims)

    def loss(self, embeddings: Embeddings, targets: Embeddings) -> LossOutput:
        """Return the loss summed over both directions.

        Their mean and the mean cosine similarity of positive pairs are logged.
        """
        z_a, z_b = embeddings["z_a"], embeddings["z_b"]
        mean_loss = contrastive.temperature_free(z_a, z_b)
        logs = {
            "temperature_free": mean_loss,
            "positive_cosine": similarity.mean_cosine(z_a.detach(), z_b.detach()),
        }
        return LossOutput(2 * mean_loss, logs)
