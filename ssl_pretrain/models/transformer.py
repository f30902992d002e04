"""Transformer blocks and fixed positions for the networks that a method puts after a ViT.

I-JEPA's predictor and MAE's decoder are such networks.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ssl_pretrain.models.timm_networks import architecture, timm


class TransformerBlocks(nn.ModuleList):
    """A sequence of timm's ViT blocks, outside of a backbone.

    As in a backbone, each block is sharded, compiled or recomputed as a unit.

    Args:
        dim: Width of the tokens.
        depth: Number of blocks.
        num_heads: Number of attention heads of each block.
    """

    def __init__(self, dim: int, depth: int, num_heads: int):
        norm = partial(nn.LayerNorm, eps=1e-6)
        block = timm.models.vision_transformer.Block
        super().__init__(
            block(dim, num_heads, qkv_bias=True, norm_layer=norm) for _ in range(depth)
        )

    def forward(self, tokens: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Apply the blocks to tokens of shape (rows, length, dim).

        Args:
            tokens: The tokens.
            attn_mask: True where a token attends to another one, bool and broadcastable to
                (rows, heads, length, length). None if all tokens attend to all.
        """
        for block in self:
            tokens = block(tokens, attn_mask=attn_mask)
        return tokens


def check_width(key: str, dim: int, num_heads: int) -> None:
    """Raise ValueError, naming the key, unless a width is a multiple of 4 and of `num_heads`."""
    multiple = math.lcm(4, num_heads)
    if dim % multiple:
        raise ValueError(
            f"{key}: {dim} must be a multiple of 4, for the positions, and of the {num_heads} "
            f"attention heads; give a multiple of {multiple}"
        )


def sine_cosine_positions(height: int, width: int, dim: int) -> Tensor:
    """Return the positions of a grid of patches, row by row, shape (height * width, dim).

    A position consists of sines and cosines of the column, then of the row, each at dim / 4
    wavelengths, as in the code of MAE and I-JEPA.

    Raises:
        ValueError: If the width is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(
            f"positions of sines and cosines need a width that is a multiple of 4, got {dim}"
        )
    wavelengths = 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = torch.meshgrid(
        torch.arange(height).double(), torch.arange(width).double(), indexing="ij"
    )
    angles = [grid.flatten()[:, None] / wavelengths for grid in (columns, rows)]
    waves = [wave(angle) for angle in angles for wave in (torch.sin, torch.cos)]
    return torch.cat(waves, dim=1).float()


@torch.no_grad()
def fix_positions(vit: Any) -> None:
    """Replace a timm ViT's positions by fixed sines and cosines, and zeros for prefix tokens.

    Raises:
        ValueError: If the network adds no positions to its patches.
    """
    if vit.pos_embed is None:
        raise ValueError(
            f"method.vit_starts: authors fixes the positions of the patches, but "
            f"{architecture(vit)} adds none; set method.vit_starts=as_built"
        )
    height, width = vit.patch_embed.grid_size
    positions = sine_cosine_positions(height, width, vit.embed_dim)
    vit.pos_embed.zero_()
    vit.pos_embed[:, vit.pos_embed.shape[1] - height * width :] = positions
    vit.pos_embed.requires_grad_(False)
