"""LeJEPA (Balestriero and LeCun, 2025, arXiv:2511.08544).

All views of an image predict the mean embedding of its global views, and SIGReg keeps the
embeddings close to a standard normal distribution. There is no teacher, no stop-gradient and no
schedule. The loss, the projector and the recipes follow rbalestr-lab/lejepa at eddffdd8
(lejepa/univariate/epps_pulley.py, lejepa/multivariate/slicing.py, MINIMAL.md, README.md).

The slices of a step are a pure function of two buffers: a seed drawn with the initial weights, and
the number of steps done. All ranks, all micro-batches and a resumed run draw the same.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ssl_pretrain.losses import normality
from ssl_pretrain.methods.base import (
    Embeddings,
    LossOutput,
    Method,
    MethodConfig,
    Monitored,
    forward_by_size,
)
from ssl_pretrain.models.components import Backbone, mlp
from ssl_pretrain.optim.schedules import Progress
from ssl_pretrain.schema import setting
from ssl_pretrain.views import recipe
from ssl_pretrain.views.batch import Batch

SMALL_CONFIG = {
    "embedding_dim": 128,
    "projector_dims": [512, 512, 32],
    "num_slices": 256,
}


@dataclass
class Config(MethodConfig):
    """Configuration of LeJEPA."""

    name: str = "lejepa"
    embedding_dim: int = setting(
        512, "Width of the linear layer between backbone and projector, or 0 for none.", minimum=0
    )
    projector_dims: list[int] = setting([2048, 2048, 512], "Widths of the projector's layers.")
    num_global_views: int = setting(
        2,
        "Number of global views, which come first. All views predict the mean of these.",
        minimum=1,
        unit="views",
    )
    sigreg_weight: float = setting(
        0.05, "Weight lambda of SIGReg. The prediction term has 1 - lambda.", maximum=1
    )
    num_slices: int = setting(
        1024, "Number of random directions per step.", minimum=1, unit="directions"
    )

    def check(self, run: Any, world_size: int) -> None:
        """Raise ValueError unless the views suit the method."""
        num_views = len(recipe.crop_per_view(run.views))
        if num_views < 2:
            raise ValueError(
                "views.crops: lejepa takes at least 2 views, got 1; set views.crops.*.count"
            )
        if self.num_global_views > num_views:
            raise ValueError(
                f"method.num_global_views: {self.num_global_views} is more than the "
                f"{num_views} views of views.crops; set it to {num_views} at most"
            )

    def build(self, backbone: Backbone) -> Method:
        """Build LeJEPA on top of a backbone."""
        return LeJEPA(self, backbone)


class LeJEPA(Method):
    """Prediction between views whose embeddings are kept normally distributed."""

    couples = "embeddings"
    slice_seed: Tensor
    slice_step: Tensor

    def __init__(self, config: Config, backbone: Backbone):
        super().__init__(config, backbone)
        width = config.embedding_dim or backbone.feature_dim
        self.embedding: nn.Module = nn.Identity()
        if config.embedding_dim:
            # The authors use timm's classifier layer, which has this initialization. Its bias is
            # left out, because the projector's batch norm cancels it.
            self.embedding = nn.Linear(backbone.feature_dim, width, bias=False)
            nn.init.trunc_normal_(self.embedding.weight, std=0.02)
        self.projector = mlp(width, *config.projector_dims)
        self.register_buffer("slice_seed", torch.randint(2**62, ()))
        self.register_buffer("slice_step", torch.zeros((), dtype=torch.int64))

    def forward(self, batch: Batch) -> Embeddings:
        """Return the projector's embeddings of all views as `z`, (local_batch, views, dim)."""
        features = torch.cat(forward_by_size(self.backbone, batch.views))
        z = self.projector(self.embedding(features))
        return {"z": torch.stack(z.chunk(len(batch.views)), dim=1)}

    def loss(self, embeddings: Embeddings, targets: Embeddings) -> LossOutput:
        """Return the weighted sum of both terms, and log each term."""
        terms = normality.lejepa_terms(
            embeddings["z"],
            step=self.slice_step,
            seed=self.slice_seed,
            num_global_views=self.config.num_global_views,
            num_slices=self.config.num_slices,
        )
        loss = terms.weighted_sum(sigreg_weight=self.config.sigreg_weight)
        return LossOutput(loss, terms._asdict())

    @torch.no_grad()
    def after_step(self, progress: Progress, embeddings: Embeddings, targets: Embeddings) -> None:
        """Advance the step that determines the slices."""
        self.slice_step.fill_(progress.step + 1)

    def monitored(self, embeddings: Embeddings, targets: Embeddings) -> Monitored:
        """Monitor the embeddings of the first two views, which should be normally distributed."""
        z_a, z_b = embeddings["z"].unbind(1)[:2]
        return Monitored(z_a, (z_a, z_b), target_is_gaussian=True)
