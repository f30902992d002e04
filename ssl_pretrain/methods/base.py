"""What a method promises to the training loop: contract 1 of the design."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ssl_pretrain.models.backbones import Backbone
from ssl_pretrain.schema import setting

Embeddings = dict[str, Tensor]


class Views(Protocol):
    """What a method sees of a batch: the loader's `Batch`."""

    views: list[Tensor]  # each (local_batch, 3, height, width), global views first
    labels: Tensor  # (local_batch,), -1 where there are none
    indices: Tensor  # (local_batch,), the samples' numbers in the data set


@dataclass
class MethodConfig:
    """Configuration that all methods share."""

    name: str = setting("???", "Name of the method: the name of its file in methods/.")

    def check(self, run: Any, world_size: int) -> None:
        """What the method asks of the rest of the `RunConfig`. Raises ValueError with the key, its value and what would do."""

    def build(self, backbone: Backbone) -> Method:
        raise NotImplementedError(f"{type(self).__module__}: a method's Config builds its Method")


class Method(nn.Module):
    """A student, its loss, and whatever moves with it. Subclasses live in one file each and never import each other."""

    backbone: Backbone
    couples_batch: bool = False  # one image's loss depends on the others' embeddings of this batch
    needs_labels: bool = False
    evaluated: str = "backbone"  # the submodule that evaluations judge
    network: str = "student"  # its name in tables
    stepped: Tensor | float = (
        1.0  # on the device: 0.0 where a non-finite gradient was masked, so that nothing else moves either
    )
    num_steps: int = 0  # optimizer steps of the run, and those of one epoch: set by the trainer
    steps_per_epoch: int = 0

    def __init__(self, config: Any, backbone: Backbone):
        super().__init__()
        self.config = config
        self.backbone = backbone

    def forward(self, batch: Views) -> Embeddings:
        """The student's embeddings, one row an image in every tensor, with a graph. Writes nothing but batch norm statistics."""
        raise NotImplementedError

    @torch.no_grad()
    def targets(self, batch: Views) -> Embeddings:
        """What the loss compares with and no gradient reaches: teacher outputs, labels. Once per part."""
        return {}

    def loss(self, embeddings: Embeddings, targets: Embeddings) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, logs): this rank's loss, whose mean over ranks is the global batch's, and scalars worth a curve.

        What is too large to be held until `after_step` it takes out of the dicts (DINO's logits).
        """
        raise NotImplementedError

    @torch.no_grad()
    def after_step(self, progress: float, embeddings: Embeddings, targets: Embeddings) -> None:
        """Moves teachers, queues and centres, once, after the optimizer: each movement times `self.stepped`."""

    def frozen(self, progress: float) -> Sequence[str]:
        """Prefixes of parameter names that do not move at this progress: their gradients become None after clipping."""
        return ()

    def step_of(self, progress: float) -> int:
        """Steps done."""
        assert self.num_steps > 0, "num_steps must be set before a schedule counts steps"
        return round(progress * self.num_steps)

    def epoch_of(self, progress: float) -> int:
        """Passes over the data done."""
        assert self.steps_per_epoch > 0, (
            "steps_per_epoch must be set before a schedule counts epochs"
        )
        return self.step_of(progress) // self.steps_per_epoch

    def next(self, progress: float) -> float:
        """The next step's progress: what moves after a step with the value that the authors use in the next one."""
        return min(1.0, (self.step_of(progress) + 1) / self.num_steps)


def two_views(name: str, batch: Views) -> tuple[Tensor, Tensor]:
    """Both views of a batch. Raises ValueError for another number of them, or two sizes."""
    if len(batch.views) != 2 or batch.views[0].shape != batch.views[1].shape:
        sizes = ", ".join(str(view.shape[-1]) for view in batch.views)
        raise ValueError(
            f"{name}: takes 2 views of one size, got {len(batch.views)} ({sizes} pixels); set views.crops to 2 in all"
        )
    return batch.views[0], batch.views[1]


def by_size(network: nn.Module, views: Sequence[Tensor]) -> list[Tensor]:
    """`network` of each view, neighbours of one size in one call: batch norm then sees them together, as in SwAV and DINO."""
    outputs: list[Tensor] = []
    start = 0
    for end in range(1, len(views) + 1):
        if end == len(views) or views[end].shape[-2:] != views[start].shape[-2:]:
            outputs += network(torch.cat(list(views[start:end]))).chunk(end - start)
            start = end
    return outputs


def wide(z: Tensor) -> Tensor:
    """`z` in float32, or float64 as it is: losses are not computed in bfloat16."""
    return z if z.dtype == torch.float64 else z.float()


def refuse_init(vit_starts: str, run: Any) -> None:
    """Raise ValueError if the weights that `backbone.init` loads would be replaced by the authors' first ones."""
    if vit_starts == "authors" and run.backbone.init != "random":
        raise ValueError(
            f"method.vit_starts: authors would replace weights that backbone.init={run.backbone.init} loads; "
            "set method.vit_starts=as_built"
        )
