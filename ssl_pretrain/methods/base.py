"""What a method promises to the training loop: contract 1 of the design."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ssl_pretrain.backbones import Backbone

Embeddings = dict[str, Tensor]


class Views(Protocol):
    """What a method sees of a batch: the loader's `Batch`."""

    views: list[Tensor]  # each (local_batch, 3, height, width), global views first
    labels: Tensor  # (local_batch,), -1 where there are none
    indices: Tensor  # (local_batch,), the samples' numbers in the data set


@dataclass
class MethodConfig:
    """The part of a method's configuration that all methods have."""

    name: str = "???"

    def build(self, backbone: Backbone) -> Method:
        raise NotImplementedError(f"{type(self).__module__}: a method's Config builds its Method")


class Method(nn.Module):
    """A student, its loss, and whatever moves with it. Subclasses live in one file each and never import each other."""

    backbone: Backbone
    couples_batch: bool = False  # one image's loss depends on the others' embeddings of this batch
    needs_labels: bool = False
    evaluated: str = "backbone"  # the submodule that evaluations judge
    network: str = "student"  # its name in tables
    stepped: Tensor | float = 1.0  # on the device: 0.0 where a non-finite gradient was masked, so that nothing else moves either

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
        """(loss, logs): this rank's loss, whose mean over ranks is the global batch's, and scalars worth a curve."""
        raise NotImplementedError

    @torch.no_grad()
    def after_step(self, progress: float, embeddings: Embeddings, targets: Embeddings) -> None:
        """Moves teachers, queues and centres, once, after the optimizer: each movement times `self.stepped`."""

    def frozen(self, progress: float) -> Sequence[str]:
        """Prefixes of parameter names that do not move at this progress: their gradients become None after clipping."""
        return ()
