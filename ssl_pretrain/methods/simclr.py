"""SimCLR (Chen et al., ICML 2020, arXiv:2002.05709; v2: NeurIPS 2020, arXiv:2006.10029): two views, in-batch negatives.

Head, initialization and the sum of both directions follow google-research/simclr at 383d4143 (model_util.py, objective.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_pretrain.losses.contrastive import nt_xent
from ssl_pretrain.methods.base import Embeddings, Method, MethodConfig, Views
from ssl_pretrain.models.backbones import Backbone
from ssl_pretrain.models.heads import mlp
from ssl_pretrain.schema import setting

SMALL = {"projector_dims": [256, 128], "temperature": 0.2}


@dataclass
class Config(MethodConfig):
    """Configuration of SimCLR with the head of v2. For v1 set projector_dims [2048, 128]."""

    name: str = "simclr"
    temperature: float = setting(0.1, "Divisor of the cosine similarities. 0.5 on CIFAR-10.")
    projector_dims: list[int] = setting([2048, 2048, 128], "Widths of the projector's layers.")
    without_projector: bool = setting(
        False, "Ablation: no projector. The loss is computed on the features."
    )

    def build(self, backbone: Backbone) -> SimCLR:
        return SimCLR(self, backbone)


class SimCLR(Method):
    couples_batch = True

    def __init__(self, config: Config, backbone: Backbone):
        super().__init__(config, backbone)
        # Every Linear is followed by batch norm, so none has a bias; the last norm scales without a shift.
        dims = [] if config.without_projector else config.projector_dims
        self.projector = (
            mlp(backbone.feature_dim, *dims, last_batch_norm=True, last_shift=False, init_std=0.01)
            if dims
            else nn.Identity()
        )

    def forward(self, batch: Views) -> Embeddings:
        if len(batch.views) != 2:
            raise ValueError(
                f"simclr: takes 2 views of one size, got {len(batch.views)}; set views.crops to one crop with count 2"
            )
        z = self.projector(
            self.backbone(torch.cat(batch.views))
        )  # one call, so batch norm sees both views, as the authors do
        z_a, z_b = z.chunk(2)
        return {"z_a": z_a, "z_b": z_b}  # (local_batch, dim)

    def loss(self, embeddings: Embeddings, targets: Embeddings) -> tuple[Tensor, dict[str, Tensor]]:
        loss = 2 * nt_xent(
            **embeddings, temperature=self.config.temperature
        )  # the authors sum loss_a + loss_b
        positive = F.cosine_similarity(
            embeddings["z_a"].detach().float(), embeddings["z_b"].detach().float()
        ).mean()
        return loss, {"nt_xent": loss.detach() / 2, "positive_cosine": positive}
