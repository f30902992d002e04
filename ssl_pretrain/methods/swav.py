"""SwAV (Caron et al., NeurIPS 2020, arXiv:2006.09882): one view's prototype assignments are predicted from the others.

Heads, Sinkhorn, queue and order of updates follow facebookresearch/swav at 06b1b7cb (main_swav.py). The prototypes, which
its authors normalize before each forward, are normalized after each step: the same weights are met.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.methods.base import Embeddings, Method, MethodConfig, Views, by_size, wide
from ssl_pretrain.models.backbones import Backbone
from ssl_pretrain.models.heads import mlp
from ssl_pretrain.models.queue import Queue, check_queue
from ssl_pretrain.schema import setting

SMALL = {"hidden_dim": 256, "dim": 64, "num_prototypes": 300, "freeze_prototypes_steps": 39}


@dataclass
class Config(MethodConfig):
    """Configuration of SwAV."""

    name: str = "swav"
    hidden_dim: int = setting(2048, "Width of the projector's hidden layer.")
    dim: int = setting(128, "Width of the embeddings.")
    num_prototypes: int = setting(3000, "Number of prototypes.")
    temperature: float = setting(0.1, "Divisor of the similarities to the prototypes.")
    epsilon: float = setting(
        0.05,
        "Entropy regularization of the assignments. "
        "Use 0.03 if the loss stays at ln(num_prototypes).",
    )
    num_iterations: int = setting(3, "Iterations of Sinkhorn-Knopp.")
    freeze_prototypes_steps: int = setting(
        313, "First steps with fixed prototypes: one epoch at a batch of 4,096."
    )
    queue_size: int = setting(
        0,
        "Past images that the assignments include (3,840 at a batch of 256). 0: no queue.",
    )
    queue_from_epoch: int = setting(15, "Epoch from which the queue is used.")

    def check(self, run: Any, world_size: int) -> None:
        if self.queue_size:
            check_queue(self.queue_size, run.global_batch_size)

    def build(self, backbone: Backbone) -> SwAV:
        return SwAV(self, backbone)


class SwAV(Method):
    couples_batch = True

    def __init__(self, config: Config, backbone: Backbone):
        super().__init__(config, backbone)
        self.projector = mlp(backbone.feature_dim, config.hidden_dim, config.dim, hidden_bias=True)
        self.prototypes = nn.Linear(config.dim, config.num_prototypes, bias=False)
        with torch.no_grad():
            self.prototypes.weight.copy_(F.normalize(self.prototypes.weight))
        self.queue = (
            Queue(config.queue_size, 2, config.dim, random=False) if config.queue_size else None
        )

    def forward(self, batch: Views) -> Embeddings:
        if len(batch.views) < 2 or batch.views[0].shape != batch.views[1].shape:
            raise ValueError(
                f"swav: takes 2 global views and any number of local ones, got {len(batch.views)}; set views.crops.*.count"
            )
        z = F.normalize(
            self.projector(torch.cat(by_size(self.backbone, batch.views)))
        )  # the head sees all crops at once
        scores = torch.stack(self.prototypes(z).chunk(len(batch.views)), dim=1)
        z_a, z_b = z.detach().chunk(len(batch.views))[:2]
        return {
            "z_a": z_a,
            "z_b": z_b,
            "scores": scores,
        }  # (local_batch, dim) twice, (local_batch, views, num_prototypes)

    def loss(self, embeddings: Embeddings, targets: Embeddings) -> tuple[Tensor, dict[str, Tensor]]:
        scores = wide(embeddings["scores"])
        num_views = scores.shape[1]
        total = scores.new_zeros(())
        for assigned in (0, 1):
            q = self.assignments(scores.detach()[:, assigned], assigned)
            for view in range(num_views):
                if view != assigned:
                    predicted = F.log_softmax(scores[:, view] / self.config.temperature, dim=1)
                    total = total - (q * predicted).sum(1).mean()  # eq. 2
        return total / (2 * (num_views - 1)), {
            "assignment_entropy": -(q * q.clamp(min=1e-12).log()).sum(1).mean()
        }

    @torch.no_grad()
    def assignments(self, scores: Tensor, view: int) -> Tensor:
        """Soft assignments of this rank's images, (local_batch, num_prototypes), equally many for each prototype over the
        global batch and, once it is full, the queue."""
        present = scores.new_ones(len(scores))
        rows = scores
        if self.queue is not None:
            share = (
                len(self.queue.rows) // process_group.world_size()
            )  # this rank's part of the work
            past = self.queue.rows[
                process_group.rank() * share : (process_group.rank() + 1) * share, view
            ].to(scores.dtype)
            rows = torch.cat([scores, past @ wide(self.prototypes.weight).T])
            full = (self.queue.filled == len(self.queue.rows)).to(scores.dtype)
            present = torch.cat([present, full.expand(share)])
        return sinkhorn(
            rows, present, epsilon=self.config.epsilon, num_iterations=self.config.num_iterations
        )[: len(scores)]

    @torch.no_grad()
    def after_step(self, progress: float, embeddings: Embeddings, targets: Embeddings) -> None:
        (weight,) = collectives.shards([self.prototypes.weight])  # whole rows
        weight.copy_(
            torch.where(
                torch.as_tensor(self.stepped, device=weight.device) > 0, F.normalize(weight), weight
            )
        )
        if self.queue is not None and self.epoch_of(progress) >= self.config.queue_from_epoch:
            self.queue.push(
                torch.stack([embeddings["z_a"], embeddings["z_b"]], dim=1), self.stepped
            )

    def frozen(self, progress: float) -> Sequence[str]:
        steps = self.config.freeze_prototypes_steps
        return ("prototypes",) if steps and self.step_of(progress) < steps else ()


def sinkhorn(scores: Tensor, present: Tensor, *, epsilon: float, num_iterations: int) -> Tensor:
    """Assignments of all ranks' rows to prototypes, rows summing to 1 and prototypes to equal shares: section 3.1.

    Args:
        scores: (rows, num_prototypes), float32 at least: exp(1 / 0.05) is beyond float16.
        present: (rows,), 0 for those that do not count.
    """
    q = torch.exp(scores / epsilon) * present[:, None]
    q = q / collectives.reduce_sum(q.sum())
    for _ in range(num_iterations):
        q = q / (collectives.reduce_sum(q.sum(0)) * q.shape[1])
        q = q / (q.sum(1, keepdim=True) + (1 - present[:, None]))
    return q
