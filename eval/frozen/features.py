"""Compute the frozen features to compare: raw pixels, random backbone and pretrained backbone.

The images may be shifted by a few pixels to test invariance to translation. Each rank embeds whole
batches of a split, so the batches are the same for any number of ranks.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ssl_pretrain import rng
from ssl_pretrain.data.images import UnreadableImage
from ssl_pretrain.eval.frozen.evaluation_split import BATCH_SIZE, EvaluationSplit
from ssl_pretrain.eval.frozen.named_features import POOLED, network_of_feature
from ssl_pretrain.eval.frozen.rank_batches import gather_in_order
from ssl_pretrain.eval.runs import Run, prepare_for_evaluation
from ssl_pretrain.models import backbones
from ssl_pretrain.schema.image_sizes import ImageSize, height_and_width
from ssl_pretrain.views import color
from ssl_pretrain.views.batch import upload

MAX_RECALIBRATION_IMAGES = 10000
RAW_SIZE = 32  # pixels; larger views are averaged down to this height and width
MIN_UNSHIFTED_SIDE = 32  # pixels; images with a smaller shorter side are shifted by default
ROWS: tuple[str, ...] = ("raw", "random", "pretrained")
ROWS_OPTION: dict[str, dict[str, Any]] = {
    "--rows": {
        "nargs": "+",
        "choices": ROWS,
        "default": ROWS,
        "help": "features to evaluate (default: all three)",
    },
}

Offset = tuple[int, int]  # pixels to the right and down
# (split, offset) -> features (n, dim), labels (n,)
SplitEmbedder = Callable[..., tuple[Tensor, Tensor]]


@dataclass
class Representation:
    """The kind of features that one row of a result table evaluates."""

    name: str
    embed: SplitEmbedder
    needs_centering: bool = False  # k-NN must subtract the training mean


def representations(
    run: Run, train: EvaluationSplit, rows: Sequence[str] = ROWS, feature: str = POOLED
) -> Iterator[Representation]:
    """Yield the representation of each row, raw pixels first.

    Args:
        run: Run to evaluate.
        train: Training images.
        rows: Names of the rows, from `ROWS`.
        feature: Name of the networks' feature, see `named_features`.

    Raises:
        ValueError: If the backbone does not have the feature.
    """
    network_of_feature(run.backbone, feature)  # refuses before anything is computed
    if "raw" in rows:
        yield Representation("raw pixels", raw_pixels, needs_centering=True)
    for name, backbone in networks(run, train, rows):
        yield Representation(name, partial(extract, network_of_feature(backbone, feature)))


def networks(
    run: Run, train: EvaluationSplit, rows: Sequence[str]
) -> Iterator[tuple[str, nn.Module]]:
    """Yield the name and the backbone, in evaluation mode, of each row that has a network.

    A random backbone with batch norm has two rows, one as built and one recalibrated.
    """
    if "random" in rows:
        yield "random, as built", random_backbone(run)
        if batch_norms(run.backbone):
            yield "random, recalibrated", random_backbone(run, train)
    if "pretrained" in rows:
        yield "pretrained", run.backbone


def random_backbone(
    run: Run, train: EvaluationSplit | None = None, seed: int | None = None
) -> nn.Module:
    """Build the run's backbone as it was before the first step.

    Args:
        run: Run to evaluate.
        train: Training images to recalibrate batch norm on, or None to keep the initial statistics.
            The running statistics become the mean over shuffled batches of at most
            MAX_RECALIBRATION_IMAGES images.
        seed: Seed of the weights. Default: the run's.
    """
    with torch.random.fork_rng(devices=[]):
        # The trainer derives its seed in the same way.
        torch.manual_seed(rng.derive_seed(run.config.seed if seed is None else seed, 0, 0))
        architecture = replace(run.config.backbone, init="random")
        backbone = prepare_for_evaluation(backbones.build(architecture, run.view_size), run.device)
    if train is None:
        return backbone
    batches = recalibration_split(train).batches()
    return recalibrate(run, backbone, (images for images, _ in batches))


def recalibrate(run: Run, backbone: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """Set the batch-norm statistics to their mean over batches of uint8 images, in place."""
    for norm in batch_norms(backbone):
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average, in which every batch has the same weight
        norm.train()
    for images in batches:
        compute(run, backbone, normalize(run, images))
    return backbone.eval()


def recalibration_split(train: EvaluationSplit) -> EvaluationSplit:
    """Return shuffled training images. In folder order, a batch would contain a single class."""
    return train.random_subset(MAX_RECALIBRATION_IMAGES)


def batch_norms(backbone: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Return the batch norms of a network."""
    return [
        module
        for module in backbone.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]


def normalize(run: Run, images: Tensor) -> Tensor:
    """Convert uint8 views to the network's input: float32, normalized, on the run's device."""
    pixels = upload(images, run.device)
    normalized = color.normalize(pixels, run.config.views.mean, run.config.views.std)
    return normalized.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def compute(run: Run, network: Callable[[Tensor], Tensor], views: Tensor) -> Tensor:
    """Return the features, float32 (n, feature_dim), of normalized views.

    Every evaluation of frozen features computes them here, in the precision of the run.
    """
    with run.execution.forward_context():
        return network(views).float()


def extract(
    backbone: Callable[[Tensor], Tensor], split: EvaluationSplit, offset: Offset = (0, 0)
) -> tuple[Tensor, Tensor]:
    """Return the features, float32 (n, feature_dim), and labels (n,) of the shifted images."""
    run = split.run
    batches = [
        (compute(run, backbone, normalize(run, shift(images, *offset))), labels)
        for images, labels in split.batches()
    ]
    return concatenate(batches, split.run.device)


def raw_pixels(split: EvaluationSplit, offset: Offset = (0, 0)) -> tuple[Tensor, Tensor]:
    """Return the pixels of the shifted views as features in [0, 1], and the labels."""
    batches = [
        (flatten_views(split.run, shift(images, *offset)), labels)
        for images, labels in split.batches()
    ]
    return concatenate(batches, split.run.device)


def flatten_views(run: Run, images: Tensor) -> Tensor:
    """Convert uint8 views (n, C, height, width) to raw pixels, float32 (n, C * rows * columns).

    Rows and columns are those of `raw_shape`.
    """
    values = upload(images, run.device).to(torch.float32).div_(255)
    shape = raw_shape(run.image_size)
    if shape != tuple(values.shape[-2:]):
        values = nn.functional.adaptive_avg_pool2d(values, shape)
    return values.flatten(1)


def raw_shape(size: ImageSize) -> tuple[int, int]:
    """Return the height and width of views whose pixels are features, at most RAW_SIZE each."""
    height, width = height_and_width(size)
    return min(height, RAW_SIZE), min(width, RAW_SIZE)


def concatenate(
    batches: list[tuple[Tensor, Tensor]], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Concatenate batches of features and labels. The list is empty on a rank without images."""
    empty = torch.empty(0, 0, device=device), torch.empty(0, dtype=torch.int64)
    features, labels = zip(*(batches or [empty]))
    return torch.cat(features), torch.cat(labels).to(device)


def embed_split(
    embed: SplitEmbedder, split: EvaluationSplit, offset: Offset = (0, 0)
) -> tuple[Tensor, Tensor]:
    """Return the features and labels of the shifted images in order, the same on every rank."""
    features, labels = embed(split.rank_subset, offset)
    return (
        gather_in_order(features, len(split), BATCH_SIZE),
        gather_in_order(labels, len(split), BATCH_SIZE),
    )


def shift(images: Tensor, dx: int, dy: int) -> Tensor:
    """Shift images (n, channels, height, width) by dx pixels right and dy down, and pad with 0."""
    if not dx and not dy:
        return images
    height, width = images.shape[-2:]
    padded_images = nn.functional.pad(images, (max(dx, 0), max(-dx, 0), max(dy, 0), max(-dy, 0)))
    return padded_images[..., max(-dy, 0) :, max(-dx, 0) :][..., :height, :width]


def shift_offsets(split: EvaluationSplit, distance: int) -> list[Offset]:
    """Return the offsets for shifts to the right, to the left, down and up.

    Args:
        split: Images to shift.
        distance: Distance in pixels of the original images. The returned offsets are in pixels of
            the evaluation view, for which images are resized to cover image_size / crop_ratio.
    """
    run = split.run
    scale = max(
        side / run.config.evaluation.crop_ratio / length
        for side, length in zip(height_and_width(run.image_size), _image_shape(split))
    )
    view_pixels = round(distance * scale)
    return [(view_pixels, 0), (-view_pixels, 0), (0, view_pixels), (0, -view_pixels)]


def default_shift_distances(split: EvaluationSplit) -> list[int]:
    """Return the default shift distances in original pixels. Only small images are shifted."""
    return [1, 2] if min(_image_shape(split)) < MIN_UNSHIFTED_SIDE else []


def _image_shape(split: EvaluationSplit) -> tuple[int, int]:
    """Return the height and width, in pixels, of the first readable image."""
    for index in split.indices.tolist():
        try:
            height, width = split.source.read(index).shape[:2]
            return height, width
        except UnreadableImage:
            split.source.check_present()
    raise ValueError(
        f"data.root: none of the {len(split):,} images of {split.source.full_path} can be read; "
        "check the files"
    )
