"""SwAV (Caron et al., NeurIPS 2020, arXiv:2006.09882).

The prototypes assigned to one view are predicted from the other views. Heads, Sinkhorn
iterations, queue and order of updates follow facebookresearch/swav at 06b1b7cb (main_swav.py).
The authors normalize the prototypes before each forward pass. Here they are normalized after each
step, which gives the forward passes the same weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.losses import clustering
from ssl_pretrain.losses.similarity import upcast
from ssl_pretrain.methods.base import (
    Embeddings,
    LossOutput,
    Method,
    MethodConfig,
    Monitored,
    forward_by_size,
)
from ssl_pretrain.models.components import Backbone, Queue, check_queue_size, mlp
from ssl_pretrain.optim.schedules import Progress
from ssl_pretrain.schema import DIMENSIONLESS, setting
from ssl_pretrain.views.batch import Batch

SMALL_CONFIG = {"hidden_dim": 256, "dim": 64, "num_prototypes": 300, "freeze_prototypes_steps": 39}


@dataclass
class Config(MethodConfig):
    """Configuration of SwAV."""

    name: str = "swav"
    hidden_dim: int = setting(2048, "Width of the projector's hidden layer.")
    dim: int = setting(128, "Width of the embeddings.")
    num_prototypes: int = setting(3000, "Number of prototypes.", unit="prototypes")
    temperature: float = setting(0.1, "Divisor of the similarities to the prototypes.")
    epsilon: float = setting(
        0.05,
        "Entropy regularization of the assignments. "
        "Use 0.03 if the loss stays at ln(num_prototypes).",
        unit=DIMENSIONLESS,
    )
    num_iterations: int = setting(3, "Iterations of Sinkhorn-Knopp.", unit="iterations")
    freeze_prototypes_steps: int = setting(
        313,
        "Initial steps with frozen prototypes (default: one ImageNet epoch at batch size 4,096).",
    )
    queue_size: int = setting(
        0,
        "Past images that the assignments include, 0 for no queue. "
        "The paper uses 3,840 at batch size 256.",
        unit="images",
    )
    queue_from_epoch: int = setting(15, "Epoch from which the queue is used.")

    def check(self, run: Any, world_size: int) -> None:
        """Raise ValueError unless the queue, if any, holds a whole number of global batches."""
        if self.queue_size:
            check_queue_size(self.queue_size, run.global_batch_size)

    def build(self, backbone: Backbone) -> Method:
        """Build SwAV on top of a backbone."""
        return SwAV(self, backbone)


class SwAV(Method):
    """Prediction of the prototypes assigned to a global view from the other views."""

    couples = "embeddings"

    def __init__(self, config: Config, backbone: Backbone):
        super().__init__(config, backbone)
        self.projector = mlp(backbone.feature_dim, config.hidden_dim, config.dim, hidden_bias=True)
        self.prototypes = nn.Linear(config.dim, config.num_prototypes, bias=False)
        with torch.no_grad():
            self.prototypes.weight.copy_(F.normalize(self.prototypes.weight))
        self.queue = (
            Queue(config.queue_size, 2, config.dim, random=False) if config.queue_size else None
        )

    def forward(self, batch: Batch) -> Embeddings:
        """Return the global views' embeddings, detached, and the scores of all views.

        Returns:
            `z_a` and `z_b` of unit length, shape (local_batch, dim), and `scores`, the products
            with the prototypes, shape (local_batch, views, num_prototypes).
        """
        self.two_views(batch, local_views=True)
        num_views = len(batch.views)
        features = torch.cat(forward_by_size(self.backbone, batch.views))
        z = F.normalize(self.projector(features))  # batch norm sees all views at once
        scores = torch.stack(self.prototypes(z).chunk(num_views), dim=1)
        z_a, z_b = z.detach().chunk(num_views)[:2]
        return {"z_a": z_a, "z_b": z_b, "scores": scores}

    def loss(self, embeddings: Embeddings, targets: Embeddings) -> LossOutput:
        """Return the mean cross entropy between assignments and scores over pairs of views.

        The assignments of each global view are predicted from every other view. The mean entropy of
        the second view's assignments is logged, in nats.
        """
        scores = upcast(embeddings["scores"])
        assignments = [self.assignments(scores.detach()[:, view], view) for view in (0, 1)]
        loss = clustering.swapped_prediction(  # equations 1 and 2
            scores, assignments, self.config.temperature
        )
        q = assignments[1]
        entropy = -(q * q.clamp(min=1e-12).log()).sum(1).mean()
        return LossOutput(loss, {"assignment_entropy": entropy})

    @torch.no_grad()
    def assignments(self, scores: Tensor, view: int) -> Tensor:
        """Return soft assignments of this rank's images, shape (local_batch, num_prototypes).

        Every prototype gets an equal share of the global batch, and of the queue once it is full.
        """
        valid = scores.new_ones(len(scores))
        rows = scores
        if self.queue is not None:
            # Each rank scores an equal number of the queue's rows.
            num_past = len(self.queue.rows) // process_group.world_size()
            start = process_group.rank() * num_past
            past = self.queue.rows[start : start + num_past, view].to(scores.dtype)
            rows = torch.cat([scores, past @ upcast(self.prototypes.weight).T])
            is_full = (self.queue.filled == len(self.queue.rows)).to(scores.dtype)
            valid = torch.cat([valid, is_full.expand(num_past)])
        q = clustering.sinkhorn(
            rows,
            valid,
            epsilon=self.config.epsilon,
            num_iterations=self.config.num_iterations,
        )
        return q[: len(scores)]

    @torch.no_grad()
    def after_step(self, progress: Progress, embeddings: Embeddings, targets: Embeddings) -> None:
        """Normalize the prototypes and push the embeddings onto the queue.

        The queue is empty until epoch `queue_from_epoch`.
        """
        (weight,) = collectives.local_tensors([self.prototypes.weight])  # a shard has whole rows
        weight.copy_(self.if_step_taken(F.normalize(weight), weight))
        if self.queue is not None and progress.epoch >= self.config.queue_from_epoch:
            z = torch.stack([embeddings["z_a"], embeddings["z_b"]], dim=1)
            self.queue.push(z, self.step_taken)

    def frozen(self, progress: Progress) -> Sequence[str]:
        """Freeze the prototypes during the first `freeze_prototypes_steps` steps."""
        return ("prototypes",) if progress.step < self.config.freeze_prototypes_steps else ()

    def monitored(self, embeddings: Embeddings, targets: Embeddings) -> Monitored:
        """Monitor the global views' embeddings and the closest prototype of each first view."""
        scores = embeddings["scores"]
        return Monitored(
            embeddings["z_a"],
            (embeddings["z_a"], embeddings["z_b"]),
            assignments=scores[:, 0].argmax(1),
            num_prototypes=scores.shape[-1],
        )
