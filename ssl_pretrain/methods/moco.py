"""MoCo v1 (He et al., CVPR 2020, arXiv:1911.05722) and v2 (Chen et al., 2020, arXiv:2003.04297).

Each query has to find its key among a queue of past keys. The head, the queue and the order of
updates follow facebookresearch/moco at 7397dfe1 (moco/builder.py). The authors update the teacher
before it computes the keys. Here it is updated after the step, so the next batch sees the same
weights. In the recipe a batch norm group has 32 images (parallel.bn_group_images), as on one of the
authors' GPUs. Key views are shuffled between the groups, so a key's group differs from its query's.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.losses import queues, similarity
from ssl_pretrain.methods.base import (
    Embeddings,
    LossOutput,
    Method,
    MethodConfig,
    Monitored,
)
from ssl_pretrain.models.components import Backbone, Queue, Teacher, check_queue_size, mlp
from ssl_pretrain.optim.schedules import Progress
from ssl_pretrain.schema import setting
from ssl_pretrain.views.batch import Batch

SMALL_CONFIG = {"projector_dims": [256, 128], "queue_size": 4096, "momentum": 0.99}
PRESET_OVERRIDES = ["parallel.bn_group_images=32"]


@dataclass
class Config(MethodConfig):
    """Configuration of MoCo v2. For v1 set projector_dims [128] and temperature 0.07."""

    name: str = "moco"
    projector_dims: list[int] = setting([2048, 128], "Widths of the projector's layers.")
    temperature: float = setting(0.2, "Divisor of the cosine similarities.")
    queue_size: int = setting(65536, "Number of keys in the queue.", unit="keys")
    momentum: float = setting(0.999, "Momentum of the teacher.")
    shuffled_batch_norm: bool = setting(
        True, "Exchange key views between batch norm groups, so that statistics reveal no pairs."
    )
    without_queue: bool = setting(
        False, "Ablation: no queue. The negatives are the other keys of the batch."
    )

    def check(self, run: Any, world_size: int) -> None:
        """Check that the queue size and the micro-batch size suit the global batch size.

        Raises:
            ValueError: If `queue_size` is not a multiple of the global batch size, or if
                `shuffled_batch_norm` is combined with micro-batches.
        """
        if not self.without_queue:
            check_queue_size(self.queue_size, run.global_batch_size)
        allowed_sizes = (0, run.global_batch_size // world_size)
        if self.shuffled_batch_norm and run.micro_batch_size not in allowed_sizes:
            raise ValueError(
                f"micro_batch_size: {run.micro_batch_size} cannot be combined with "
                "method.shuffled_batch_norm, which exchanges key views over the whole global batch "
                "at once; set micro_batch_size=0, or method.shuffled_batch_norm=false, which "
                "departs from the recipe"
            )

    def build(self, backbone: Backbone) -> Method:
        """Build MoCo on top of a backbone."""
        return MoCo(self, backbone)


class MoCo(Method):
    """Contrastive learning of queries against a teacher's keys and a queue of past keys."""

    def __init__(self, config: Config, backbone: Backbone):
        super().__init__(config, backbone)
        self.projector = mlp(backbone.feature_dim, *config.projector_dims, batch_norm=False)
        self.teacher = Teacher(backbone=backbone, projector=self.projector)
        self.queue = (
            None if config.without_queue else Queue(config.queue_size, config.projector_dims[-1])
        )
        self.couples = "embeddings" if config.without_queue else "nothing"
        self.negatives = "images" if config.without_queue else "queue"

    def forward(self, batch: Batch) -> Embeddings:
        """Return the queries: student embeddings of the first view, (local_batch, dim)."""
        return {"queries": self.projector(self.backbone(self.two_views(batch)[0]))}

    @torch.no_grad()
    def targets(self, batch: Batch) -> Embeddings:
        """Return the normalized keys: teacher embeddings of the second view, (local_batch, dim)."""
        keys = (
            forward_shuffled(self.teacher, batch.views[1], batch.indices)
            if self.config.shuffled_batch_norm
            else self.teacher(batch.views[1])
        )
        return {"keys": F.normalize(similarity.upcast(keys))}

    def loss(self, embeddings: Embeddings, targets: Embeddings) -> LossOutput:
        """Return the InfoNCE loss of the queries. The negatives are the past keys in the queue.

        Without a queue the negatives are the other keys of the global batch.
        """
        queries, keys = embeddings["queries"], targets["keys"]
        queue = None if self.queue is None else self.queue.rows
        loss = queues.moco(queries, keys, queue, temperature=self.config.temperature)  # equation 1
        return LossOutput(loss, {"positive_cosine": similarity.mean_cosine(queries.detach(), keys)})

    @torch.no_grad()
    def after_step(self, progress: Progress, embeddings: Embeddings, targets: Embeddings) -> None:
        """Push the keys onto the queue and update the teacher."""
        if self.queue is not None:
            self.queue.push(targets["keys"], self.step_taken)
        self.teacher.update(self, self.config.momentum, self.step_taken)

    def monitored(self, embeddings: Embeddings, targets: Embeddings) -> Monitored:
        """Monitor the queries, paired with their keys."""
        return Monitored(embeddings["queries"], (embeddings["queries"], targets["keys"]))


def forward_shuffled(network: nn.Module, views: Tensor, indices: Tensor) -> Tensor:
    """Return `network(views)`, computed with the global batch in a different order.

    A key's batch norm group then contains different images than its query's group. The
    permutation is a hash of the images' numbers, so every rank computes the same one without random
    state.

    Args:
        network: The teacher.
        views: This rank's views, shape (local_batch, C, height, width).
        indices: Numbers of their images in the data set, shape (local_batch,).
    """
    numbers = collectives.gather(indices)
    hashes = (numbers + numbers.sum()) * 0x9E3779B1 % 2**31
    order = torch.argsort((hashes ^ hashes >> 15) * 0x85EBCA6B % 2**31, stable=True)
    rows = slice(process_group.rank() * len(views), (process_group.rank() + 1) * len(views))
    shuffled = collectives.gather(network(collectives.gather(views)[order[rows]]))
    return shuffled[torch.argsort(order)[rows]]
