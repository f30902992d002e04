"""DINO (Caron et al., ICCV 2021, arXiv:2104.14294).

The student sees any view and predicts a teacher's centered and sharpened output for a global view.
Head, loss and order of updates follow facebookresearch/dino at 7c446df5 (main_dino.py,
vision_transformer.py).

Logits are transient, so only the embeddings and one mean of a micro-batch are kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.losses import distillation
from ssl_pretrain.losses.similarity import upcast
from ssl_pretrain.methods.base import (
    Embeddings,
    LossOutput,
    Method,
    MethodConfig,
    Monitored,
    check_vit_starts,
    forward_by_size,
)
from ssl_pretrain.models.components import Backbone, Teacher, rising_momentum
from ssl_pretrain.optim import schedules
from ssl_pretrain.optim.schedules import Progress
from ssl_pretrain.schema import DIMENSIONLESS, setting
from ssl_pretrain.views.batch import Batch

SMALL_CONFIG = {
    "hidden_dim": 256,
    "bottleneck_dim": 64,
    "num_prototypes": 1024,
    "freeze_last_layer_epochs": 0,
    "head_batch_norm": True,
    "momentum": 0.99,
}


@dataclass
class Config(MethodConfig):
    """Configuration of DINO."""

    name: str = "dino"
    hidden_dim: int = setting(2048, "Width of the head's hidden layers.")
    bottleneck_dim: int = setting(256, "Width of the head's bottleneck.")
    head_batch_norm: bool = setting(
        False,
        "Batch norm in the head's hidden layers, for ResNets on small images (use_bn_in_head).",
    )
    num_prototypes: int = setting(65536, "Number of prototypes.", unit="prototypes")
    train_norm: bool = setting(
        False, "Train the norms of the prototypes (norm_last_layer false in the authors' code)."
    )
    temperature: float = setting(0.1, "Temperature of the student's softmax.")
    teacher_temperature: float = setting(
        0.04, "Temperature of the teacher's softmax after its warm-up."
    )
    teacher_temperature_start: float = setting(
        0.04, "Temperature of the teacher's softmax in the first epoch.", unit=DIMENSIONLESS
    )
    teacher_temperature_warmup_epochs: int = setting(
        0, "Epochs over which the teacher's temperature warms up. It changes once per epoch."
    )
    momentum: float = setting(0.996, "Momentum of the teacher at step 0. It ends at 1.")
    center_momentum: float = setting(0.9, "Momentum of the center of the teacher's logits.")
    freeze_last_layer_epochs: int = setting(
        1, "Epochs during which the head's last layer is not trained."
    )
    vit_starts: Literal["as_built", "authors"] = setting(
        "as_built",
        "Class token of a new ViT. Its deviation is timm's 1e-6 for as_built and 0.02 for authors.",
    )

    def check(self, run: Any, world_size: int) -> None:
        """Raise ValueError if the authors' initialization would replace loaded weights."""
        check_vit_starts(self.vit_starts, run)

    def build(self, backbone: Backbone) -> Method:
        """Build DINO on top of a backbone."""
        return DINO(self, backbone)


class NormalizedLinear(nn.Linear):
    """A linear layer without bias whose weight rows are normalized to unit length.

    Args:
        in_dim: Width of the input.
        out_dim: Width of the output.
        train_norm: Scale each row by a trained `norm`.
    """

    norm: Tensor | None

    def __init__(self, in_dim: int, out_dim: int, train_norm: bool):
        super().__init__(in_dim, out_dim, bias=False)
        norm = nn.Parameter(torch.ones(out_dim, 1)) if train_norm else None
        self.register_parameter("norm", norm)

    def forward(self, z: Tensor) -> Tensor:
        """Map `z` of shape (rows, in_dim) to its products with the unit rows, (rows, out_dim)."""
        rows = F.normalize(self.weight)
        return F.linear(z, rows if self.norm is None else rows * self.norm)


class Head(nn.Module):
    """Head that maps features to normalized embeddings and then to the prototypes' logits."""

    def __init__(self, in_dim: int, config: Config):
        super().__init__()
        widths = in_dim, config.hidden_dim, config.hidden_dim, config.bottleneck_dim
        linear = [nn.Linear(*pair) for pair in pairwise(widths)]
        for layer in linear:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        norms: list[nn.Module] = [
            nn.BatchNorm1d(config.hidden_dim) if config.head_batch_norm else nn.Identity()
            for _ in range(2)
        ]
        self.mlp = nn.Sequential(
            linear[0], norms[0], nn.GELU(), linear[1], norms[1], nn.GELU(), linear[2]
        )
        self.last_layer = NormalizedLinear(
            config.bottleneck_dim, config.num_prototypes, config.train_norm
        )

    def embed(self, features: Tensor) -> Tensor:
        """Return the embeddings of unit length, shape (rows, bottleneck_dim)."""
        return F.normalize(self.mlp(features))

    def forward(self, features: Tensor) -> Tensor:
        """Return the prototypes' logits, shape (rows, num_prototypes)."""
        logits: Tensor = self.last_layer(self.embed(features))
        return logits


class DINO(Method):
    """Student that predicts a teacher's centered and sharpened output for another view."""

    evaluated_module = "teacher.backbone"
    evaluated_network = "teacher"
    transient = ("logits",)  # the largest tensors, views * num_prototypes numbers per image
    center: Tensor
    teacher_temperature: Tensor

    def __init__(self, config: Config, backbone: Backbone):
        super().__init__(config, backbone)
        class_token = getattr(backbone.model, "cls_token", None)
        if class_token is not None and config.vit_starts == "authors":
            # timm initializes the other weights as the authors do.
            nn.init.trunc_normal_(class_token, std=0.02)
        self.head = Head(backbone.feature_dim, config)
        self.teacher = Teacher(backbone=backbone, head=self.head)
        self.register_buffer("center", torch.zeros(config.num_prototypes))
        self.register_buffer("teacher_temperature", torch.tensor(temperature_at(config, 0)))

    def forward(self, batch: Batch) -> Embeddings:
        """Return the global views' embeddings, detached, and the logits of all views.

        Returns:
            `z_a` and `z_b`, shape (local_batch, bottleneck_dim), and `logits`, shape
            (local_batch, views, num_prototypes).
        """
        self.two_views(batch, local_views=True)
        num_views = len(batch.views)
        z = self.head.embed(torch.cat(forward_by_size(self.backbone, batch.views)))
        logits = torch.stack(self.head.last_layer(z).chunk(num_views), dim=1)
        z_a, z_b = z.detach().chunk(num_views)[:2]
        return {"z_a": z_a, "z_b": z_b, "logits": logits}

    @torch.no_grad()
    def targets(self, batch: Batch) -> Embeddings:
        """Return the teacher's logits of the global views, their mean, and the assignments.

        Returns:
            `logits`, shape (local_batch, 2, num_prototypes). `mean_logits`, their mean over the
            images and views of this micro-batch, shape (1, num_prototypes). `assignments`, the
            index of the largest centered logit of each first view, shape (local_batch,).
        """
        logits = upcast(self.teacher(torch.cat(batch.views[:2])))
        logits_a, logits_b = logits.chunk(2)
        return {
            "logits": torch.stack([logits_a, logits_b], dim=1),
            "mean_logits": logits.mean(0, keepdim=True),
            "assignments": (logits_a - self.center).argmax(1),
        }

    def loss(self, embeddings: Embeddings, targets: Embeddings) -> LossOutput:
        """Return the mean cross entropy over all pairs of a teacher's view and another view.

        The mean entropy of the teacher's output for the first view is logged, in nats.
        """
        probabilities = distillation.teacher_probabilities(
            targets["logits"], self.center, self.teacher_temperature
        )
        loss = distillation.cross_entropy_of_views(  # equation 3
            embeddings["logits"], probabilities, self.config.temperature
        )
        q = probabilities[0]
        entropy = -(q * q.clamp(min=1e-12).log()).sum(1).mean()
        return LossOutput(loss, {"teacher_entropy": entropy})

    @torch.no_grad()
    def after_step(self, progress: Progress, embeddings: Embeddings, targets: Embeddings) -> None:
        """Update the teacher and the center, and set the teacher temperature of the next step."""
        self.teacher.update(self, rising_momentum(progress, self.config.momentum), self.step_taken)
        mean = collectives.reduce_sum(targets["mean_logits"].mean(0)) / process_group.world_size()
        momentum = self.config.center_momentum
        new_center = momentum * self.center + (1 - momentum) * mean  # equation 4
        self.center.copy_(self.if_step_taken(new_center, self.center))
        self.teacher_temperature.fill_(temperature_at(self.config, progress.next().epoch))

    def frozen(self, progress: Progress) -> Sequence[str]:
        """Freeze the head's last layer during the first `freeze_last_layer_epochs` epochs."""
        is_frozen = progress.epoch < self.config.freeze_last_layer_epochs
        return ("head.last_layer",) if is_frozen else ()

    def monitored(self, embeddings: Embeddings, targets: Embeddings) -> Monitored:
        """Monitor the embeddings of the global views and the teacher's assignments."""
        return Monitored(
            embeddings["z_a"],
            (embeddings["z_a"], embeddings["z_b"]),
            assignments=targets["assignments"],
            num_prototypes=self.config.num_prototypes,
        )


def temperature_at(config: Config, epoch: int) -> float:
    """Return the teacher's temperature in an epoch.

    It changes by the same amount in every epoch of the warm-up.
    """
    warmup_epochs = config.teacher_temperature_warmup_epochs
    if epoch >= warmup_epochs:
        return config.teacher_temperature
    start, final = config.teacher_temperature_start, config.teacher_temperature
    last_warmup_epoch = max(1, warmup_epochs - 1)
    return schedules.linear(epoch, start=start, final=final, final_position=last_warmup_epoch)
