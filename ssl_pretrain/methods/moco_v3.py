"""MoCo v3 (Chen, Xie, He, ICCV 2021, arXiv:2104.02057): keys of the whole batch instead of a queue, a predictor, ResNets or ViTs.

Heads, loss and order of updates follow facebookresearch/moco-v3 at c349e6e2 (moco/builder.py, vits.py). Its authors move the
momentum encoder before the keys' forward; here it moves after the step, with the next step's momentum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ssl_pretrain.losses.contrastive import info_nce
from ssl_pretrain.methods.base import (
    Embeddings,
    Method,
    MethodConfig,
    Views,
    refuse_init,
    two_views,
)
from ssl_pretrain.models.backbones import Backbone
from ssl_pretrain.models.heads import mlp
from ssl_pretrain.models.teacher import Teacher, to_one
from ssl_pretrain.schema import setting

SMALL = {"hidden_dim": 512, "dim": 128, "temperature": 0.2}


@dataclass
class Config(MethodConfig):
    """Configuration of MoCo v3 with a ResNet-50.

    For a ViT set temperature 0.2, num_projector_layers 3, predictor_last_norm true and
    vit_starts authors.
    """

    name: str = "moco_v3"
    hidden_dim: int = setting(4096, "Width of the hidden layers of projector and predictor.")
    dim: int = setting(256, "Width of the embeddings.")
    num_projector_layers: int = setting(2, "Layers of the projector.")
    predictor_last_norm: bool = setting(False, "Batch norm after the predictor's last layer.")
    temperature: float = setting(1.0, "Divisor of the cosine similarities.")
    momentum: float = setting(
        0.99, "Momentum of the teacher at step 0 (paper: 0.996 for 1,000 epochs). It ends at 1."
    )
    freeze_patch_embed: bool = setting(
        True,
        "ViT only: keep the random patch embedding fixed, which makes large batches stable.",
    )
    vit_starts: Literal["as_built", "authors"] = setting(
        "as_built",
        "Initial weights of a ViT. authors: their initialization and fixed positions. "
        "Not with backbone.init.",
    )

    def check(self, run: Any, world_size: int) -> None:
        refuse_init(self.vit_starts, run)

    def build(self, backbone: Backbone) -> MoCoV3:
        return MoCoV3(self, backbone)


class MoCoV3(Method):
    couples_batch = True

    def __init__(self, config: Config, backbone: Backbone):
        super().__init__(config, backbone)
        vit: Any = backbone.model if hasattr(backbone.model, "patch_embed") else None
        if vit is not None and config.vit_starts == "authors":
            start_as_authors(vit)
        if vit is not None and config.freeze_patch_embed:
            vit.patch_embed.requires_grad_(False)
        widths = [config.hidden_dim] * (config.num_projector_layers - 1) + [config.dim]
        self.projector = mlp(backbone.feature_dim, *widths, last_batch_norm=True, last_affine=False)
        self.predictor = mlp(
            config.dim,
            config.hidden_dim,
            config.dim,
            last_batch_norm=config.predictor_last_norm,
            last_affine=False,
            last_bias=False,
        )
        self.teacher = Teacher(backbone=backbone, projector=self.projector)

    def forward(self, batch: Views) -> Embeddings:
        p_a, p_b = (
            self.predictor(self.projector(self.backbone(view)))
            for view in two_views("moco_v3", batch)
        )
        return {"p_a": p_a, "p_b": p_b}  # (local_batch, dim): the authors' queries

    @torch.no_grad()
    def targets(self, batch: Views) -> Embeddings:
        z_a, z_b = (self.teacher(view) for view in batch.views)
        return {"z_a": z_a, "z_b": z_b}

    def loss(self, embeddings: Embeddings, targets: Embeddings) -> tuple[Tensor, dict[str, Tensor]]:
        temperature = self.config.temperature
        a_to_b = info_nce(embeddings["p_a"], targets["z_b"], temperature=temperature)
        b_to_a = info_nce(embeddings["p_b"], targets["z_a"], temperature=temperature)
        return 2 * temperature * (a_to_b + b_to_a), {
            "info_nce": (a_to_b + b_to_a).detach() / 2
        }  # the authors scale by 2 tau

    @torch.no_grad()
    def after_step(self, progress: float, embeddings: Embeddings, targets: Embeddings) -> None:
        self.teacher.move(self, to_one(self.next(progress), self.config.momentum), self.stepped)


@torch.no_grad()
def start_as_authors(vit: Any) -> None:
    """Their weights' distributions, and positions that are sines and cosines of both coordinates and never move (vits.py)."""
    for name, module in vit.named_modules():
        if isinstance(module, nn.Linear):
            fan_out = module.weight.shape[0] // (
                3 if name.endswith("qkv") else 1
            )  # q, k and v are three layers
            bound = math.sqrt(6 / (fan_out + module.weight.shape[1]))
            nn.init.uniform_(module.weight, -bound, bound)
            nn.init.zeros_(module.bias)
    projection = vit.patch_embed.proj
    bound = math.sqrt(6 / (projection.weight[0].numel() + projection.weight.shape[0]))
    nn.init.uniform_(projection.weight, -bound, bound)
    nn.init.zeros_(projection.bias)
    nn.init.normal_(vit.cls_token, std=1e-6)
    height, width = vit.patch_embed.grid_size
    vit.pos_embed.copy_(
        torch.cat(
            [torch.zeros(1, 1, vit.embed_dim), positions(height, width, vit.embed_dim)], dim=1
        )
    )
    vit.pos_embed.requires_grad_(False)


def positions(height: int, width: int, dim: int) -> Tensor:
    """(1, height * width, dim): sine and cosine of the first coordinate, then of the second, at dim / 4 wavelengths."""
    wavelengths = 10000 ** (torch.arange(dim // 4, dtype=torch.float32) / (dim // 4))
    first, second = torch.meshgrid(
        torch.arange(width).float(), torch.arange(height).float(), indexing="ij"
    )
    angles = [grid.flatten()[:, None] / wavelengths for grid in (first, second)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)[
        None
    ]
