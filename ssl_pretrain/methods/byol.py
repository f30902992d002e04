"""BYOL (Grill et al., NeurIPS 2020, arXiv:2006.07733).

The student predicts a teacher's embedding of the other view. Heads, loss and order of updates
follow google-deepmind/deepmind-research at f5de0ede (byol/). The teacher is updated after the
optimizer, with the momentum of the same step. The teacher's batch norm runs in training mode on its
own features.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from ssl_pretrain.losses.distillation import mean_squared_distance
from ssl_pretrain.methods.base import Embeddings, LossOutput, Method, MethodConfig, Monitored
from ssl_pretrain.models.components import Backbone, Teacher, mlp, rising_momentum
from ssl_pretrain.optim.schedules import Progress
from ssl_pretrain.schema import setting
from ssl_pretrain.views.batch import Batch

SMALL_CONFIG = {"hidden_dim": 512, "dim": 128}


@dataclass
class Config(MethodConfig):
    """Configuration of BYOL."""

    name: str = "byol"
    hidden_dim: int = setting(4096, "Width of the hidden layers of projector and predictor.")
    dim: int = setting(256, "Width of the embeddings.")
    momentum: float = setting(
        0.99,
        "Momentum of the teacher at step 0. It ends at 1. "
        "The paper uses 0.99 for 100 and 300 epochs and 0.996 for 1,000.",
    )
    without_predictor: bool = setting(
        False, "Omit the predictor. This ablation collapses (table 5b of the paper)."
    )
    without_momentum: bool = setting(
        False,
        "Replace the teacher by a copy of the student after every step, as an ablation (table 5a "
        "of the paper).",
    )
    teacher_starts: Literal["copied", "redrawn"] = setting(
        "copied",
        "Initial weights of the teacher. copied: equal to the student's. redrawn: drawn "
        "independently, as in the authors' code, which requires backbone.init=random.",
    )

    def check(self, run: Any, world_size: int) -> None:
        """Raise ValueError if a redrawn teacher would replace loaded weights."""
        if self.teacher_starts == "redrawn" and run.backbone.init != "random":
            raise ValueError(
                "method.teacher_starts: redrawn would replace the teacher's weights that "
                f"backbone.init={run.backbone.init} loads; set method.teacher_starts=copied"
            )

    def build(self, backbone: Backbone) -> Method:
        """Build BYOL on top of a backbone."""
        return BYOL(self, backbone)


class BYOL(Method):
    """Student that predicts a teacher's embedding of the other view, without negatives."""

    def __init__(self, config: Config, backbone: Backbone):
        super().__init__(config, backbone)
        hidden_dim, dim = config.hidden_dim, config.dim
        head = partial(mlp, hidden_bias=True, last_bias=False)
        self.projector = head(backbone.feature_dim, hidden_dim, dim)
        self.predictor = nn.Identity() if config.without_predictor else head(dim, hidden_dim, dim)
        self.teacher = Teacher(backbone=backbone, projector=self.projector)
        if config.teacher_starts == "redrawn":
            self.teacher.reinitialize()

    def forward(self, batch: Batch) -> Embeddings:
        """Return the predictions from both views' embeddings, each (local_batch, dim)."""
        p_a, p_b = (
            self.predictor(self.projector(self.backbone(view))) for view in self.two_views(batch)
        )
        return {"p_a": p_a, "p_b": p_b}

    @torch.no_grad()
    def targets(self, batch: Batch) -> Embeddings:
        """Return the teacher's embeddings of both views, each (local_batch, dim)."""
        z_a, z_b = (self.teacher(view) for view in batch.views)
        return {"z_a": z_a, "z_b": z_b}

    def loss(self, embeddings: Embeddings, targets: Embeddings) -> LossOutput:
        """Return the squared distances between predictions and embeddings, summed over both views.

        Each prediction is compared with the teacher's embedding of the other view. Both are scaled
        to unit length. The mean cosine of the first view's predictions and targets is logged.
        """
        a_to_b = mean_squared_distance(embeddings["p_a"], targets["z_b"])
        b_to_a = mean_squared_distance(embeddings["p_b"], targets["z_a"])
        # Equation 2, summed over both directions.
        return LossOutput(a_to_b + b_to_a, {"predicted_cosine": 1 - a_to_b.detach() / 2})

    @torch.no_grad()
    def after_step(self, progress: Progress, embeddings: Embeddings, targets: Embeddings) -> None:
        """Update the teacher with the momentum of the step that was just taken."""
        is_copy = self.config.without_momentum
        momentum = 0.0 if is_copy else rising_momentum(progress, self.config.momentum)
        self.teacher.update(self, momentum, self.step_taken)

    def monitored(self, embeddings: Embeddings, targets: Embeddings) -> Monitored:
        """Monitor the first view's prediction and the teacher's embedding of the second view."""
        return Monitored(embeddings["p_a"], (embeddings["p_a"], targets["z_b"]))
