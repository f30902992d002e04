"""SimCLR (Chen et al., ICML 2020, arXiv:2002.05709) and v2 (NeurIPS 2020, arXiv:2006.10029).

Two views of an image attract each other, and the other images of the batch are negatives. The
projector, its initialization and the sum over both directions follow google-research/simclr at
383d4143 (model_util.py, objective.py).
"""

from dataclasses import dataclass

from torch import nn

from ssl_pretrain.losses import contrastive, similarity
from ssl_pretrain.methods.base import Embeddings, JointPairs, LossOutput, Method, MethodConfig
from ssl_pretrain.models.components import Backbone, simclr_projector
from ssl_pretrain.schema import setting

SMALL_CONFIG = {"projector_dims": [256, 128], "temperature": 0.2}


@dataclass
class Config(MethodConfig):
    """Configuration of SimCLR with the v2 projector. For v1 set projector_dims to [2048, 128]."""

    name: str = "simclr"
    temperature: float = setting(0.1, "Divisor of the cosine similarities (0.5 on CIFAR-10).")
    projector_dims: list[int] = setting([2048, 2048, 128], "Widths of the projector's layers.")
    without_projector: bool = setting(
        False, "Compute the loss on the features, without a projector, as an ablation."
    )

    def build(self, backbone: Backbone) -> Method:
        """Build SimCLR on top of a backbone."""
        return SimCLR(self, backbone)


class SimCLR(JointPairs):
    """Contrastive learning of two views against the other images of the global batch."""

    negatives = "embeddings"

    def __init__(self, config: Config, backbone: Backbone):
        super().__init__(config, backbone)
        dims = [] if config.without_projector else config.projector_dims
        self.projector = simclr_projector(backbone.feature_dim, *dims) if dims else nn.Identity()

    def loss(self, embeddings: Embeddings, targets: Embeddings) -> LossOutput:
        """Return the NT-Xent loss summed over both directions, and log their mean."""
        z_a, z_b = embeddings["z_a"], embeddings["z_b"]
        mean = contrastive.nt_xent(z_a, z_b, temperature=self.config.temperature)
        logs = {
            "nt_xent": mean,
            "positive_cosine": similarity.mean_cosine(z_a.detach(), z_b.detach()),
        }
        return LossOutput(2 * mean, logs)  # the authors sum over both directions
