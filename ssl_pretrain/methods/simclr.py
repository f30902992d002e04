"""SimCLR (Chen et al., ICML 2020, arXiv:2002.05709) and v2 (NeurIPS 2020, arXiv:2006.10029).

Two views of an image attract each other, and the other images of the batch are negatives. The
projector, its initialization and the sum over both directions follow google-research/simclr at
383d4143 (model_util.py, objective.py).
"""

from dataclasses import dataclass

import torch
from torch import nn

from ssl_pretrain.losses import contrastive, similarity
from ssl_pretrain.methods.base import Embeddings, LossOutput, Method, MethodConfig
from ssl_pretrain.models.components import Backbone, mlp
from ssl_pretrain.schema import setting
from ssl_pretrain.views.batch import Batch

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


class SimCLR(Method):
    """Contrastive learning of two views against the other images of the global batch."""

    couples = "embeddings"

    def __init__(self, config: Config, backbone: Backbone):
        super().__init__(config, backbone)
        # Batch norm follows every linear layer, so none has a bias. The last norm has no shift.
        dims = [] if config.without_projector else config.projector_dims
        self.projector = (
            mlp(backbone.feature_dim, *dims, last_batch_norm=True, last_shift=False, init_std=0.01)
            if dims
            else nn.Identity()
        )

    def forward(self, batch: Batch) -> Embeddings:
        """Return the embeddings of both views from one forward pass, each (local_batch, dim)."""
        # Batch norm sees both views, as in the authors' code.
        z_a, z_b = self.projector(self.backbone(torch.cat(self.two_views(batch)))).chunk(2)
        return {"z_a": z_a, "z_b": z_b}

    def loss(self, embeddings: Embeddings, targets: Embeddings) -> LossOutput:
        """Return the NT-Xent loss summed over both directions, and log their mean."""
        z_a, z_b = embeddings["z_a"], embeddings["z_b"]
        mean = contrastive.nt_xent(z_a, z_b, temperature=self.config.temperature)
        logs = {
            "nt_xent": mean,
            "positive_cosine": similarity.mean_cosine(z_a.detach(), z_b.detach()),
        }
        return LossOutput(2 * mean, logs)  # the authors sum over both directions
