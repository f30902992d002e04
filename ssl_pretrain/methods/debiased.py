"""Debiased contrastive learning (Chuang et al., NeurIPS 2020, arXiv:2007.00224).

SimCLR, corrected for negatives that have the class of the anchor. Head, loss and one call of the
backbone per view follow chingyaoc/DCL at 30189fb7 (main.py, model.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from ssl_pretrain.losses.contrastive import debiased
from ssl_pretrain.methods.base import Embeddings, LossOutput, Method, MethodConfig, mean_cosine
from ssl_pretrain.models.backbones import Backbone
from ssl_pretrain.models.heads import mlp
from ssl_pretrain.schema import setting
from ssl_pretrain.views.batch import Batch

SMALL = {"projector_dims": [256, 128]}


@dataclass
class Config(MethodConfig):
    """Configuration of the debiased contrastive loss."""

    name: str = "debiased"
    temperature: float = setting(0.5, "Divisor of the cosine similarities.")
    tau_plus: float = setting(0.1, "Probability that a negative has the anchor's class.")
    projector_dims: list[int] = setting([512, 128], "Widths of the projector's layers.")

    def build(self, backbone: Backbone) -> Debiased:
        """Build debiased contrastive learning on top of a backbone."""
        return Debiased(self, backbone)


class Debiased(Method):
    """SimCLR with a loss corrected for negatives that share the anchor's class."""

    couples = "embeddings"

    def __init__(self, config: Config, backbone: Backbone):
        super().__init__(config, backbone)
        self.projector = mlp(backbone.feature_dim, *config.projector_dims)

    def forward(self, batch: Batch) -> Embeddings:
        """Return the projector's embeddings of both views, each (local_batch, dim)."""
        z_a, z_b = (self.projector(self.backbone(view)) for view in self.two_views(batch))
        return {"z_a": z_a, "z_b": z_b}  # (local_batch, dim)

    def loss(self, embeddings: Embeddings, targets: Embeddings) -> LossOutput:
        """Return the debiased contrastive loss, and log the mean cosine of positive pairs."""
        z_a, z_b = embeddings["z_a"], embeddings["z_b"]
        temperature, tau_plus = self.config.temperature, self.config.tau_plus
        loss = debiased(z_a, z_b, temperature=temperature, tau_plus=tau_plus)  # equation 8
        return LossOutput(loss, {"positive_cosine": mean_cosine(z_a.detach(), z_b.detach())})
