"""Frozen features, one row of a table each: raw pixels, the random backbone, the pretrained one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_pretrain import rng
from ssl_pretrain.eval import runs
from ssl_pretrain.eval.frozen.evaluation_split import Part, shift
from ssl_pretrain.eval.runs import Run
from ssl_pretrain.models import backbones
from ssl_pretrain.views import color

RECALIBRATION = 10000
RAW_SIZE = 32  # raw pixels of larger views are averaged down to this: 3,072 numbers
ROWS = ("raw", "random", "pretrained")
SMALL_VIT = 384  # numbers of a ViT-S's token


@dataclass
class Judged:
    """Features that a table compares with others."""

    name: str
    embed: Callable[
        ..., tuple[Tensor, Tensor]
    ]  # (part, (dx, dy) = (0, 0)) -> features float32 (n, dim), labels int64 (n,)
    centred: bool = False  # k-NN subtracts the training mean: true of raw pixels


def judged(run: Run, train: Part, rows: Sequence[str] = ROWS) -> Iterator[Judged]:
    """What every table compares, in this order: raw pixels, the random backbone as built and recalibrated, the pretrained one."""
    if "raw" in rows:
        yield Judged(
            "raw pixels", lambda part, offset=(0, 0): raw_pixels(part, offset), centred=True
        )
    for name, backbone in networks(run, train, rows):
        yield Judged(
            name, lambda part, offset=(0, 0), backbone=backbone: extract(backbone, part, offset)
        )


def networks(run: Run, train: Part, rows: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    """The backbones of a table's rows, each when its turn comes: (name, in evaluation mode on the run's device)."""
    if "random" in rows:
        yield "random, as built", random_backbone(run)
        if _batch_norms(run.backbone):
            yield "random, recalibrated", random_backbone(run, train)
    if "pretrained" in rows:
        yield "pretrained", run.backbone


class Feature(nn.Module):
    """What a linear protocol reads from a backbone: `pooled`, its own output, or of a ViT's tokens

    last4: the CLS tokens of the last four blocks, each through the last norm, side by side (DINO's choice for ViT-S);
    cls_mean: the last block's CLS token and the mean of its patch tokens (DINO's for ViT-B).

    Raises:
        ValueError: the backbone has no such tokens.
    """

    def __init__(self, backbone: nn.Module, name: str):
        super().__init__()
        self.backbone, self.name = backbone, name
        model: Any = backbone.model
        if name != "pooled" and not getattr(model, "num_prefix_tokens", None):
            raise ValueError(
                f"--feature {name}: {type(model).__name__} has no class token; give pooled"
            )
        self.num_blocks = min(4, len(model.blocks)) if name == "last4" else 1
        copies = {"pooled": 1, "last4": self.num_blocks, "cls_mean": 2}[name]
        self.feature_dim: int = copies * backbone.feature_dim  # type: ignore[assignment, operator]

    def forward(self, images: Tensor) -> Tensor:
        if self.name == "pooled":
            return self.backbone(images)
        model: Any = self.backbone.model
        blocks = model.get_intermediate_layers(
            images, self.num_blocks, return_prefix_tokens=True, norm=True
        )
        tokens = [prefix[:, 0] for _, prefix in blocks]
        return torch.cat(
            [*tokens, blocks[-1][0].mean(dim=1)] if self.name == "cls_mean" else tokens, dim=1
        )

    def __str__(self) -> str:
        return {
            "pooled": "pooled output of the backbone",
            "last4": f"class tokens of the last {self.num_blocks} blocks",
            "cls_mean": "class token and mean patch token of the last block",
        }[self.name] + f", {self.feature_dim} numbers"


def dinos_choice(backbone: nn.Module) -> str:
    """The feature that DINO's README takes for such a backbone: by the width of its tokens, pooled for a ResNet."""
    model: Any = backbone.model
    if not getattr(model, "num_prefix_tokens", None):
        return "pooled"
    return "last4" if model.embed_dim <= SMALL_VIT else "cls_mean"


def random_backbone(run: Run, train: Part | None = None) -> nn.Module:
    """The run's backbone before its first step: the same seed. With `train`, its batch norm knows these images.

    Recalibrated: the running statistics are the mean over mixed batches of at most RECALIBRATION training images, in
    their evaluation views.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.seed_of(run.config.seed, 0, 0))  # as the trainer does
        backbone = runs.place(
            backbones.build(replace(run.config.backbone, init="random"), run.view_size), run.device
        )
    if train is None:
        return backbone
    for norm in _batch_norms(backbone):
        norm.reset_running_stats()
        norm.momentum = None  # cumulative: every batch counts alike
        norm.train()
    with torch.no_grad():
        for images, _ in recalibration(train).batches():
            backbone(normalize(run, images))
    return backbone.eval()


def recalibration(train: Part) -> Part:
    """The training images that batch norm is recalibrated on, mixed: a folder's order is by class, and so would its batches be."""
    mixed = rng.permutation(0, 0, len(train), rng.Purpose.SUBSET)[:RECALIBRATION]
    return Part(train.run, train.source, train.numbers[mixed])


def _batch_norms(backbone: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    return [
        module
        for module in backbone.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]


def normalize(run: Run, images: Tensor) -> Tensor:
    """Evaluation views as the network takes them: float32, on its device."""
    normalized = color.normalize(images.to(run.device), run.config.views.mean, run.config.views.std)
    return normalized.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def extract(
    backbone: nn.Module, part: Part, offset: tuple[int, int] = (0, 0)
) -> tuple[Tensor, Tensor]:
    """Features float32 (n, feature_dim) on the run's device, and labels (n,), of the part's images moved by `offset`."""
    found = [
        (backbone(normalize(part.run, shift(images, *offset))).float(), labels)
        for images, labels in part.batches()
    ]
    return _joined(found, part.run)


def raw_pixels(part: Part, offset: tuple[int, int] = (0, 0)) -> tuple[Tensor, Tensor]:
    """The views themselves as features in [0, 1]: (n, 3 size^2); views over 32 pixels averaged down to 32."""
    return _joined(
        [(flat(part.run, shift(images, *offset)), labels) for images, labels in part.batches()],
        part.run,
    )


def flat(run: Run, images: Tensor) -> Tensor:
    """Views, uint8 (n, 3, size, size), as raw pixels, float32 (n, 3 size^2)."""
    values = images.to(run.device, torch.float32).div_(255)
    return (
        F.adaptive_avg_pool2d(values, RAW_SIZE) if run.image_size > RAW_SIZE else values
    ).flatten(1)


def _joined(found: list[tuple[Tensor, Tensor]], run: Run) -> tuple[Tensor, Tensor]:
    if not found:  # a rank that has no image
        return torch.empty(0, 0, device=run.device), torch.empty(
            0, dtype=torch.int64, device=run.device
        )
    return torch.cat([features for features, _ in found]), torch.cat(
        [labels for _, labels in found]
    ).to(run.device)
