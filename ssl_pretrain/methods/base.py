"""The interface between a method and the training step: contract 1 of the design."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_pretrain.losses.upcast import upcast
from ssl_pretrain.models.backbones import Backbone
from ssl_pretrain.optim.schedules import Progress
from ssl_pretrain.schema import setting
from ssl_pretrain.views.batch import Batch

Embeddings = dict[str, Tensor]


class LossOutput(NamedTuple):
    """Result of `Method.loss`."""

    loss: Tensor  # scalar on this rank; its mean over ranks is the loss of the global batch
    logs: dict[str, Tensor]  # scalars worth a curve


class Monitored(NamedTuple):
    """Tensors in which the collapse metrics look for a collapse. Rows are this rank's images."""

    embeddings: Tensor  # (local_batch, ...), the student's, of the first view
    pair: tuple[Tensor, Tensor] | None = None  # embeddings of two views of the same images
    assignments: Tensor | None = None  # (local_batch,), index of each image's prototype
    num_prototypes: int = 0


@dataclass
class MethodConfig:
    """Fields that the configurations of all methods share."""

    name: str = setting("???", "Name of the method: the name of its file in methods/.")

    def check(self, run: Any, world_size: int) -> None:
        """Raise ValueError, naming key and remedy, if the `RunConfig` does not suit the method."""

    def build(self, backbone: Backbone) -> Method:
        """Build the method on top of a backbone. Every method's `Config` overrides it."""
        raise NotImplementedError(f"{type(self).__module__}: a method's Config builds its Method")


class Method(nn.Module):
    """A student, its loss, and the teachers, queues and centers that move with it.

    Each subclass has one file. Methods never import each other.

    Attributes:
        couples: Which tensors of different images meet in the loss. Decides how a batch that does
            not fit in memory is split (contract 4 of the design).
        transient: Names of embeddings and targets that are dropped between `loss` and
            `after_step`, because they are too large to keep for every micro-batch.
        needs_labels: True if the data set must have labels.
        evaluated: Name of the submodule that is evaluated and exported.
        network: Name of that network in tables.
        stepped: 1.0 if the optimizer took the step, 0.0 if it was skipped for a gradient that is
            not finite. Lives on the device, and every movement in `after_step` is multiplied by it.
    """

    couples: Literal["nothing", "targets", "embeddings"] = "nothing"
    transient: tuple[str, ...] = ()
    needs_labels: bool = False
    evaluated: str = "backbone"
    network: str = "student"
    stepped: Tensor | float = 1.0

    def __init__(self, config: Any, backbone: Backbone):
        super().__init__()
        self.config = config
        self.backbone = backbone

    def forward(self, batch: Batch) -> Embeddings:
        """Return the student's embeddings with their graph, one row per image in every tensor.

        Only the running statistics of batch norm change.
        """
        raise NotImplementedError

    @torch.no_grad()
    def targets(self, batch: Batch) -> Embeddings:
        """Return what the loss needs without a gradient, such as teacher outputs and labels.

        Called once per micro-batch.
        """
        return {}

    def loss(self, embeddings: Embeddings, targets: Embeddings) -> LossOutput:
        """Return this rank's loss and its logs. Pure: nothing changes, the arguments included."""
        raise NotImplementedError

    @torch.no_grad()
    def after_step(self, progress: Progress, embeddings: Embeddings, targets: Embeddings) -> None:
        """Move teachers, queues and centers once per step, after the optimizer.

        Args:
            progress: Progress of the step that was just taken.
            embeddings: Embeddings of this rank's images, detached, without the transient ones.
            targets: Targets of this rank's images, without the transient ones.
        """

    def frozen(self, progress: Progress) -> Sequence[str]:
        """Return prefixes of the names of parameters that do not move in this step."""
        return ()

    def monitored(self, embeddings: Embeddings, targets: Embeddings) -> Monitored:
        """Return the tensors that the collapse metrics watch, from the arguments of `after_step`.

        By default the pair `z_a` and `z_b`. A method without them has its first embedding watched.
        """
        if "z_a" not in embeddings:
            return Monitored(next(iter(embeddings.values())))
        return Monitored(embeddings["z_a"], (embeddings["z_a"], embeddings["z_b"]))

    def if_stepped(self, new: Tensor, old: Tensor) -> Tensor:
        """Return `new` if the step was taken, else `old`, without the host waiting to know."""
        return torch.where(torch.as_tensor(self.stepped, device=new.device) > 0, new, old)

    def two_views(self, batch: Batch, *, local_views: bool = False) -> tuple[Tensor, Tensor]:
        """Return both global views of a batch.

        Args:
            batch: This rank's images.
            local_views: True if the method takes any number of local views besides.

        Raises:
            ValueError: The batch has other views than the method takes.
        """
        views = batch.views
        right_number = len(views) >= 2 if local_views else len(views) == 2
        if not right_number or views[0].shape != views[1].shape:
            sizes = ", ".join(str(view.shape[-1]) for view in views)
            accepted = "2 global views and any number of local ones"
            raise ValueError(
                f"{self.config.name}: takes {accepted if local_views else '2 views of one size'}, "
                f"got {len(views)} ({sizes} pixels); set views.crops.*.count"
            )
        return views[0], views[1]


class GroupedPairs(Method):
    """A method whose loss compares all embeddings of two views and pulls groups of images together.

    A group is one image, or the images of one label if `pairs: labels`.
    """

    couples = "embeddings"

    def __init__(self, config: Any, backbone: Backbone, projector: nn.Module):
        super().__init__(config, backbone)
        self.needs_labels = config.pairs == "labels"
        self.projector = projector

    def forward(self, batch: Batch) -> Embeddings:
        """Return the projector's embeddings of both views, each (local_batch, dim)."""
        z_a, z_b = (self.projector(self.backbone(view)) for view in self.two_views(batch))
        return {"z_a": z_a, "z_b": z_b}  # (local_batch, dim)

    @torch.no_grad()
    def targets(self, batch: Batch) -> Embeddings:
        """Return the label or the number of each image as its group, shape (local_batch,)."""
        return {"groups": batch.labels if self.needs_labels else batch.indices}


def by_size(network: Callable[[Tensor], Tensor], views: Sequence[Tensor]) -> list[Tensor]:
    """Return `network(view)` of each view, with neighboring views of one size in one call.

    Batch norm then normalizes over all of them together, as in SwAV and DINO.
    """
    outputs: list[Tensor] = []
    start = 0
    for end in range(1, len(views) + 1):
        if end == len(views) or views[end].shape[-2:] != views[start].shape[-2:]:
            outputs += network(torch.cat(list(views[start:end]))).chunk(end - start)
            start = end
    return outputs


def mean_cosine(a: Tensor, b: Tensor) -> Tensor:
    """Return the mean over rows of the cosine similarity of two (rows, dim) tensors."""
    return F.cosine_similarity(upcast(a), upcast(b), dim=1).mean()


def refuse_init(vit_starts: str, run: Any) -> None:
    """Raise ValueError if the authors' initialization would replace loaded weights."""
    if vit_starts == "authors" and run.backbone.init != "random":
        raise ValueError(
            f"method.vit_starts: authors would replace weights that "
            f"backbone.init={run.backbone.init} loads; set method.vit_starts=as_built"
        )
