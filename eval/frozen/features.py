"""Frozen features to compare: raw pixels, the random backbone, the pretrained one."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_pretrain import rng
from ssl_pretrain.eval import runs
from ssl_pretrain.eval.frozen.evaluation_split import EvaluationSplit
from ssl_pretrain.eval.frozen.shards import Embed
from ssl_pretrain.eval.frozen.shifts import Offset, shift
from ssl_pretrain.eval.runs import Run
from ssl_pretrain.models import backbones
from ssl_pretrain.views import color

RECALIBRATION_IMAGES = 10000
RAW_SIZE = 32  # larger views are averaged down to this, which gives 3,072 numbers
ROWS = ("raw", "random", "pretrained")
VIT_SMALL_DIM = 384  # width of a ViT-S's tokens


@dataclass
class Representation:
    """Features in one row of a result table."""

    name: str
    embed: Embed
    centered: bool = False  # k-NN subtracts the training mean, as raw pixels need


def representations(
    run: Run, train: EvaluationSplit, rows: Sequence[str] = ROWS
) -> Iterator[Representation]:
    """Yield the features that tables compare, in order.

    They are raw pixels, the random backbone as built, the same with recalibrated batch norm, and
    the pretrained backbone.
    """
    if "raw" in rows:
        yield Representation("raw pixels", raw_pixels, centered=True)
    for name, backbone in networks(run, train, rows):
        yield Representation(name, partial(extract, backbone))


def networks(
    run: Run, train: EvaluationSplit, rows: Sequence[str]
) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and backbone of each row, built when it is needed and in evaluation mode."""
    if "random" in rows:
        yield "random, as built", random_backbone(run)
        if _batch_norms(run.backbone):
            yield "random, recalibrated", random_backbone(run, train)
    if "pretrained" in rows:
        yield "pretrained", run.backbone


class Feature(nn.Module):
    """The feature of a backbone that a linear protocol reads.

    Args:
        backbone: Network to read.
        name: "pooled", the backbone's own output. "last4", the class tokens of the last four blocks
            after the final norm, which DINO takes for ViT-S. "cls_mean", the last block's class
            token and the mean of its patch tokens, which DINO takes for ViT-B.

    Raises:
        ValueError: If the backbone has no such tokens.
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
        """Return features (batch, feature_dim) of images (batch, channels, height, width)."""
        if self.name == "pooled":
            return self.backbone(images)
        model: Any = self.backbone.model
        blocks = model.get_intermediate_layers(
            images, self.num_blocks, return_prefix_tokens=True, norm=True
        )
        tokens = [prefix[:, 0] for _, prefix in blocks]
        if self.name == "cls_mean":
            tokens.append(blocks[-1][0].mean(dim=1))
        return torch.cat(tokens, dim=1)

    def __str__(self) -> str:
        kind = {
            "pooled": "pooled output of the backbone",
            "last4": f"class tokens of the last {self.num_blocks} blocks",
            "cls_mean": "class token and mean patch token of the last block",
        }[self.name]
        return f"{kind}, {self.feature_dim} numbers"


def dino_feature(backbone: nn.Module) -> str:
    """Return the feature that DINO's README takes for a backbone like this."""
    model: Any = backbone.model
    if not getattr(model, "num_prefix_tokens", None):
        return "pooled"
    return "last4" if model.embed_dim <= VIT_SMALL_DIM else "cls_mean"


def random_backbone(run: Run, train: EvaluationSplit | None = None) -> nn.Module:
    """Build the run's backbone as it was before the first step, from the same seed.

    Args:
        run: Run whose backbone is built.
        train: Training images to recalibrate batch norm on. The running statistics become the mean
            over shuffled batches of at most RECALIBRATION_IMAGES images.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.seed_of(run.config.seed, 0, 0))  # the trainer's seed
        architecture = replace(run.config.backbone, init="random")
        backbone = runs.to_device(backbones.build(architecture, run.view_size), run.device)
    if train is None:
        return backbone
    for norm in _batch_norms(backbone):
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average, in which every batch has the same weight
        norm.train()
    with torch.no_grad():
        for images, _ in recalibration_split(train).batches():
            backbone(normalize(run, images))
    return backbone.eval()


def recalibration_split(train: EvaluationSplit) -> EvaluationSplit:
    """Return shuffled training images. In a folder's order, a batch would be of one class."""
    return train.random_subset(RECALIBRATION_IMAGES)


def _batch_norms(backbone: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    kind = nn.modules.batchnorm._BatchNorm
    return [module for module in backbone.modules() if isinstance(module, kind)]


def normalize(run: Run, images: Tensor) -> Tensor:
    """Return uint8 views as the network's input: float32, normalized, on the run's device."""
    normalized = color.normalize(images.to(run.device), run.config.views.mean, run.config.views.std)
    return normalized.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def extract(
    backbone: nn.Module, split: EvaluationSplit, offset: Offset = (0, 0)
) -> tuple[Tensor, Tensor]:
    """Return features, float32 (n, feature_dim), and labels (n,) of the shifted images."""
    batches = [
        (backbone(normalize(split.run, shift(images, *offset))).float(), labels)
        for images, labels in split.batches()
    ]
    return concatenate(batches, split.run.device)


def raw_pixels(split: EvaluationSplit, offset: Offset = (0, 0)) -> tuple[Tensor, Tensor]:
    """Return the shifted views themselves as features in [0, 1], and labels."""
    batches = [
        (flatten_views(split.run, shift(images, *offset)), labels)
        for images, labels in split.batches()
    ]
    return concatenate(batches, split.run.device)


def flatten_views(run: Run, images: Tensor) -> Tensor:
    """Return uint8 views (n, 3, size, size) as raw pixels, float32 (n, 3 * side * side).

    The side is at most RAW_SIZE.
    """
    values = images.to(run.device, torch.float32).div_(255)
    if run.image_size > RAW_SIZE:
        values = F.adaptive_avg_pool2d(values, RAW_SIZE)
    return values.flatten(1)


def concatenate(
    batches: list[tuple[Tensor, Tensor]], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Concatenate batches of features and labels. A rank without images has no batch."""
    if not batches:
        empty = torch.empty(0, 0, device=device)
        return empty, torch.empty(0, dtype=torch.int64, device=device)
    features, labels = zip(*batches)
    return torch.cat(features), torch.cat(labels).to(device)
