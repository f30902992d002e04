"""Interface between a method and the training step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ssl_pretrain.models.components import Backbone, mlp
from ssl_pretrain.models.text_encoders import TextEncoder
from ssl_pretrain.optim.schedules import Progress
from ssl_pretrain.schema import setting
from ssl_pretrain.schema.image_sizes import describe, simplify
from ssl_pretrain.views import mask_recipe
from ssl_pretrain.views.batch import Batch, MaskSet, TextSet

Embeddings = dict[str, Tensor]


class LossOutput(NamedTuple):
    """Result of `Method.loss`."""

    loss: Tensor  # scalar on this rank; its mean over ranks is the loss of the global batch
    logs: dict[str, Tensor]  # scalars to plot over steps


class Monitored(NamedTuple):
    """Tensors that the collapse metrics watch. Rows are this rank's images."""

    embeddings: Tensor  # student embeddings of the first view, (local_batch, ...)
    pair: tuple[Tensor, Tensor] | None = None  # embeddings of two views of the same images
    assignments: Tensor | None = None  # index of each image's prototype, (local_batch,)
    num_prototypes: int = 0
    target_is_gaussian: bool = False  # the loss makes the embeddings standard normal


class Method(nn.Module):
    """A student, its loss, and the teachers, queues and centers that are updated with it.

    Each subclass has its own file. Methods never import each other.

    Attributes:
        couples: Kind of tensors through which the loss depends on several images at once. It
            decides how the step splits a batch that does not fit in memory. "nothing" means that
            the loss is a mean over images. "embeddings" means that it compares the student's
            embeddings of all images, as a contrastive loss does. "targets" means that it is a mean
            over images once `couple` has seen the targets of all images, as with Sinkhorn-Knopp
            over a teacher's outputs.
        compared: Names of embeddings that `loss` also compares between images if `couples` is
            "targets", such as the class tokens of KoLeo. They should be small, since all of the
            batch's are kept.
        negatives: What an anchor is pushed away from, for the plan of a run. "embeddings" means all
            other embeddings of both views, "images" means one embedding of every other image, and
            "mined" means one embedding per positive pair. If the method needs labels, they are of
            other classes. "patches" means the other patches of all images, "queue" means
            `config.queue_size` past embeddings, and "texts" means the second texts of all other
            items and the hard negatives of all items.
        transient: Names of embeddings and targets that are dropped between `loss` and
            `after_step`, because they are too large to keep for every micro-batch.
        needs_labels: True if the data set must have labels.
        evaluated_module: Name of the submodule that is evaluated and exported.
        evaluated_network: Name of that network in tables.
        step_taken: 1.0 if the optimizer took the step, or 0.0 if it skipped the step because the
            gradient was not finite. It is on the device. `after_step` multiplies each update by it.
    """

    couples: Literal["nothing", "targets", "embeddings"] = "nothing"
    compared: tuple[str, ...] = ()
    negatives: Literal["none", "embeddings", "images", "mined", "patches", "queue", "texts"] = (
        "none"
    )
    transient: tuple[str, ...] = ()
    needs_labels: bool = False
    evaluated_module: str = "backbone"
    evaluated_network: str = "student"
    step_taken: Tensor | float = 1.0

    def __init__(self, config: Any, backbone: Backbone | TextEncoder):
        super().__init__()
        self.config = config
        # The backbone of a method of sentences is its text encoder. Other methods take images.
        self.backbone: Backbone = backbone  # type: ignore[assignment]

    def forward(self, batch: Batch) -> Embeddings:
        """Return the student's embeddings with their graph, one row per image in every tensor.

        This changes no state except the running statistics of batch norm. No tensor is a view of a
        parameter, whose memory FSDP frees before the embeddings are read for the last time.
        """
        raise NotImplementedError

    @torch.no_grad()
    def targets(self, batch: Batch) -> Embeddings:
        """Return the inputs of the loss that need no gradient, such as teacher outputs and labels.

        This is called once per micro-batch.
        """
        return {}

    @torch.no_grad()
    def couple(self, targets: Embeddings) -> Embeddings:
        """Return what the loss needs from the targets of all images, if `couples` is "targets".

        This is called once per step. The result reaches `loss` and `after_step` whole, as
        `targets["coupled"]`. Targets that are kept until then should be narrow, such as a head's
        bottleneck instead of its logits.

        Args:
            targets: Targets of this rank's images, in all micro-batches.
        """
        raise NotImplementedError(
            f"{self.config.name}: couples is 'targets', so the method must define `couple`"
        )

    def couple_targets(self, targets: Embeddings) -> Embeddings:
        """Return the targets together with the result of `couple`, if the method has one."""
        if self.couples != "targets":
            return targets
        coupled: Any = self.couple(targets)
        return {**targets, "coupled": coupled}

    def loss(self, embeddings: Embeddings, targets: Embeddings) -> LossOutput:
        """Return this rank's loss and its logs, without changing any state or argument."""
        raise NotImplementedError

    @torch.no_grad()
    def after_step(self, progress: Progress, embeddings: Embeddings, targets: Embeddings) -> None:
        """Update teachers, queues and centers once per step, after the optimizer.

        Args:
            progress: Progress of the step that was just taken.
            embeddings: Embeddings of this rank's images, detached, without the transient ones.
            targets: Targets of this rank's images, without the transient ones.
        """

    def without_transient(
        self, embeddings: Embeddings, targets: Embeddings
    ) -> tuple[Embeddings, Embeddings]:
        """Return the tensors that `after_step` gets: detached, without the transient ones."""
        return (
            {name: z.detach() for name, z in embeddings.items() if name not in self.transient},
            {name: z for name, z in targets.items() if name not in self.transient},
        )

    def frozen(self, progress: Progress) -> Sequence[str]:
        """Return name prefixes of the parameters that do not change in this step."""
        return ()

    def monitored(self, embeddings: Embeddings, targets: Embeddings) -> Monitored:
        """Return the tensors that the collapse metrics watch, from the arguments of `after_step`.

        By default these are the pair `z_a` and `z_b`, or else the method's first embeddings.
        """
        if "z_a" not in embeddings:
            return Monitored(next(iter(embeddings.values())))
        return Monitored(embeddings["z_a"], (embeddings["z_a"], embeddings["z_b"]))

    def if_step_taken(self, new: Tensor, old: Tensor) -> Tensor:
        """Return `new` if the step was taken, else `old`, without synchronizing with the device."""
        return torch.where(torch.as_tensor(self.step_taken, device=new.device) > 0, new, old)

    def two_views(self, batch: Batch, *, local_views: bool = False) -> tuple[Tensor, Tensor]:
        """Return both global views of a batch.

        Args:
            batch: This rank's images.
            local_views: True if the batch may have any number of local views as well.

        Raises:
            ValueError: If the number or the sizes of the views do not suit the method.
        """
        views = batch.views
        has_right_count = len(views) >= 2 if local_views else len(views) == 2
        if not has_right_count or views[0].shape != views[1].shape:
            sizes = ", ".join(describe(simplify(view.shape[-2:])) for view in views)
            requirement = (
                "2 global views and any number of local ones"
                if local_views
                else "2 views of one size"
            )
            raise ValueError(
                f"{self.config.name}: takes {requirement}, "
                f"got {len(views)} ({sizes} pixels); set views.crops.*.count"
            )
        return views[0], views[1]

    def single_view(self, batch: Batch) -> Tensor:
        """Return the only view of a batch.

        Raises:
            ValueError: If there are several views.
        """
        if len(batch.views) != 1:
            raise ValueError(
                f"{self.config.name}: takes 1 view, got {len(batch.views)}; "
                "set views.crops to one crop with count 1"
            )
        return batch.views[0]

    def text(self, batch: Batch) -> TextSet:
        """Return the only text of each item.

        Raises:
            ValueError: If there is another number of texts.
        """
        if len(batch.texts) != 1:
            raise ValueError(
                f"{self.config.name}: takes 1 text per item, got {len(batch.texts)}; give data "
                "with one caption per image"
            )
        return batch.texts[0]

    def masks(self, batch: Batch, name: str) -> list[MaskSet]:
        """Return the masks that the method needs, one set per view that has them.

        Args:
            batch: This rank's images.
            name: "visible", "masked", "context" or "targets".

        Raises:
            ValueError: If no view has such masks.
        """
        if not (masks := batch.masks_named(name)):
            kinds = " or ".join(mask_recipe.KINDS_BY_SET[name])
            raise ValueError(
                f"{self.config.name}: needs the masks {name!r}, which no view has; "
                f"set views.crops.*.mask.kind to {kinds}"
            )
        return masks


@dataclass
class MethodConfig:
    """Fields that the configurations of all methods share."""

    name: str = setting("???", "Name of the method and of its file in methods/.")

    def check(self, run: Any, world_size: int) -> None:
        """Raise ValueError, naming key and remedy, if the `RunConfig` does not suit the method."""

    def build(self, backbone: Backbone) -> Method:
        """Build the method on top of a backbone. The `Config` of a method without texts does so."""
        raise NotImplementedError(f"{type(self).__module__}: Config must override `build`")


@dataclass
class TextMethodConfig(MethodConfig):
    """Fields that the configurations of all methods of images with texts share."""

    @property
    def num_texts(self) -> int:
        """Number of texts per image that the method takes."""
        return 1

    def build_with_texts(self, backbone: Backbone, text_encoder: TextEncoder) -> Method:
        """Build the method on top of a backbone and a text encoder. Every `Config` overrides it."""
        raise NotImplementedError(
            f"{type(self).__module__}: Config must override `build_with_texts`"
        )


@dataclass
class SentenceMethodConfig(MethodConfig):
    """Fields that the configurations of all methods of sentences without images share."""

    @property
    def num_texts(self) -> int:
        """Number of texts per item that the method takes: 1, or 2 for pairs, or 3 for triplets."""
        return 1

    def build_for_sentences(self, text_encoder: TextEncoder) -> Method:
        """Build the method on top of a text encoder. Every `Config` overrides it."""
        raise NotImplementedError(
            f"{type(self).__module__}: Config must override `build_for_sentences`"
        )


class SeparatePairs(Method):
    """A method that compares the embeddings of two views, each from a forward pass of its own.

    Batch norm sees one view at a time. Subclasses set the projector.
    """

    couples = "embeddings"
    projector: nn.Module

    def forward(self, batch: Batch) -> Embeddings:
        """Return the projector's embeddings of both views, each (local_batch, dim)."""
        z_a, z_b = (self.projector(self.backbone(view)) for view in self.two_views(batch))
        return {"z_a": z_a, "z_b": z_b}


class JointPairs(Method):
    """A method that compares the embeddings of two views, both from the same forward pass.

    Batch norm sees both views. Subclasses set the projector.
    """

    couples = "embeddings"
    projector: nn.Module

    def forward(self, batch: Batch) -> Embeddings:
        """Return the embeddings of both views from one forward pass, each (local_batch, dim)."""
        z_a, z_b = self.projector(self.backbone(torch.cat(self.two_views(batch)))).chunk(2)
        return {"z_a": z_a, "z_b": z_b}


class GroupedPairs(SeparatePairs):
    """A method whose loss compares all embeddings of two views and pulls groups of images together.

    A group is one image, or with `pairs: labels` all images of one label.
    """

    def __init__(self, config: Any, backbone: Backbone):
        super().__init__(config, backbone)
        self.needs_labels = config.pairs == "labels"
        self.projector = mlp(backbone.feature_dim, *config.projector_dims)

    @torch.no_grad()
    def targets(self, batch: Batch) -> Embeddings:
        """Return the label or the number of each image as its group, shape (local_batch,)."""
        return {"groups": batch.labels if self.needs_labels else batch.indices}


def forward_by_size(network: Callable[[Tensor], Tensor], views: Sequence[Tensor]) -> list[Tensor]:
    """Return `network(view)` for each view. Consecutive views of equal size share one call.

    Batch norm then normalizes over all of them together, as in SwAV and DINO.
    """
    outputs: list[Tensor] = []
    for _, same_size in groupby(views, key=lambda view: view.shape[-2:]):
        group = list(same_size)
        outputs += network(torch.cat(group)).chunk(len(group))
    return outputs


@dataclass
class FixedPositionsConfig(MethodConfig):
    """Fields of methods whose authors train ViTs with fixed positional embeddings."""

    vit_starts: Literal["as_built", "authors"] = setting(
        "as_built",
        "Initial weights of a ViT. as_built: those of the backbone. authors: the authors' "
        "initialization with fixed positional embeddings, which requires backbone.init=random.",
    )

    def check(self, run: Any, world_size: int) -> None:
        """Raise ValueError if the authors' initialization would replace loaded weights."""
        check_vit_starts(self.vit_starts, run)


def check_vit_starts(vit_starts: str, run: Any) -> None:
    """Raise ValueError if the authors' initialization would replace loaded weights."""
    if vit_starts == "authors" and run.backbone.init != "random":
        raise ValueError(
            f"method.vit_starts: authors would replace weights that "
            f"backbone.init={run.backbone.init} loads; set method.vit_starts=as_built"
        )
