"""Frozen features, one row of a table each: raw pixels, the random backbone, the pretrained one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eval import runs
from eval.parts import Part, shift
from eval.runs import Run
from ssl_pretrain import backbones, draws
from ssl_pretrain.views import colour

RECALIBRATION = 10000
RAW_SIZE = 32  # raw pixels of larger views are averaged down to this: 3,072 numbers


@dataclass
class Judged:
    """Features that a table compares with others."""

    name: str
    embed: Callable[..., tuple[Tensor, Tensor]]  # (part, (dx, dy) = (0, 0)) -> features float32 (n, dim), labels int64 (n,)
    centred: bool = False  # k-NN subtracts the training mean: true of raw pixels


def judged(run: Run, train: Part) -> Iterator[Judged]:
    """What every table compares, in this order: raw pixels, the random backbone as built and recalibrated, the pretrained one."""
    yield Judged("raw pixels", lambda part, offset=(0, 0): raw_pixels(part, offset), centred=True)
    yield _of("random, as built", random_backbone(run))
    if _batch_norms(run.backbone):
        yield _of("random, recalibrated", random_backbone(run, train))
    yield _of("pretrained", run.backbone)


def _of(name: str, backbone: nn.Module) -> Judged:
    return Judged(name, lambda part, offset=(0, 0): extract(backbone, part, offset))


def random_backbone(run: Run, train: Part | None = None) -> nn.Module:
    """The run's backbone before its first step: the same seed. With `train`, its batch norm knows these images.

    Recalibrated: the running statistics are the mean over mixed batches of at most RECALIBRATION training images, in
    their evaluation views.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draws.seed_of(run.config.seed, 0, 0))  # as the trainer does
        backbone = runs.place(backbones.build(replace(run.config.backbone, init="random"), run.view_size), run.device)
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
    mixed = draws.permutation(0, 0, len(train), draws.Purpose.SUBSET)[:RECALIBRATION]
    return Part(train.run, train.source, train.numbers[mixed])


def _batch_norms(backbone: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    return [module for module in backbone.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def normalize(run: Run, images: Tensor) -> Tensor:
    """Evaluation views as the network takes them: float32, on its device."""
    normalized = colour.normalize(images.to(run.device), run.config.views.mean, run.config.views.std)
    return normalized.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def extract(backbone: nn.Module, part: Part, offset: tuple[int, int] = (0, 0)) -> tuple[Tensor, Tensor]:
    """Features float32 (n, feature_dim) on the run's device, and labels (n,), of the part's images moved by `offset`."""
    found = [(backbone(normalize(part.run, shift(images, *offset))).float(), labels) for images, labels in part.batches()]
    return _joined(found, part.run)


def raw_pixels(part: Part, offset: tuple[int, int] = (0, 0)) -> tuple[Tensor, Tensor]:
    """The views themselves as features in [0, 1]: (n, 3 size^2); views over 32 pixels averaged down to 32."""
    return _joined([(flat(part.run, shift(images, *offset)), labels) for images, labels in part.batches()], part.run)


def flat(run: Run, images: Tensor) -> Tensor:
    """Views, uint8 (n, 3, size, size), as raw pixels, float32 (n, 3 size^2)."""
    values = images.to(run.device, torch.float32).div_(255)
    return (F.adaptive_avg_pool2d(values, RAW_SIZE) if run.image_size > RAW_SIZE else values).flatten(1)


def _joined(found: list[tuple[Tensor, Tensor]], run: Run) -> tuple[Tensor, Tensor]:
    return torch.cat([features for features, _ in found]), torch.cat([labels for _, labels in found]).to(run.device)
