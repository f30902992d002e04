"""I-JEPA (Assran et al., CVPR 2023, arXiv:2301.08243).

The student sees the context patches of an image. From their features, a predictor predicts the
teacher's features of four target blocks, one block at a time. Networks, loss and order of updates
follow facebookresearch/ijepa at 52c1ae95 (src/train.py, src/helper.py,
src/models/vision_transformer.py).

The features of all target patches are transient, so only the mean features of each image are kept.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_pretrain.losses import latent_prediction
from ssl_pretrain.losses.similarity import upcast
from ssl_pretrain.methods.base import (
    Embeddings,
    FixedPositionsConfig,
    LossOutput,
    Method,
    Monitored,
)
from ssl_pretrain.models.components import Backbone, Teacher
from ssl_pretrain.models.tokens import check_maskable
from ssl_pretrain.models.transformer import (
    TransformerBlocks,
    check_width,
    fix_positions,
    sine_cosine_positions,
)
from ssl_pretrain.optim import schedules
from ssl_pretrain.optim.schedules import Progress
from ssl_pretrain.schema import setting
from ssl_pretrain.views.batch import Batch, MaskSet

SMALL_CONFIG = {"predictor_dim": 64, "predictor_depth": 3, "momentum": 0.99}
PRESET_OVERRIDES = [
    "views.crops.global.count=1",
    "views.crops.global.mask.kind=multiblock",
    "views.crops.global.mask.patch_size=4",
    "views.crops.global.mask.min_keep=1",
    "backbone.name=test_vit",
    "backbone.stem=imagenet",
    "backbone.args.patch_size=4",
    "backbone.args.class_token=false",
    "backbone.args.global_pool=avg",
    "backbone.args.fc_norm=false",
]


@dataclass
class Config(FixedPositionsConfig):
    """Configuration of I-JEPA."""

    name: str = "ijepa"
    predictor_dim: int = setting(
        384, "Width of the predictor, a multiple of 4 and of its attention heads."
    )
    predictor_depth: int = setting(12, "Number of blocks of the predictor.", unit="blocks")
    predictor_heads: int = setting(
        0, "Attention heads of the predictor. 0: as many as the backbone has.", unit="heads"
    )
    momentum: float = setting(0.996, "Momentum of the teacher at step 0. It rises linearly to 1.")

    def build(self, backbone: Backbone) -> Method:
        """Build I-JEPA on top of a backbone."""
        return IJEPA(self, backbone)


class Predictor(nn.Module):
    """Narrow ViT that predicts the features of masked patches from those of visible patches.

    Args:
        token_dim: Width of the backbone's tokens.
        grid: Rows and columns of patches.
        config: Width and depth. Its number of heads is not used.
        num_heads: Attention heads of each block.
    """

    positions: Tensor

    def __init__(self, token_dim: int, grid: tuple[int, int], config: Config, num_heads: int):
        super().__init__()
        dim = config.predictor_dim
        self.embed = nn.Linear(token_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))  # has weight decay, as ndim > 1
        self.blocks = TransformerBlocks(dim, config.predictor_depth, num_heads)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.project = nn.Linear(dim, token_dim)
        self.register_buffer("positions", sine_cosine_positions(*grid, dim), persistent=False)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        initialize_layers(self)

    def forward(self, patches: Tensor, context: MaskSet, targets: MaskSet) -> Tensor:
        """Predict the features of each target block from all context patches.

        Args:
            patches: Features of the context patches, shape (local_batch, patches, token_dim).
            context: Indices of the context patches, one mask per image.
            targets: Indices of the patches to predict, one mask per block. Blocks do not attend to
                each other.

        Returns:
            Shape (local_batch, blocks, patches per block, token_dim).
        """
        num_images, num_blocks, block_size = targets.indices.shape
        visible = self.embed(patches) + self.positions[context.indices[:, 0]]
        masked = self.mask_token + self.positions[targets.indices].flatten(0, 1)
        tokens = torch.cat([visible.repeat_interleave(num_blocks, dim=0), masked], dim=1)
        valid = [context.valid.expand(-1, num_blocks, -1), targets.valid]
        # Every token attends to all tokens except padding.
        attn_mask = torch.cat(valid, dim=2).flatten(0, 1)[:, None, None]
        tokens = self.norm(self.blocks(tokens, attn_mask)[:, -block_size:])
        predictions: Tensor = self.project(tokens)
        return predictions.view(num_images, num_blocks, block_size, -1)


class IJEPA(Method):
    """Student and predictor that predict a teacher's features of masked blocks."""

    evaluated_module = "teacher.backbone"
    evaluated_network = "teacher"
    transient = ("patches",)  # the features of hundreds of patches per image

    def __init__(self, config: Config, backbone: Backbone):
        super().__init__(config, backbone)
        vit: Any = backbone.model
        check_maskable(vit)
        if config.vit_starts == "authors":
            initialize_layers(vit)
            fix_positions(vit)
        num_heads = config.predictor_heads or vit.blocks[0].attn.num_heads
        check_width("method.predictor_dim", config.predictor_dim, num_heads)
        grid = vit.patch_embed.grid_size
        self.predictor = Predictor(backbone.token_dim, grid, config, num_heads)
        self.teacher = Teacher(backbone=backbone)

    def forward(self, batch: Batch) -> Embeddings:
        """Predict the target blocks of the single view from its context patches.

        Returns:
            `z`, the mean of the student's context features, detached, shape (local_batch,
            token_dim), and `patches`, the predictions, shape (local_batch, blocks, patches,
            token_dim).
        """
        view, context, targets = self.view_and_masks(batch)
        valid = context.valid[:, 0]
        patches = self.backbone.tokens(view, kept=context.indices[:, 0], valid=valid).patches
        weights = valid / valid.sum(1, keepdim=True)
        return {
            "z": (upcast(patches.detach()) * weights[..., None]).sum(1),
            "patches": self.predictor(patches, context, targets),
        }

    @torch.no_grad()
    def targets(self, batch: Batch) -> Embeddings:
        """Return the teacher's normalized features of the target blocks of the whole image.

        Returns:
            `patches`, shape (local_batch, blocks, patches, token_dim), `valid`, False for padding,
            shape (local_batch, blocks, patches), and `z`, the mean of the teacher's features over
            all patches of an image, shape (local_batch, token_dim).
        """
        view, _, targets = self.view_and_masks(batch)
        teacher = cast(Backbone, self.teacher.backbone)
        patches = upcast(teacher.tokens(view).patches)
        features = F.layer_norm(patches, patches.shape[-1:])
        rows = torch.arange(len(features), device=features.device)[:, None, None]
        return {
            "patches": features[rows, targets.indices],
            "valid": targets.valid,
            "z": patches.mean(1),
        }

    def loss(self, embeddings: Embeddings, targets: Embeddings) -> LossOutput:
        """Return the smooth L1 distance between predictions and targets, averaged over images."""
        loss = latent_prediction.ijepa(
            embeddings["patches"], targets["patches"], valid=targets["valid"]
        )
        return LossOutput(loss, {})

    @torch.no_grad()
    def after_step(self, progress: Progress, embeddings: Embeddings, targets: Embeddings) -> None:
        """Update the teacher, whose momentum rises linearly to 1."""
        momentum = schedules.linear(progress.fraction, start=self.config.momentum, final=1.0)
        self.teacher.update(self, momentum, self.step_taken)

    def monitored(self, embeddings: Embeddings, targets: Embeddings) -> Monitored:
        """Monitor the student's mean context features, paired with the teacher's of all patches."""
        return Monitored(embeddings["z"], (embeddings["z"], targets["z"]))

    def view_and_masks(self, batch: Batch) -> tuple[Tensor, MaskSet, MaskSet]:
        """Return the single view, its context and its targets.

        Raises:
            ValueError: If there are several views, or the view has no context and targets.
        """
        return (
            self.single_view(batch),
            self.masks(batch, "context")[0],
            self.masks(batch, "targets")[0],
        )


def initialize_layers(module: nn.Module) -> None:
    """Draw the weights of linear layers and convolutions as the authors do. Biases are zero."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
