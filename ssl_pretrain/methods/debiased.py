"""Debiased contrastive learning (Chuang et al., NeurIPS 2020, arXiv:2007.00224): SimCLR less what false negatives add.

Head, loss and one backbone call a view follow chingyaoc/DCL at 30189fb7 (main.py, model.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from ssl_pretrain.losses.contrastive import debiased
from ssl_pretrain.methods.base import Embeddings, Method, MethodConfig, Views, two_views, wide
from ssl_pretrain.models.backbones import Backbone
from ssl_pretrain.models.heads import mlp
from ssl_pretrain.schema import setting

SMALL = {"projector_dims": [256, 128]}


@dataclass
class Config(MethodConfig):
    """Configuration of the debiased contrastive loss."""

    name: str = "debiased"
    temperature: float = setting(0.5, "Divisor of the cosine similarities.")
    tau_plus: float = setting(0.1, "Probability that a negative has the anchor's class.")
    projector_dims: list[int] = setting([512, 128], "Widths of the projector's layers.")

    def build(self, backbone: Backbone) -> Debiased:
        return Debiased(self, backbone)


class Debiased(Method):
    couples_batch = True

    def __init__(self, config: Config, backbone: Backbone):
        super().__init__(config, backbone)
        self.projector = mlp(backbone.feature_dim, *config.projector_dims)

    def forward(self, batch: Views) -> Embeddings:
        z_a, z_b = (self.projector(self.backbone(view)) for view in two_views("debiased", batch))
        return {"z_a": z_a, "z_b": z_b}  # (local_batch, dim)

    def loss(self, embeddings: Embeddings, targets: Embeddings) -> tuple[Tensor, dict[str, Tensor]]:
        temperature, tau_plus = self.config.temperature, self.config.tau_plus
        loss = debiased(
            embeddings["z_a"], embeddings["z_b"], temperature=temperature, tau_plus=tau_plus
        )  # eq. 8
        positive = F.cosine_similarity(
            wide(embeddings["z_a"].detach()), wide(embeddings["z_b"].detach())
        ).mean()
        return loss, {"positive_cosine": positive}
