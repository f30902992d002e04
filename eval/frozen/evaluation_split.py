"""Splits of a data set, in the views that evaluations use."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
from torch import Tensor

from ssl_pretrain import rng
from ssl_pretrain.data import readers
from ssl_pretrain.data.config import DataConfig
from ssl_pretrain.data.image_source import NoSuchSplit, Source, require_labels
from ssl_pretrain.data.source_report import check_images, layout_lines
from ssl_pretrain.data.sources import open_source
from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.eval.frozen.named_features import POOLED, Feature
from ssl_pretrain.eval.frozen.rank_batches import rank_rows
from ssl_pretrain.eval.runs import Run
from ssl_pretrain.eval.trained_run import TrainedRun
from ssl_pretrain.schema.image_sizes import ImageSize, area, describe
from ssl_pretrain.views import crops

BATCH_SIZE = 250  # images per forward pass
MAX_CACHE_BYTES = 2**30  # the views of a larger split do not stay in memory
SPLIT_SEED = 0


class UnlabeledError(ValueError):
    """An evaluation needs labels or test images that the data set does not have."""


class EvaluationSplit:
    """Images of a source in evaluation views. Small splits keep their views in memory.

    Args:
        run: Run whose configuration defines the evaluation view.
        source: Data set.
        indices: Indices of the images in the source. Default: all images.
    """

    def __init__(self, run: Run, source: Source, indices: np.ndarray | None = None):
        self.run, self.source, self.classes = run, source, source.classes
        self.indices = np.arange(len(source)) if indices is None else indices
        self.labels = source.labels[self.indices]
        self._cache: list[tuple[Tensor, Tensor]] = []

    def __len__(self) -> int:
        return len(self.indices)

    def subset(self, rows: np.ndarray) -> EvaluationSplit:
        """Return a split with only these rows of this one."""
        return EvaluationSplit(self.run, self.source, self.indices[rows])

    def random_subset(self, num_images: int, sort: bool = False) -> EvaluationSplit:
        """Return a fixed random subset of at most `num_images` images.

        The images are in random order, or in the order of the data set if `sort` is True.
        """
        rows = rng.permutation(0, 0, len(self), rng.Purpose.SUBSET)[:num_images]
        return self.subset(np.sort(rows) if sort else rows)

    @cached_property
    def rank_subset(self) -> EvaluationSplit:
        """The images that this rank evaluates. On a single rank this is the split itself."""
        if process_group.world_size() == 1:
            return self
        return self.subset(rank_rows(len(self), BATCH_SIZE))

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cached views, 0 if they would exceed MAX_CACHE_BYTES."""
        view_bytes = len(self) * self.run.config.views.num_channels * area(self.run.image_size)
        return view_bytes if view_bytes <= MAX_CACHE_BYTES else 0

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield views, uint8 (n, C, height, width), and labels, int64 (n,), in order."""
        if self._cache:
            yield from self._cache
            return
        cache = []
        evaluation, data = self.run.config.evaluation, self.run.config.data
        view = partial(
            crops.evaluation_view,
            size=self.run.image_size,
            crop_ratio=evaluation.crop_ratio,
            interpolation=evaluation.interpolation,
        )
        for images, labels in readers.read_images(
            self.source, self.indices, view, BATCH_SIZE, data.num_workers, data.max_replaced
        ):
            if self.cache_bytes:
                # The clone frees the shared memory of the workers.
                cache.append((images.clone(), labels))
            yield images, labels
        self._cache = cache


def open_images(run: TrainedRun, split: Literal["train", "val"]) -> Source:
    """Open the images or the texts of a split. Images have the channels that the network takes.

    Raises:
        ValueError: If there is no such split, most images have other channels (`WrongChannels`), or
            they would become a few dark levels.
    """
    source = open_source(run.config.data, split)
    check_images(source)
    return source


def labeled_splits(
    run: Run, purpose: str, query_split: str = "val"
) -> tuple[EvaluationSplit, EvaluationSplit]:
    """Return the labeled training images and the queries.

    Args:
        run: Run to evaluate.
        purpose: Name of the evaluation, for error messages.
        query_split: "val" for the test images, "train" for a held-out tenth of the training
            images.

    Raises:
        ValueError: If no image has a label, there is only one class or no test image, or the two
            splits disagree on the classes.
    """
    train = open_labeled_source(run, "train", purpose)
    if len(train.classes) < 2:
        raise UnlabeledError(
            f"data.root: {purpose} needs two or more classes, and {train.full_path} has"
            f" {len(train.classes)} ({', '.join(train.classes)}), so any prediction is correct;"
            " put the images in one folder per class"
        )
    if query_split == "train":
        train_rows, held_out_rows = hold_out(len(train))
        return EvaluationSplit(run, train, train_rows), EvaluationSplit(run, train, held_out_rows)
    test = open_labeled_source(run, "val", purpose)
    if not len(test):
        raise UnlabeledError(
            f"data.val: {test.full_path} has no image, but the evaluation needs test images; name "
            "a split that has some"
        )
    check_classes(train, test)
    return EvaluationSplit(run, train), EvaluationSplit(run, test)


def open_labeled_source(run: Run, split: Literal["train", "val"], purpose: str) -> Source:
    """Open the labeled images of a split.

    Images without a label are left out and counted in the printed description of the data.

    Raises:
        UnlabeledError: If no image has a label, or there is no test split and data.val names none.
    """
    source = open_split(run, split)
    if split == "train":
        process_group.print_once(*layout_lines(run.config.data, source), file=sys.stderr)
    labeled = np.flatnonzero(source.labels >= 0)
    if 0 < len(labeled) < len(source):
        source = source.take(labeled)
    try:
        require_labels(source, purpose)
    except ValueError as error:
        raise UnlabeledError(str(error)) from None
    return source


def open_split(run: TrainedRun, split: Literal["train", "val"]) -> Source:
    """Open the images or the texts of a split.

    One rank per machine lists the files first, and the other ranks read its list.

    Raises:
        UnlabeledError: If there is no test split and data.val names none.
    """
    if process_group.local_rank() == 0:
        source = _open_split(run, split)
    collectives.barrier()
    if process_group.local_rank() != 0:
        source = _open_split(run, split)
    return source


def _open_split(run: TrainedRun, split: Literal["train", "val"]) -> Source:
    try:
        return open_images(run, split)
    except NoSuchSplit as error:
        if run.config.data.val not in (DataConfig().val, "none"):
            raise  # A split that the user named is missing.
        raise UnlabeledError(str(error)) from None


def check_classes(train: Source, test: Source) -> None:
    """Raise ValueError unless a label means the same class in both splits.

    A .beton file has its own list of classes, so two of them may disagree.
    """
    if unseen := [name for name in test.classes if name not in set(train.classes)]:
        raise ValueError(
            f"data.val: {len(unseen)} of the {len(test.classes)} classes of {test.full_path}"
            f" ({', '.join(unseen[:3])}{', ...' if len(unseen) > 3 else ''}) are not among the"
            f" {len(train.classes)} of {train.full_path}; give splits of the same data set"
        )
    if test.classes != train.classes[: len(test.classes)]:
        raise ValueError(
            f"data.val: the {len(test.classes)} classes of {test.full_path} are in a different "
            f"order than the {len(train.classes)} of {train.full_path}; write both .beton files "
            "from the same data set"
        )


def hold_out(num_images: int, fraction: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """Split the rows of a data set into training rows and a fixed random fraction to hold out."""
    order = rng.permutation(SPLIT_SEED, 0, num_images, rng.Purpose.SPLIT)
    num_held_out = max(1, round(num_images * fraction))
    return np.sort(order[num_held_out:]), np.sort(order[:num_held_out])


def describe_splits(
    run: Run,
    train: EvaluationSplit,
    test: EvaluationSplit,
    query_split: str = "val",
    has_random_row: bool = True,
    feature: str = POOLED,
) -> dict[str, Any]:
    """Return the protocol entries that all evaluations of a run share.

    Args:
        run: Run to evaluate.
        train: Training images.
        test: Test images, or held-out training images.
        query_split: Origin of the test images, as in `labeled_splits`.
        has_random_row: Whether the table has a row for the random backbone.
        feature: Name of the feature, see `named_features`.
    """
    evaluation, size = run.config.evaluation, run.image_size
    kind = "held-out training images" if query_split == "train" else "test images"
    random_entry = {
        "random": "the network before its first step, from the run's seed; recalibrated: with the"
        " batch-norm statistics of training images"
    }
    return {
        "network": f"{run.network} of {run.checkpoint_path.name}, {run.config.backbone.name}",
        **(random_entry if has_random_row else {}),
        "feature": str(Feature(run.backbone, feature)),
        "precision": run.describe_precision(),
        "transform": f"{_describe_resize(size, evaluation.crop_ratio)},"
        f" {evaluation.interpolation}, nothing random",
        "images": f"{run.config.data.source}: {len(train)} training, {len(test)} {kind},"
        f" {len(train.classes)} classes",
    }


def _describe_resize(size: ImageSize, crop_ratio: float) -> str:
    """Describe the size to which images are resized, and the central part that is cut out."""
    if isinstance(size, int):
        return f"shorter side to {round(size / crop_ratio)}, central {size}x{size}"
    height, width = (round(side / crop_ratio) for side in size)
    return f"resized to cover {height}x{width}, central {describe(size)}"
