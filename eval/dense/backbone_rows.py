"""Compare segmentation with a run's backbone and with a random one, over seeds."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ssl_pretrain import rng
from ssl_pretrain.eval import results
from ssl_pretrain.eval.dense import (
    confusion,
    patch_segmentation,
    segmentation_batches,
    segmentation_text,
    segmenter_training,
    segmenters,
)
from ssl_pretrain.eval.dense.confusion import Scores
from ssl_pretrain.eval.dense.masked_images import MaskedImages
from ssl_pretrain.eval.dense.patch_segmentation import ImagePatches, PatchGrid
from ssl_pretrain.eval.dense.segmentation_protocols import (
    PATCH_PROTOCOLS,
    PROTOCOLS,
    TRAINING_PROTOCOLS,
    PatchProtocol,
    TrainingProtocol,
)
from ssl_pretrain.eval.frozen import features
from ssl_pretrain.eval.runs import Run
from ssl_pretrain.schema.image_sizes import height_and_width

INITS = ("random", "pretrained")
FINE_TUNED_RANDOM = "trained from random weights"
AS_BUILT, RECALIBRATED = "random, as built", "random, recalibrated"
Splits = tuple[MaskedImages, MaskedImages]  # training and test images
Outcome = tuple[Scores, str]  # scores on the test images, and a note on how they were reached


@dataclass(frozen=True)
class SegmentationOptions:
    """A protocol and the values to change. None keeps the protocol's."""

    protocol: str = "linear"
    inits: Sequence[str] = INITS
    seeds: Sequence[int] = (0,)
    resolution: int | None = None  # only for the protocols on frozen patches
    # Only for the protocols with training
    crop_size: int | None = None
    steps: int | None = None
    epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None

    def adapt(self) -> PatchProtocol | TrainingProtocol:
        """Return the protocol with the changes.

        Raises:
            ValueError: If there is no such protocol, or it does not take an option.
        """
        if self.protocol not in PROTOCOLS:
            raise ValueError(
                f"--protocol {self.protocol}: is not a protocol of segmentation; choose one of: "
                f"{', '.join(PROTOCOLS)}"
            )
        training = {
            "crop_size": self.crop_size,
            "num_steps": self.steps,
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "lr": self.lr,
        }
        patches = {"resolution": self.resolution}
        is_patch = self.protocol in PATCH_PROTOCOLS
        refused = training if is_patch else patches
        if given := [name for name, value in refused.items() if value is not None]:
            option = given[0].replace("num_steps", "steps").replace("_", "-")
            fitting = TRAINING_PROTOCOLS if is_patch else PATCH_PROTOCOLS
            raise ValueError(
                f"--{option}: --protocol {self.protocol} does not take it; leave it out or give "
                f"--protocol {', '.join(fitting)}"
            )
        if is_patch:
            return replace(PATCH_PROTOCOLS[self.protocol], **_given(patches))
        if self.steps is not None and self.epochs is not None:
            raise ValueError(
                f"--epochs {self.epochs}: --steps {self.steps} is given, too; give one of them"
            )
        if self.epochs is not None:
            training["num_steps"] = 0
        return replace(TRAINING_PROTOCOLS[self.protocol], **_given(training))


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def compare(run: Run, splits: Splits, options: SegmentationOptions) -> dict[str, Any]:
    """Segment with each backbone and seed, and save the scores.

    Args:
        run: Run to evaluate. The result is written to eval/segmentation_PROTOCOL.json in its
            folder.
        splits: Training and test images.
        options: Protocol, backbones and seeds.

    Returns:
        The content of the result file.

    Raises:
        ValueError: If torchmetrics is missing, the data do not fit, or training fails.
    """
    start = time.monotonic()
    confusion.require_packages()
    protocol = options.adapt()
    segmenters.check_tokens(run)
    if isinstance(protocol, PatchProtocol):
        grid = PatchGrid(run, protocol.resolution or whole_patches(run))
        rows = _patch_rows(run, splits, protocol, grid, options)
        settings = segmentation_text.describe_patches(protocol, grid, run)
    else:
        num_channels = run.config.data.channels
        if protocol.is_distorted and num_channels != 3:
            raise ValueError(
                f"--protocol {options.protocol}: its color distortion needs 3 channels, but "
                f"data.channels is {num_channels}; choose another protocol"
            )
        protocol = replace(protocol, crop_size=protocol.crop_size or _square(run))
        rows = _training_rows(run, splits, protocol, options)
        settings = segmentation_text.describe_training(run, protocol, len(splits[0]))
    return results.save(
        run.path,
        f"segmentation_{options.protocol}",
        segmentation_text.describe(run, splits, options.seeds) | settings,
        results.with_better_random_row(rows),
        run.provenance(),
        time.monotonic() - start,
        confusion.MEASURE,
    )


def _square(run: Run) -> int:
    """Return the side of the square images of an evaluation of the run."""
    return min(height_and_width(run.image_size))


def whole_patches(run: Run) -> int:
    """Return the side of the run's images, rounded up to whole patches."""
    backbone: Any = run.backbone
    side, patch_size = _square(run), int(backbone.patch_size)
    return -(-side // patch_size) * patch_size


def _patch_rows(
    run: Run, splits: Splits, protocol: PatchProtocol, grid: PatchGrid, options: SegmentationOptions
) -> list[results.Row]:
    train, test = splits

    def embed(backbone: nn.Module) -> tuple[ImagePatches, ImagePatches]:
        return (
            patch_segmentation.embed(run, backbone, train, grid),
            patch_segmentation.embed(run, backbone, test, grid),
        )

    def measure(patches: tuple[ImagePatches, ImagePatches], seed: int) -> Outcome:
        return patch_segmentation.segment(patches, splits, protocol, grid, seed)

    def as_built(seed: int) -> Outcome:
        return measure(embed(features.random_backbone(run, seed=seed)), seed)

    def recalibrated(seed: int) -> Outcome:
        backbone = features.random_backbone(run, seed=seed)
        return measure(embed(features.recalibrate(run, backbone, _batches(train, grid))), seed)

    rows = []
    if "random" in options.inits:
        rows.append(_row(AS_BUILT, options.seeds, as_built))
        if features.batch_norms(run.backbone):
            rows.append(_row(RECALIBRATED, options.seeds, recalibrated))
    if "pretrained" in options.inits:
        patches = embed(run.backbone)  # the same for all seeds
        rows.append(_row("pretrained", options.seeds, partial(measure, patches)))
    return rows


def _batches(images: MaskedImages, grid: PatchGrid) -> Iterable[Tensor]:
    """Yield shuffled batches of resized training images, uint8."""
    order = rng.permutation(0, 0, len(images), rng.Purpose.SUBSET)
    order = order[: features.MAX_RECALIBRATION_IMAGES]
    for start in range(0, len(order), patch_segmentation.BATCH_SIZE):
        rows = order[start : start + patch_segmentation.BATCH_SIZE].tolist()
        yield torch.stack([grid.square(*images.read(row))[0] for row in rows])


def _training_rows(
    run: Run, splits: Splits, protocol: TrainingProtocol, options: SegmentationOptions
) -> list[results.Row]:
    random_name = AS_BUILT if protocol.is_frozen else FINE_TUNED_RANDOM
    names = {"random": random_name, "pretrained": "pretrained"}
    return [
        _row(names[init], options.seeds, partial(train_and_test, run, splits, protocol, init))
        for init in INITS
        if init in options.inits
    ]


def train_and_test(
    run: Run, splits: Splits, protocol: TrainingProtocol, init: str, seed: int
) -> Outcome:
    """Train one network, and return its scores and a note on the loss."""
    train, test = splits
    network = segmenters.build(run, len(train.classes), protocol, init, seed).to(run.device)
    pixels = segmentation_batches.Pixels(run.config.views.mean, run.config.views.std)
    num_workers = run.config.data.num_workers
    trained, losses = segmenter_training.train(network, train, protocol, pixels, seed, num_workers)
    scores = segmenter_training.test(trained, test, protocol, pixels)
    first, last = np.mean(losses[:20]), np.mean(losses[-20:])
    return scores, f"loss {first:.2f} in the first 20 steps, {last:.2f} in the last 20"


def _row(name: str, seeds: Sequence[int], measure: Callable[[int], Outcome]) -> results.Row:
    """Return the mean and the standard deviation over seeds, and the notes of all seeds."""
    columns, notes = [], []
    for seed in seeds:
        scores, note = measure(seed)
        results.print_progress(f"{name}, seed {seed}: mIoU {scores.miou:.1f} %, {note}")
        columns.append(scores.columns())
        notes.append(note)
    return results.Row.over_seeds(name, columns, {"mIoU": ", then ".join(dict.fromkeys(notes))})
