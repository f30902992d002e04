"""NNCLR (Dwibedi et al., ICCV 2021, arXiv:2104.14548).

The positive of an image is its nearest neighbor in a queue of past embeddings. The authors
published no code. The projector and the predictor follow the paper as lightly (at e8d317fc) and
solo-learn (at 9187ea39, nnclr.py) interpret it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from ssl_pretrain.losses import contrastive, similarity
from ssl_pretrain.losses.queues import nearest_neighbors
from ssl_pretrain.methods.base import Embeddings, LossOutput, Method, MethodConfig
from ssl_pretrain.models.components import Backbone, Queue, check_queue_size, mlp
from ssl_pretrain.optim.schedules import Progress
from ssl_pretrain.schema import setting
from ssl_pretrain.views.batch import Batch

SMALL_CONFIG = {
    "projector_dims": [256, 256, 128],
    "predictor_dim": 512,
    "queue_size": 4096,
    "temperature": 0.2,
}


@dataclass
class Config(MethodConfig):
    """Configuration of NNCLR."""

    name: str = "nnclr"
    projector_dims: list[int] = setting([2048, 2048, 256], "Widths of the projector's layers.")
    predictor_dim: int = setting(4096, "Width of the predictor's hidden layer.")
    temperature: float = setting(0.1, "Divisor of the cosine similarities.")
    queue_size: int = setting(
        98304, "Number of past embeddings searched for nearest neighbors.", unit="embeddings"
    )

    def check(self, run: Any, world_size: int) -> None:
        """Raise ValueError unless whole global batches fill the queue exactly."""
        check_queue_size(self.queue_size, run.global_batch_size)

    def build(self, backbone: Backbone) -> Method:
        """Build NNCLR on top of a backbone."""
        return NNCLR(self, backbone)


class NNCLR(Method):
    """Contrastive learning whose positives are nearest neighbors in a queue."""

    couples = "embeddings"
    negatives = "images"

    def __init__(self, config: Config, backbone: Backbone):
        super().__init__(config, backbone)
        self.projector = mlp(backbone.feature_dim, *config.projector_dims, last_batch_norm=True)
        dim = config.projector_dims[-1]
        self.predictor = mlp(dim, config.predictor_dim, dim)
        self.queue = Queue(config.queue_size, dim)

    def forward(self, batch: Batch) -> Embeddings:
        """Return both views' detached embeddings and their predictions, all (local_batch, dim)."""
        z_a, z_b = (self.projector(self.backbone(view)) for view in self.two_views(batch))
        predictions = {"p_a": self.predictor(z_a), "p_b": self.predictor(z_b)}
        return {"z_a": z_a.detach(), "z_b": z_b.detach(), **predictions}

    def loss(self, embeddings: Embeddings, targets: Embeddings) -> LossOutput:
        """Return the InfoNCE loss of neighbors and predictions, averaged over both directions.

        The nearest neighbors of one view's embeddings are the queries, and the predictions of the
        other view are the keys. The logged `neighbor_cosine` is the mean cosine of the first
        view's embeddings and their neighbors.
        """
        z_a, z_b = embeddings["z_a"], embeddings["z_b"]
        temperature = self.config.temperature
        neighbors_a = nearest_neighbors(z_a, self.queue.rows)
        neighbors_b = nearest_neighbors(z_b, self.queue.rows)
        a_to_b = contrastive.info_nce(neighbors_a, embeddings["p_b"], temperature=temperature)
        b_to_a = contrastive.info_nce(neighbors_b, embeddings["p_a"], temperature=temperature)
        logs = {"neighbor_cosine": similarity.mean_cosine(neighbors_a, z_a.detach())}
        return LossOutput((a_to_b + b_to_a) / 2, logs)

    @torch.no_grad()
    def after_step(self, progress: Progress, embeddings: Embeddings, targets: Embeddings) -> None:
        """Normalize the first view's embeddings and push them onto the queue."""
        self.queue.push(F.normalize(similarity.upcast(embeddings["z_a"])), self.step_taken)
