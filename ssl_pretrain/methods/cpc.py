"""CPC v2 for images (Hénaff et al., ICML 2020, arXiv:1905.09272): rows of patches are predicted from the rows before them.

There is no official code. The grid, the masked context network and the loss follow the paper's appendix: dot products of
64-number predictions, scaled by 0.1, with the projections of every patch of every image. Batch norm would let patches of one
image tell each other what is to be predicted: give the backbone layer norm (backbone.args.norm_layer: groupnorm1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_pretrain.distributed import collectives
from ssl_pretrain.losses.tiles import log_sum_exp
from ssl_pretrain.methods.base import Embeddings, Method, MethodConfig, Views, wide
from ssl_pretrain.models.backbones import Backbone
from ssl_pretrain.schema import setting

SMALL = {
    "patch_size": 16,
    "stride": 8,
    "context_dim": 128,
    "num_blocks": 2,
    "num_directions": 1,
    "rows_ahead": [1, 2],
}
PRESET = ["views.crops.global.count=1", "backbone.args.norm_layer=groupnorm1"]


@dataclass
class Config(MethodConfig):
    """Configuration of CPC."""

    name: str = "cpc"
    patch_size: int = setting(64, "Height and width of a patch in pixels. 8 on CIFAR-10.")
    stride: int = setting(32, "Pixels between patches: 7 x 7 patches from 256 pixels.")
    context_dim: int = setting(256, "Width of the context network.")
    num_blocks: int = setting(5, "Blocks of the context network.")
    num_directions: int = setting(
        4, "Number of directions of prediction, the first of down, up, right and left."
    )
    rows_ahead: list[int] = setting(
        [3, 4, 5], "Distances in rows to the patches that are predicted. Nearer rows are ignored."
    )
    target_dim: int = setting(64, "Width of the predictions and their targets.")
    scale: float = setting(0.1, "Factor of the predictions.")

    def build(self, backbone: Backbone) -> CPC:
        return CPC(self, backbone)


class Context(nn.Module):
    """Residual blocks in which a row sees itself and the rows before it: (rows, dim, grid, grid) to the same shape."""

    def __init__(self, dim: int, config: Config):
        super().__init__()
        width = config.context_dim
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(dim, width, 1), nn.ReLU(), nn.Conv2d(width, width, (1, 3), padding=(0, 1)),
                nn.ZeroPad2d((0, 0, 1, 0)), nn.Conv2d(width, width, (2, 1)), nn.ReLU(), nn.Conv2d(width, dim, 1),
            )
            for _ in range(config.num_blocks)
        )  # fmt: skip
        self.predictors = nn.ModuleList(
            nn.Conv2d(dim, config.target_dim, 1) for _ in config.rows_ahead
        )

    def forward(self, grid: Tensor) -> list[Tensor]:
        """The predictions for each of `rows_ahead`, (rows, target_dim, grid, grid)."""
        for block in self.blocks:
            grid = grid + block(grid)
        grid = F.relu(grid)
        return [predictor(grid) for predictor in self.predictors]


class CPC(Method):
    couples_batch = True

    def __init__(self, config: Config, backbone: Backbone):
        super().__init__(config, backbone)
        self.project = nn.Conv2d(backbone.feature_dim, config.target_dim, 1)
        self.contexts = nn.ModuleList(
            Context(backbone.feature_dim, config) for _ in range(config.num_directions)
        )

    def forward(self, batch: Views) -> Embeddings:
        if len(batch.views) != 1:
            raise ValueError(
                f"cpc: takes 1 view, got {len(batch.views)}; set views.crops to one crop with count 1"
            )
        view, size, stride = batch.views[0], self.config.patch_size, self.config.stride
        side = (view.shape[-1] - size) // stride + 1
        if side <= max(self.config.rows_ahead):
            raise ValueError(
                f"method.rows_ahead: {list(self.config.rows_ahead)} does not fit a grid of {side} x {side} patches; "
                "lower it, method.stride or method.patch_size"
            )
        patches = (
            view.unfold(2, size, stride).unfold(3, size, stride).permute(2, 3, 0, 1, 4, 5)
        )  # by place, then image, as views are
        features = (
            self.backbone(patches.flatten(0, 2)).view(side, side, len(view), -1).permute(2, 3, 0, 1)
        )
        predicted = [
            torch.stack(context(turned(features, way)), dim=1)
            for way, context in enumerate(self.contexts)
        ]
        return {
            "targets": self.project(features).flatten(1),
            "predictions": torch.stack(predicted, dim=1),
        }

    def loss(self, embeddings: Embeddings, targets: Embeddings) -> tuple[Tensor, dict[str, Tensor]]:
        predictions = wide(
            embeddings["predictions"]
        )  # (local_batch, directions, rows_ahead, target_dim, side, side)
        grid = wide(embeddings["targets"]).unflatten(1, predictions.shape[3:])
        everyone = collectives.gather(
            grid.permute(0, 2, 3, 1).flatten(0, 2)
        )  # every patch of every image
        total = predictions.new_zeros(())
        for way, number in (
            (way, number)
            for way in range(predictions.shape[1])
            for number in range(predictions.shape[2])
        ):
            ahead = self.config.rows_ahead[number]
            queries = self.config.scale * predictions[:, way, number, :, :-ahead].permute(
                0, 2, 3, 1
            ).flatten(0, 2)
            positives = turned(grid, way)[:, :, ahead:].permute(0, 2, 3, 1).flatten(0, 2)
            total = total + (log_sum_exp(queries, everyone) - (queries * positives).sum(1)).mean()
        return total / len(self.contexts), {
            "info_nce": total.detach() / len(self.contexts) / len(self.config.rows_ahead)
        }


def turned(grid: Tensor, way: int) -> Tensor:
    """`grid` (rows, dim, side, side) so that "before" is above (0), below (1), to the left (2) or to the right (3)."""
    return (grid, grid.flip(2), grid.transpose(2, 3), grid.flip(3).transpose(2, 3))[way]
