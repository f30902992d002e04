"""Contrastive learning with hard negatives (Robinson et al., ICLR 2021, arXiv:2010.04592): close negatives count for more.

Head, loss and one backbone call a view follow joshr17/HCL at 7b4647fa (image/main.py). beta 0 is the debiased loss.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from ssl_pretrain.losses.contrastive import hard_negative
from ssl_pretrain.methods.base import Embeddings, Method, MethodConfig, Views, two_views, wide
from ssl_pretrain.models.backbones import Backbone
from ssl_pretrain.models.heads import mlp
from ssl_pretrain.schema import setting

SMALL = {"projector_dims": [256, 128]}


@dataclass
class Config(MethodConfig):
    """Configuration of contrastive learning with hard negatives."""

    name: str = "hard_negative"
    temperature: float = setting(0.5, "Divisor of the cosine similarities.")
    tau_plus: float = setting(0.1, "Probability that a negative has the anchor's class.")
    beta: float = setting(1.0, "Concentration on hard negatives.")
    projector_dims: list[int] = setting([512, 128], "Widths of the projector's layers.")

    def build(self, backbone: Backbone) -> HardNegative:
        return HardNegative(self, backbone)


class HardNegative(Method):
    couples_batch = True

    def __init__(self, config: Config, backbone: Backbone):
        super().__init__(config, backbone)
        self.projector = mlp(backbone.feature_dim, *config.projector_dims)

    def forward(self, batch: Views) -> Embeddings:
        z_a, z_b = (
            self.projector(self.backbone(view)) for view in two_views("hard_negative", batch)
        )
        return {"z_a": z_a, "z_b": z_b}  # (local_batch, dim)

    def loss(self, embeddings: Embeddings, targets: Embeddings) -> tuple[Tensor, dict[str, Tensor]]:
        settings = self.config
        loss = hard_negative(  # eq. 4
            embeddings["z_a"],
            embeddings["z_b"],
            temperature=settings.temperature,
            tau_plus=settings.tau_plus,
            beta=settings.beta,
        )
        positive = F.cosine_similarity(
            wide(embeddings["z_a"].detach()), wide(embeddings["z_b"].detach())
        ).mean()
        return loss, {"positive_cosine": positive}
