"""A method with five networks, as self-distillation with masks has them, for tests.

A student with a predictor and a decoder, a teacher that follows the student, and an older teacher
that stays as it is for several steps (the Gram teacher of DINOv3, arXiv:2508.10104).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_pretrain.losses.similarity import upcast
from ssl_pretrain.methods.base import Embeddings, LossOutput, Method, MethodConfig
from ssl_pretrain.models.components import Backbone, Teacher
from ssl_pretrain.models.transformer import TransformerBlocks
from ssl_pretrain.optim.schedules import Progress
from ssl_pretrain.views.batch import Batch

REFRESH_EVERY_STEPS = 4


@dataclass
class Config(MethodConfig):
    """The method has no settings."""

    name: str = "several_networks"

    def build(self, backbone: Backbone) -> Method:
        return SeveralNetworks(self, backbone)


class SeveralNetworks(Method):
    """Predicts the teacher's patches, the older teacher's similarities of patches, and pixels."""

    evaluated_module, evaluated_network = "teacher.backbone", "teacher"

    def __init__(self, config: Config, backbone: Backbone):
        super().__init__(config, backbone)
        dim = backbone.token_dim
        self.mask_token = nn.Parameter(0.02 * torch.randn(dim))
        self.predictor = TransformerBlocks(dim, depth=2, num_heads=2)
        self.decoder = nn.Sequential(
            nn.Linear(dim, 8), nn.GELU(), nn.Linear(8, 3 * backbone.patch_size**2)
        )
        self.teacher = Teacher(backbone=backbone)
        self.older_teacher = Teacher(backbone=backbone)

    def forward(self, batch: Batch) -> Embeddings:
        num_patches = batch.views[0].shape[-1] ** 2 // self.backbone.patch_size**2
        masked = (batch.indices[:, None] + torch.arange(num_patches)) % 3 == 0
        tokens = self.backbone.tokens(batch.views[0], masked=masked, mask_token=self.mask_token)
        return {
            "patches": tokens.patches,
            "predictions": self.predictor(tokens.patches),
            "pixels": self.decoder(tokens.patches),
        }

    @torch.no_grad()
    def targets(self, batch: Batch) -> Embeddings:
        side = self.backbone.patch_size
        pixels = F.unfold(batch.views[0], side, stride=side).transpose(1, 2)
        return {
            "patches": self.teacher.backbone.tokens(batch.views[0]).patches,
            "older": self.older_teacher.backbone.tokens(batch.views[0]).patches,
            "pixels": pixels,
        }

    def loss(self, embeddings: Embeddings, targets: Embeddings) -> LossOutput:
        z = {name: upcast(value) for name, value in embeddings.items()}
        q = {name: upcast(value) for name, value in targets.items()}
        losses = {
            "prediction": F.smooth_l1_loss(z["predictions"], q["patches"]),
            "gram": F.mse_loss(gram(z["patches"]), gram(q["older"])),
            "reconstruction": F.mse_loss(z["pixels"], q["pixels"]),
        }
        return LossOutput(torch.stack([*losses.values()]).sum(), losses)

    @torch.no_grad()
    def after_step(self, progress: Progress, embeddings: Embeddings, targets: Embeddings) -> None:
        self.teacher.update(self, 0.9, self.step_taken)
        if progress.next().step % REFRESH_EVERY_STEPS == 0:
            self.older_teacher.update(self.teacher, 0.0, self.step_taken)


def gram(patches: Tensor) -> Tensor:
    patches = F.normalize(patches, dim=2)
    return patches @ patches.transpose(1, 2)
