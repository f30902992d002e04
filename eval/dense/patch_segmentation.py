"""Segment images by a classifier of their frozen patch tokens, which are computed once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from ssl_pretrain import rng
from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.eval.dense.confusion import Confusion, Scores
from ssl_pretrain.eval.dense.masked_images import VOID, MaskedImages
from ssl_pretrain.eval.dense.patch_classifiers import (
    LogisticRegression,
    NearestNeighbors,
    PatchClassifier,
    labeled_rows,
    patch_labels,
)
from ssl_pretrain.eval.dense.segmentation_protocols import PatchProtocol
from ssl_pretrain.eval.frozen import features
from ssl_pretrain.eval.frozen.cached_linear import fit_standardization
from ssl_pretrain.eval.frozen.rank_batches import gather_in_order, rank_rows
from ssl_pretrain.eval.runs import Run

BATCH_SIZE = 32  # images per forward pass; each rank takes whole batches


@dataclass
class ImagePatches:
    """Tokens and labels of the patches of several images.

    Attributes:
        tokens: float32 (num_images, num_patches, dim).
        pixels: Labels of the patches' pixels, uint8 (num_images, num_patches, num_pixels).
    """

    tokens: Tensor
    pixels: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self, indices: np.ndarray) -> "ImagePatches":
        """Return the patches of some images."""
        index = torch.from_numpy(indices)
        return ImagePatches(self.tokens[index.to(self.tokens.device)], self.pixels[index])

    def flat(self) -> tuple[Tensor, Tensor]:
        """Return the tokens and the labels of all patches that have mostly a class."""
        tokens, pixels = self.tokens.flatten(0, 1), self.pixels.flatten(0, 1)
        is_labeled = labeled_rows(pixels)
        return tokens[is_labeled.to(tokens.device)], pixels[is_labeled].to(tokens.device)


class PatchGrid:
    """The square to which images are resized, and its patches.

    Args:
        run: Run to evaluate.
        resolution: Side of the square in pixels.

    Raises:
        ValueError: If the patches do not divide the square.
    """

    def __init__(self, run: Run, resolution: int):
        backbone: Any = run.backbone
        if resolution % backbone.patch_size:
            raise ValueError(
                f"--resolution {resolution}: its patches are not whole for "
                f"{run.config.backbone.name}; give a multiple of {backbone.patch_size}"
            )
        self.resolution = resolution
        self.rows, self.columns = backbone.grid(resolution)
        self.patch_height, self.patch_width = resolution // self.rows, resolution // self.columns

    @property
    def num_pixels(self) -> int:
        """Number of pixels of a patch."""
        return self.patch_height * self.patch_width

    def square(self, pixels: np.ndarray, labels: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return an image, uint8 (C, side, side), and its labels, uint8 (side, side)."""
        sides = [self.resolution] * 2
        image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)
        mask = torch.from_numpy(labels)[None]
        return (
            transforms.resize(image, sides, InterpolationMode.BICUBIC, antialias=True),
            transforms.resize(mask, sides, InterpolationMode.NEAREST)[0],
        )

    def split(self, labels: Tensor) -> Tensor:
        """Return the labels (n, side, side) by patch, (n, num_patches, num_pixels)."""
        tiles = labels.unflatten(1, (self.rows, self.patch_height))
        tiles = tiles.unflatten(3, (self.columns, self.patch_width))
        return tiles.transpose(2, 3).flatten(3).flatten(1, 2)

    def join(self, pixels: Tensor) -> Tensor:
        """Return labels by patch, (num_patches, num_pixels), as a map (side, side)."""
        tiles = pixels.reshape(self.rows, self.columns, self.patch_height, self.patch_width)
        return tiles.transpose(1, 2).reshape(self.resolution, self.resolution)


def embed(run: Run, backbone: nn.Module, images: MaskedImages, grid: PatchGrid) -> ImagePatches:
    """Return the patches of all images in order, the same on every rank."""
    network: Any = backbone
    own = rank_rows(len(images), BATCH_SIZE)
    tokens, pixels = list[Tensor](), list[Tensor]()
    for start in range(0, len(own), BATCH_SIZE):
        squares = [grid.square(*images.read(i)) for i in own[start : start + BATCH_SIZE].tolist()]
        views = features.normalize(run, torch.stack([image for image, _ in squares]))
        tokens.append(features.compute(run, lambda x: network.tokens(x).patches, views))
        pixels.append(grid.split(torch.stack([mask for _, mask in squares])))
    num_patches = grid.rows * grid.columns
    no_tokens = torch.empty(0, num_patches, network.token_dim, device=run.device)
    no_pixels = torch.empty(0, num_patches, grid.num_pixels, dtype=torch.uint8)
    all_tokens = gather_in_order(torch.cat(tokens or [no_tokens]), len(images), BATCH_SIZE)
    own_pixels = torch.cat(pixels or [no_pixels]).to(run.device)
    return ImagePatches(all_tokens, gather_in_order(own_pixels, len(images), BATCH_SIZE).cpu())


@dataclass(frozen=True)
class Setting:
    """A setting of a classifier: k and distance, or the inverse penalty."""

    name: str
    k: int = 0
    distance: str = ""
    inverse_penalty: float = 0.0


def settings(protocol: PatchProtocol) -> list[Setting]:
    """Return the settings that a protocol selects from."""
    if protocol.classifier == "knn":
        return [
            Setting(f"k {k}, {distance}", k, distance)
            for k in protocol.neighbors
            for distance in protocol.distances
        ]
    return [Setting(f"C {c:.3g}", inverse_penalty=c) for c in protocol.inverse_penalties]


def segment(
    patches: tuple[ImagePatches, ImagePatches],
    splits: tuple[MaskedImages, MaskedImages],
    protocol: PatchProtocol,
    grid: PatchGrid,
    seed: int,
) -> tuple[Scores, str]:
    """Return the scores on the test images and the selected setting.

    Args:
        patches: Patches of the training and the test images.
        splits: Training and test images.
        protocol: Protocol of the classifier.
        grid: Patches of the resized images.
        seed: Seed of the choice of the held-out images.

    Raises:
        ValueError: If there are too few training images or classes.
    """
    (train, test), (train_images, test_images) = patches, splits
    if len(train) < 2:
        raise ValueError(
            f"segmentation: {train_images.name} has {len(train)} training image, and one is held "
            "out to select the setting; give at least two"
        )
    order = rng.permutation(seed, 0, len(train), rng.Purpose.SPLIT)
    num_held_out = max(1, len(train) // 10)
    held_out, fitted = train.rows(order[:num_held_out]), train.rows(order[num_held_out:])
    if (held_out.pixels == VOID).all():
        raise ValueError(
            f"segmentation: the {num_held_out} held-out training images of seed {seed} have only "
            "void pixels; give another of --seeds, or more images"
        )
    standardize = fit_standardization(fitted.tokens.flatten(0, 1))
    held_out, fitted, test = (
        ImagePatches(standardize(images.tokens), images.pixels)
        for images in (held_out, fitted, test)
    )
    check_classes(fitted, protocol)
    choices = settings(protocol)
    build = partial(_fit, protocol, train_images.classes)
    scores_by_setting = _try_settings(build, choices, fitted, held_out, train_images.classes, grid)
    best = choices[int(np.argmax(scores_by_setting))]
    everything = ImagePatches(
        torch.cat([fitted.tokens, held_out.tokens]), torch.cat([fitted.pixels, held_out.pixels])
    )
    if protocol.classifier == "knn":  # nothing to fit, and a bank is too large to send
        classifier = build(best, everything)
    else:
        classifier = collectives.run_on_main(lambda: build(best, everything))
    confusion = Confusion(test_images.classes)
    for index in rank_rows(len(test), BATCH_SIZE).tolist():
        if protocol.scores_masks_as_stored:
            labels = torch.from_numpy(test_images.labels(index))
            prediction = predict_as_stored(classifier, test.tokens[index], labels.shape, grid)
        else:
            labels = grid.join(test.pixels[index])
            prediction = grid.join(classifier.predict(test.tokens[index], grid.num_pixels))
        confusion.update(prediction, labels)
    note = f"{best.name} ({max(scores_by_setting):.1f} % on held-out training images)"
    return confusion.scores(), note


def check_classes(patches: ImagePatches, protocol: PatchProtocol) -> None:
    """Raise ValueError unless the training patches have a class, or two for a regression."""
    present = patch_labels(patches.flat()[1]).unique().tolist()
    if len(present) < (1 if protocol.classifier == "knn" else 2):
        raise ValueError(
            f"segmentation: the training patches have mostly {len(present)} of the classes; give "
            "masks with larger objects, or a higher --resolution"
        )


def _try_settings(
    build: Callable[[Setting, ImagePatches], PatchClassifier],
    choices: Sequence[Setting],
    fitted: ImagePatches,
    held_out: ImagePatches,
    classes: Sequence[str],
    grid: PatchGrid,
) -> list[float]:
    """Return the mIoU of each setting on the held-out images. Each rank tries some of them."""
    own: dict[int, float] = {}
    for number in range(process_group.rank(), len(choices), process_group.world_size()):
        classifier = build(choices[number], fitted)
        confusion = Confusion(classes)
        for tokens, pixels in zip(held_out.tokens, held_out.pixels):
            confusion.update(classifier.predict(tokens, pixels.shape[1]), pixels)
        own[number] = confusion.rank_scores().miou
    results = {n: score for ranks in collectives.gather_objects(own) for n, score in ranks.items()}
    return [results[number] for number in range(len(choices))]


def _fit(
    protocol: PatchProtocol, classes: Sequence[str], setting: Setting, patches: ImagePatches
) -> PatchClassifier:
    tokens, pixels = patches.flat()
    if protocol.classifier == "knn":
        return NearestNeighbors(tokens, pixels, setting.k, setting.distance)
    return LogisticRegression(
        tokens,
        pixels,
        len(classes),
        setting.inverse_penalty,
        protocol.max_iterations,
        protocol.tolerance,
    )


def predict_as_stored(
    classifier: PatchClassifier, tokens: Tensor, shape: Sequence[int], grid: PatchGrid
) -> Tensor:
    """Return the labels of an image at the size of its mask, from the tokens of its patches.

    Logits are interpolated bilinearly. Votes of neighbors are resized to the nearest pixel.
    """
    logits = classifier.logits(tokens)
    if logits is None:
        labels = grid.join(classifier.predict(tokens, grid.num_pixels))[None]
        return transforms.resize(labels, list(shape), InterpolationMode.NEAREST)[0]
    maps = logits.T.reshape(1, -1, grid.rows, grid.columns)
    lowest = torch.finfo(maps.dtype).min / 4  # interpolation turns -inf into NaN
    maps = F.interpolate(maps.clamp(min=lowest), size=tuple(shape), mode="bilinear")
    return maps[0].argmax(dim=0)
