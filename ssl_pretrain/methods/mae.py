"""MAE (He et al., CVPR 2022, arXiv:2111.06377).

The backbone sees a random quarter of the patches. A small decoder sees their features, and a mask
token in place of each masked patch, whose pixels it predicts. Networks, initialization and loss
follow facebookresearch/mae at efb2a806 (models_mae.py).

Predictions and images are transient, so only the mean features of each image are kept.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ssl_pretrain.losses import reconstruction
from ssl_pretrain.losses.similarity import upcast
from ssl_pretrain.methods.base import (
    Embeddings,
    FixedPositionsConfig,
    LossOutput,
    Method,
    Monitored,
)
from ssl_pretrain.models.components import Backbone
from ssl_pretrain.models.tokens import check_maskable
from ssl_pretrain.models.transformer import (
    TransformerBlocks,
    check_width,
    fix_positions,
    sine_cosine_positions,
)
from ssl_pretrain.schema import setting
from ssl_pretrain.views.batch import Batch, MaskSet

SMALL_CONFIG = {"decoder_dim": 64, "decoder_depth": 2, "decoder_heads": 4}
PRESET_OVERRIDES = [
    "backbone.name=test_vit",
    "backbone.stem=imagenet",
    "backbone.args.patch_size=4",
    "views.crops.global.count=1",
    "views.crops.global.jitter=0",
    "views.crops.global.grayscale=0",
    "views.crops.global.mask.kind=random",
    "views.crops.global.mask.patch_size=4",
]


@dataclass
class Config(FixedPositionsConfig):
    """Configuration of MAE."""

    name: str = "mae"
    decoder_dim: int = setting(512, "Width of the decoder, a multiple of 4.")
    decoder_depth: int = setting(8, "Number of blocks of the decoder.", unit="blocks")
    decoder_heads: int = setting(16, "Attention heads of the decoder.", unit="heads")
    normalize_pixels: bool = setting(
        True, "Predict each patch's pixels scaled to mean 0 and standard deviation 1."
    )

    def build(self, backbone: Backbone) -> Method:
        """Build MAE on top of a backbone."""
        return MAE(self, backbone)


class Decoder(nn.Module):
    """Transformer that predicts the pixels of all patches from the features of the visible ones.

    Args:
        backbone: The backbone, a vision transformer.
        config: Width, depth and heads.
    """

    positions: Tensor

    def __init__(self, backbone: Backbone, config: Config):
        super().__init__()
        dim, vit = config.decoder_dim, backbone.model
        self.embed = nn.Linear(backbone.token_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))  # has weight decay, as ndim > 1
        self.blocks = TransformerBlocks(dim, config.decoder_depth, config.decoder_heads)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.project = nn.Linear(dim, backbone.num_channels * backbone.patch_size**2)
        height, width = vit.patch_embed.grid_size  # type: ignore[union-attr, misc]
        positions = sine_cosine_positions(height, width, dim)
        self.register_buffer("positions", positions, persistent=False)
        nn.init.normal_(self.mask_token, std=0.02)
        initialize_linear(self)

    def forward(self, prefix: Tensor, patches: Tensor, visible: Tensor) -> Tensor:
        """Predict the pixels of all patches, shape (B, patches, C * patch_size**2).

        Args:
            prefix: Features of the class token and registers, which have no position here.
            patches: Features of the visible patches, shape (B, visible patches, token_dim).
            visible: Indices of the visible patches, int64 (B, visible patches).
        """
        num_prefix_tokens = prefix.shape[1]
        z = self.embed(torch.cat([prefix, patches], dim=1))
        prefix, patches = z[:, :num_prefix_tokens], z[:, num_prefix_tokens:]
        places = visible.unsqueeze(-1).expand_as(patches)
        masked = self.mask_token.to(z.dtype).expand(len(z), len(self.positions), -1)
        tokens = masked.scatter(1, places, patches) + self.positions
        tokens = self.norm(self.blocks(torch.cat([prefix.to(tokens.dtype), tokens], dim=1)))
        predictions: Tensor = self.project(tokens[:, num_prefix_tokens:])
        return predictions


class MAE(Method):
    """Backbone that sees the visible patches, and a decoder that predicts the masked ones."""

    transient = ("predictions", "images")  # hundreds of thousands of numbers per image

    def __init__(self, config: Config, backbone: Backbone):
        super().__init__(config, backbone)
        check_maskable(backbone.model)
        check_width("method.decoder_dim", config.decoder_dim, config.decoder_heads)
        if config.vit_starts == "authors":
            initialize_as_authors(backbone.model)
        self.decoder = Decoder(backbone, config)

    def forward(self, batch: Batch) -> Embeddings:
        """Predict the pixels of all patches of the single view from its visible patches.

        Returns:
            `z`, the mean features of the visible patches, detached, shape (local_batch, token_dim),
            and `predictions`, shape (local_batch, patches, C * patch_size**2).
        """
        view, masks = self.view_and_mask(batch)
        visible = masks.indices[:, 0]  # the same number per image, so no padding
        tokens = self.backbone.tokens(view, kept=visible)
        return {
            "z": upcast(tokens.patches.detach()).mean(1),
            "predictions": self.decoder(tokens.prefix, tokens.patches, visible),
        }

    @torch.no_grad()
    def targets(self, batch: Batch) -> Embeddings:
        """Return the images, and True for the masked patches, bool (local_batch, patches)."""
        view, masks = self.view_and_mask(batch)
        visible = masks.as_grid(len(self.decoder.positions))
        return {"images": view, "masked": ~visible}

    def loss(self, embeddings: Embeddings, targets: Embeddings) -> LossOutput:
        """Return the mean squared error of the masked patches' pixels."""
        loss = reconstruction.mae(
            embeddings["predictions"],
            targets["images"],
            targets["masked"],
            normalize=self.config.normalize_pixels,
        )
        return LossOutput(loss, {})

    def monitored(self, embeddings: Embeddings, targets: Embeddings) -> Monitored:
        """Monitor the mean features of the visible patches. A single view makes no pairs."""
        return Monitored(embeddings["z"])

    def view_and_mask(self, batch: Batch) -> tuple[Tensor, MaskSet]:
        """Return the single view and its visible patches.

        Raises:
            ValueError: If there are several views, or the view has no mask.
        """
        return self.single_view(batch), self.masks(batch, "visible")[0]


def initialize_as_authors(vit: Any) -> None:
    """Initialize a timm ViT as the authors do and fix its positional embeddings."""
    initialize_linear(vit)
    nn.init.xavier_uniform_(vit.patch_embed.proj.weight.view(vit.embed_dim, -1))
    if vit.cls_token is not None:
        nn.init.normal_(vit.cls_token, std=0.02)
    fix_positions(vit)


def initialize_linear(module: nn.Module) -> None:
    """Draw the weights of linear layers as the authors do. Biases are zero."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
