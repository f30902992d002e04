"""MoCo v3 (Chen, Xie, He, ICCV 2021, arXiv:2104.02057).

The negatives are the keys of the whole batch instead of a queue, the student has a predictor, and
backbones are ResNets or ViTs. Heads, loss and order of updates follow facebookresearch/moco-v3 at
c349e6e2 (moco/builder.py, vits.py). The authors update the teacher just before it computes the
keys. This code updates it at the end of the previous step, with the same momentum.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ssl_pretrain.losses.contrastive import info_nce
from ssl_pretrain.methods.base import (
    Embeddings,
    LossOutput,
    Method,
    MethodConfig,
    Monitored,
    check_vit_starts,
)
from ssl_pretrain.models.components import Backbone, Teacher, mlp, rising_momentum
from ssl_pretrain.optim.schedules import Progress
from ssl_pretrain.schema import setting
from ssl_pretrain.views.batch import Batch

SMALL_CONFIG = {"hidden_dim": 512, "dim": 128, "temperature": 0.2}


@dataclass
class Config(MethodConfig):
    """Configuration of MoCo v3 with a ResNet-50.

    For a ViT set temperature: 0.2, num_projector_layers: 3, predictor_last_norm: true and
    vit_starts: authors.
    """

    name: str = "moco_v3"
    hidden_dim: int = setting(4096, "Width of the hidden layers of projector and predictor.")
    dim: int = setting(256, "Width of the embeddings.")
    num_projector_layers: int = setting(2, "Number of layers in the projector.", unit="layers")
    predictor_last_norm: bool = setting(False, "Add batch norm after the predictor's last layer.")
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
        "Initial weights of a ViT. as_built: those of the backbone. authors: the authors' "
        "initialization with fixed positional embeddings, which requires backbone.init=random.",
    )

    def check(self, run: Any, world_size: int) -> None:
        """Raise ValueError if the authors' initialization would replace loaded weights."""
        check_vit_starts(self.vit_starts, run)

    def build(self, backbone: Backbone) -> Method:
        """Build MoCo v3 on top of a backbone."""
        return MoCoV3(self, backbone)


class MoCoV3(Method):
    """Contrastive learning of predictions against a teacher's keys of the global batch."""

    couples = "embeddings"
    negatives = "images"

    def __init__(self, config: Config, backbone: Backbone):
        super().__init__(config, backbone)
        vit: Any = backbone.model if hasattr(backbone.model, "patch_embed") else None
        if vit is not None and config.vit_starts == "authors":
            initialize_as_authors(vit)
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

    def forward(self, batch: Batch) -> Embeddings:
        """Return the queries, which are both views' predictions, each (local_batch, dim)."""
        p_a, p_b = (
            self.predictor(self.projector(self.backbone(view))) for view in self.two_views(batch)
        )
        return {"p_a": p_a, "p_b": p_b}

    @torch.no_grad()
    def targets(self, batch: Batch) -> Embeddings:
        """Return the keys, which are the teacher's embeddings, each (local_batch, dim)."""
        z_a, z_b = (self.teacher(view) for view in batch.views)
        return {"z_a": z_a, "z_b": z_b}

    def loss(self, embeddings: Embeddings, targets: Embeddings) -> LossOutput:
        """Return the InfoNCE loss summed over both directions, times 2 * temperature."""
        temperature = self.config.temperature
        a_to_b = info_nce(embeddings["p_a"], targets["z_b"], temperature=temperature)
        b_to_a = info_nce(embeddings["p_b"], targets["z_a"], temperature=temperature)
        total = a_to_b + b_to_a
        return LossOutput(2 * temperature * total, {"info_nce": total / 2})  # the authors' scale

    @torch.no_grad()
    def after_step(self, progress: Progress, embeddings: Embeddings, targets: Embeddings) -> None:
        """Update the teacher with the momentum of the next step."""
        momentum = rising_momentum(progress.next(), self.config.momentum)
        self.teacher.update(self, momentum, self.step_taken)

    def monitored(self, embeddings: Embeddings, targets: Embeddings) -> Monitored:
        """Monitor the first view's queries, paired with the teacher's keys of the second view."""
        return Monitored(embeddings["p_a"], (embeddings["p_a"], targets["z_b"]))


@torch.no_grad()
def initialize_as_authors(vit: Any) -> None:
    """Initialize a timm ViT as the authors do and freeze its positional embeddings (vits.py)."""
    for name, module in vit.named_modules():
        if isinstance(module, nn.Linear):
            num_layers = 3 if name.endswith("qkv") else 1  # q, k and v count as three layers
            _xavier_uniform(module, module.weight.shape[1], module.weight.shape[0] // num_layers)
    projection = vit.patch_embed.proj
    _xavier_uniform(projection, projection.weight[0].numel(), projection.weight.shape[0])
    nn.init.normal_(vit.cls_token, std=1e-6)
    class_token = torch.zeros(1, 1, vit.embed_dim)
    height, width = vit.patch_embed.grid_size
    grid = sine_cosine_positions(height, width, vit.embed_dim)
    vit.pos_embed.copy_(torch.cat([class_token, grid], dim=1))
    vit.pos_embed.requires_grad_(False)


def _xavier_uniform(layer: Any, fan_in: int, fan_out: int) -> None:
    bound = math.sqrt(6 / (fan_out + fan_in))
    nn.init.uniform_(layer.weight, -bound, bound)
    nn.init.zeros_(layer.bias)


def sine_cosine_positions(height: int, width: int, dim: int) -> Tensor:
    """Return positional embeddings of a grid of patches, shape (1, height * width, dim).

    They are the sine and cosine of the first coordinate, then of the second, at dim / 4
    wavelengths.
    """
    wavelengths = 10000 ** (torch.arange(dim // 4, dtype=torch.float32) / (dim // 4))
    first, second = torch.meshgrid(
        torch.arange(width).float(), torch.arange(height).float(), indexing="ij"
    )
    angles = [grid.flatten()[:, None] / wavelengths for grid in (first, second)]
    waves = [wave(angle) for angle in angles for wave in (torch.sin, torch.cos)]
    return torch.cat(waves, dim=1)[None]
