"""CPC v2 for images (Hénaff et al., ICML 2020, arXiv:1905.09272).

Rows of patches are predicted from the rows before them. There is no official code. The grid, the
masked context network and the loss follow the paper's appendix. Logits are dot products of
64-dimensional predictions, scaled by 0.1, with the projections of every patch of every image.

Batch norm would leak information about the predicted patches into the other patches of an image, so
use a backbone with layer norm (backbone.args.norm_layer: groupnorm1).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_pretrain.losses import patch_prediction
from ssl_pretrain.losses.patch_prediction import orient
from ssl_pretrain.methods.base import Embeddings, LossOutput, Method, MethodConfig, Monitored
from ssl_pretrain.models.components import Backbone
from ssl_pretrain.schema import DIMENSIONLESS, setting
from ssl_pretrain.views.batch import Batch

SMALL_CONFIG = {
    "patch_size": 16,
    "stride": 8,
    "context_dim": 128,
    "num_blocks": 2,
    "num_directions": 1,
    "rows_ahead": [1, 2],
}
PRESET_OVERRIDES = ["views.crops.global.count=1", "backbone.args.norm_layer=groupnorm1"]


@dataclass
class Config(MethodConfig):
    """Configuration of CPC."""

    name: str = "cpc"
    patch_size: int = setting(
        64, "Height and width of a patch, such as 8 for CIFAR-10.", unit="pixels"
    )
    stride: int = setting(
        32,
        "Distance from one patch to the next. The default cuts 256 pixels into 7 x 7 patches.",
        unit="pixels",
    )
    context_dim: int = setting(256, "Width of the context network.")
    num_blocks: int = setting(5, "Number of blocks of the context network.", unit="blocks")
    num_directions: int = setting(
        4,
        "Number of prediction directions, in the order down, up, right and left.",
        unit="directions",
    )
    rows_ahead: list[int] = setting(
        [3, 4, 5],
        "Distances in rows to the predicted patches. Nearer rows are not predicted.",
        unit="rows of patches",
    )
    target_dim: int = setting(64, "Width of the predictions and their targets.")
    scale: float = setting(0.1, "Factor that multiplies the predictions.", unit=DIMENSIONLESS)

    def build(self, backbone: Backbone) -> Method:
        """Build CPC on top of a backbone."""
        return CPC(self, backbone)


class ContextNetwork(nn.Module):
    """Residual blocks in which a row of patches depends only on itself and the rows before it."""

    def __init__(self, dim: int, config: Config):
        super().__init__()
        width = config.context_dim
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(dim, width, 1),
                nn.ReLU(),
                nn.Conv2d(width, width, (1, 3), padding=(0, 1)),
                nn.ZeroPad2d((0, 0, 1, 0)),
                nn.Conv2d(width, width, (2, 1)),
                nn.ReLU(),
                nn.Conv2d(width, dim, 1),
            )
            for _ in range(config.num_blocks)
        )
        self.predictors = nn.ModuleList(
            nn.Conv2d(dim, config.target_dim, 1) for _ in config.rows_ahead
        )

    def forward(self, grid: Tensor) -> Tensor:
        """Predict the patches of later rows from features of shape (images, dim, rows, columns).

        Returns:
            Predictions, shape (images, len(rows_ahead), target_dim, rows, columns).
        """
        for block in self.blocks:
            grid = grid + block(grid)
        grid = F.relu(grid)
        return torch.stack([predictor(grid) for predictor in self.predictors], dim=1)


class CPC(Method):
    """Contrastive prediction of rows of patches from the rows before them."""

    couples = "embeddings"
    negatives = "patches"

    def __init__(self, config: Config, backbone: Backbone):
        super().__init__(config, backbone)
        self.project = nn.Conv2d(backbone.feature_dim, config.target_dim, 1)
        self.contexts = nn.ModuleList(
            ContextNetwork(backbone.feature_dim, config) for _ in range(config.num_directions)
        )

    def forward(self, batch: Batch) -> Embeddings:
        """Embed the patches of the single view and predict later rows from earlier ones.

        Returns:
            `targets`, shape (local_batch, target_dim * rows * columns), and `predictions`, shape
            (local_batch, num_directions, len(rows_ahead), target_dim, rows, columns).
        """
        patches = self.cut_patches(batch)
        features = self.backbone(patches.flatten(0, 2)).view(*patches.shape[:3], -1)
        grid = features.permute(2, 3, 0, 1)  # (local_batch, feature_dim, rows, columns)
        predictions = [context(orient(grid, i)) for i, context in enumerate(self.contexts)]
        return {
            "targets": self.project(grid).flatten(1),
            "predictions": torch.stack(predictions, dim=1),
        }

    def cut_patches(self, batch: Batch) -> Tensor:
        """Cut the view into a grid of overlapping patches.

        The shape is (rows, columns, local_batch, C, patch_size, patch_size).
        """
        if len(batch.views) != 1:
            raise ValueError(
                f"cpc: takes 1 view, got {len(batch.views)}; "
                "set views.crops to one crop with count 1"
            )
        view, size, stride = batch.views[0], self.config.patch_size, self.config.stride
        rows, columns = ((length - size) // stride + 1 for length in view.shape[-2:])
        if rows != columns and self.config.num_directions > 2:
            raise ValueError(
                f"method.num_directions: {self.config.num_directions} predicts rows and columns, "
                f"which have different lengths in a grid of {rows} x {columns} patches; give 2 or "
                "1 to predict rows only, or square views"
            )
        if rows <= max(self.config.rows_ahead):
            raise ValueError(
                f"method.rows_ahead: {list(self.config.rows_ahead)} does not fit a grid of "
                f"{rows} x {columns} patches; give smaller distances, or lower method.stride or "
                "method.patch_size"
            )
        return view.unfold(2, size, stride).unfold(3, size, stride).permute(2, 3, 0, 1, 4, 5)

    def loss(self, embeddings: Embeddings, targets: Embeddings) -> LossOutput:
        """Return the InfoNCE loss, summed over `rows_ahead` and averaged over directions.

        The candidates of every prediction are the patches of all images of the global batch.
        """
        predictions = embeddings["predictions"]
        grid = embeddings["targets"].unflatten(1, predictions.shape[3:])
        rows_ahead = self.config.rows_ahead
        loss = patch_prediction.cpc(
            predictions, grid, rows_ahead=rows_ahead, scale=self.config.scale
        )
        return LossOutput(loss, {"info_nce": loss / len(rows_ahead)})

    def monitored(self, embeddings: Embeddings, targets: Embeddings) -> Monitored:
        """Monitor the flattened grid of targets. A single view makes no pairs to compare."""
        return Monitored(embeddings["targets"])
