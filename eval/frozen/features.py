"""Frozen features to compare: raw pixels, the random backbone, the pretrained one.

The images may be shifted by a few pixels, to test invariance to translation. Each rank embeds its
share of a split. A share consists of whole batches, so any number of ranks embeds the same batches.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from ssl_pretrain import rng
from ssl_pretrain.data.images import UnreadableImage
from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.eval.frozen.evaluation_split import EvaluationSplit, rows_of
from ssl_pretrain.eval.runs import Run, to_device
from ssl_pretrain.models import backbones
from ssl_pretrain.views import color

MAX_RECALIBRATION_IMAGES = 10000
RAW_SIZE = 32  # pixels; larger views are averaged down to this, which gives 3,072 numbers
MIN_UNSHIFTED_SIDE = 32  # pixels; images with a shorter side are shifted by default
ROWS = ("raw", "random", "pretrained")

Offset = tuple[int, int]  # pixels to the right and down
Embed = Callable[..., tuple[Tensor, Tensor]]  # (split, offset) -> features (n, dim), labels (n,)


@dataclass
class Representation:
    """Features in one row of a result table."""

    name: str
    embed: Embed
    centered: bool = False  # k-NN subtracts the training mean, as raw pixels need


def representations(
    run: Run, train: EvaluationSplit, rows: Sequence[str] = ROWS
) -> Iterator[Representation]:
    """Yield the features of each row in order, raw pixels first."""
    if "raw" in rows:
        yield Representation("raw pixels", raw_pixels, centered=True)
    for name, backbone in networks(run, train, rows):
        yield Representation(name, partial(extract, backbone))


def networks(
    run: Run, train: EvaluationSplit, rows: Sequence[str]
) -> Iterator[tuple[str, nn.Module]]:
    """Yield the name and the backbone, in evaluation mode, of each row that has a network.

    The random backbone has two rows, as built and with recalibrated batch norm.
    """
    if "random" in rows:
        yield "random, as built", random_backbone(run)
        if _batch_norms(run.backbone):
            yield "random, recalibrated", random_backbone(run, train)
    if "pretrained" in rows:
        yield "pretrained", run.backbone


def random_backbone(run: Run, train: EvaluationSplit | None = None) -> nn.Module:
    """Build the run's backbone as it was before the first step, from the same seed.

    Args:
        run: Run to evaluate.
        train: Training images to recalibrate batch norm on. The running statistics become the mean
            over shuffled batches of at most MAX_RECALIBRATION_IMAGES images.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.seed_of(run.config.seed, 0, 0))  # the trainer's seed
        architecture = replace(run.config.backbone, init="random")
        backbone = to_device(backbones.build(architecture, run.view_size), run.device)
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
    return train.random_subset(MAX_RECALIBRATION_IMAGES)


def _batch_norms(backbone: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    return [
        module
        for module in backbone.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]


def normalize(run: Run, images: Tensor) -> Tensor:
    """Return uint8 views as the network's input: float32, normalized, on the run's device."""
    normalized = color.normalize(images.to(run.device), run.config.views.mean, run.config.views.std)
    return normalized.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def extract(
    backbone: Callable[[Tensor], Tensor], split: EvaluationSplit, offset: Offset = (0, 0)
) -> tuple[Tensor, Tensor]:
    """Return features, float32 (n, feature_dim), and labels (n,) of the shifted images."""
    batches = [
        (backbone(normalize(split.run, shift(images, *offset))).float(), labels)
        for images, labels in split.batches()
    ]
    return concatenate(batches, split.run.device)


def raw_pixels(split: EvaluationSplit, offset: Offset = (0, 0)) -> tuple[Tensor, Tensor]:
    """Return the pixels of the shifted views, features in [0, 1], and the labels."""
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
        values = nn.functional.adaptive_avg_pool2d(values, RAW_SIZE)
    return values.flatten(1)


def concatenate(
    batches: list[tuple[Tensor, Tensor]], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Concatenate batches of features and labels. A rank without images has no batch."""
    empty = torch.empty(0, 0, device=device), torch.empty(0, dtype=torch.int64)
    features, labels = zip(*(batches or [empty]))
    return torch.cat(features), torch.cat(labels).to(device)


def embed_split(
    embed: Embed, split: EvaluationSplit, offset: Offset = (0, 0)
) -> tuple[Tensor, Tensor]:
    """Return the features and labels of the shifted images in order, the same on every rank."""
    features, labels = embed(split.rank_share, offset)
    world_size = process_group.world_size()
    if world_size == 1:
        return features, labels
    gathered_rows = np.concatenate([rows_of(rank, len(split)) for rank in range(world_size)])
    order = torch.from_numpy(np.argsort(gathered_rows)).to(features.device)
    return gather_rows(features)[order], gather_rows(labels)[order]


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenate the rows of all ranks. Ranks may have different numbers of rows."""
    if process_group.world_size() == 1:
        return rows
    shapes = collectives.gather_objects(tuple(rows.shape))
    longest = max(shape[0] for shape in shapes)
    inner = next(shape[1:] for shape in shapes if shape[0])
    padded = rows.new_zeros(longest, *inner)
    padded[: len(rows)] = rows.view(len(rows), *inner)
    gathered = collectives.gather(padded).split(longest)
    return torch.cat([rank_rows[: shape[0]] for rank_rows, shape in zip(gathered, shapes)])


def shift(images: Tensor, dx: int, dy: int) -> Tensor:
    """Shift images (n, channels, height, width) dx pixels right and dy down, filling with black."""
    if not dx and not dy:
        return images
    height, width = images.shape[-2:]
    padded = nn.functional.pad(images, (max(dx, 0), max(-dx, 0), max(dy, 0), max(-dy, 0)))
    return padded[..., max(-dy, 0) :, max(-dx, 0) :][..., :height, :width]


def shift_offsets(split: EvaluationSplit, distance: int) -> list[Offset]:
    """Return the shifts right, left, down and up by `distance` pixels of the original image.

    The offsets are in pixels of the evaluation view, whose crop scales the shorter side of the
    original to image_size / crop_ratio.
    """
    run = split.run
    scale = run.image_size / run.config.evaluation.crop_ratio / _shorter_side(split)
    pixels = round(distance * scale)
    return [(pixels, 0), (-pixels, 0), (0, pixels), (0, -pixels)]


def default_shift_distances(split: EvaluationSplit) -> list[int]:
    """Return the distances, in original pixels, that small images are shifted by."""
    return [1, 2] if _shorter_side(split) < MIN_UNSHIFTED_SIDE else []


def _shorter_side(split: EvaluationSplit) -> int:
    """Return the shorter side, in pixels, of the first readable image."""
    for index in split.indices.tolist():
        try:
            return min(split.source.read(index).shape[:2])
        except UnreadableImage:
            split.source.check_present()
    raise ValueError(
        f"data.root: none of the {len(split):,} images of {split.source.where} can be read"
    )
