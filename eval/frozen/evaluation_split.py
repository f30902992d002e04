"""The images that an evaluation sees: a part of the data in its evaluation views, and the same moved by some pixels."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from ssl_pretrain import rng
from ssl_pretrain.data import single_pass
from ssl_pretrain.data.image_source import NoSuchSplit, Source, require_labels
from ssl_pretrain.data.images import UnreadableImage
from ssl_pretrain.data.layout_report import layout_lines
from ssl_pretrain.data.sources import DataConfig, open_source
from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.eval.results import Unlabelled
from ssl_pretrain.eval.runs import Run
from ssl_pretrain.rng import Purpose
from ssl_pretrain.views import crops

BATCH = 250  # images a forward pass
KEPT_BYTES = 2**30  # the views of one part are kept for the next network up to this size
SPLIT_SEED = 0
SMALL = 32  # pixels; the test images of smaller sources are moved by default


class Part:
    """Some images of a source in their evaluation views, decoded once and kept while they are few."""

    def __init__(self, run: Run, source: Source, numbers: np.ndarray | None = None):
        self.run, self.source, self.classes = run, source, source.classes
        self.numbers = np.arange(len(source)) if numbers is None else numbers
        self.labels = source.labels[self.numbers]
        self._kept: list[tuple[Tensor, Tensor]] = []

    def __len__(self) -> int:
        return len(self.numbers)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(uint8 (n, 3, size, size), labels int64 (n,)), in order."""
        if self._kept:
            yield from self._kept
            return
        kept = []
        keep = len(self) * 3 * self.run.image_size**2 <= KEPT_BYTES
        evaluation, data = self.run.config.evaluation, self.run.config.data
        view = partial(
            crops.evaluate,
            size=self.run.image_size,
            crop_ratio=evaluation.crop_ratio,
            interpolation=evaluation.interpolation,
        )
        for images, labels in single_pass.read_images(
            self.source, self.numbers, view, BATCH, data.num_workers, data.max_replaced
        ):
            if keep:
                kept.append((images.clone(), labels))  # out of the workers' shared memory
            yield images, labels
        self._kept = kept


def labelled_parts(run: Run, what: str, split: str = "val") -> tuple[Part, Part]:
    """(training images, queries): the two parts of the data, or for split "train" the training part without a tenth, and that tenth.

    Raises:
        ValueError: an image has no label, there is one class or no test image, or the test images have classes that the training
            images have not; names the data and the remedy.
    """
    train = labelled(run, "train", what)
    if len(train.classes) < 2:
        raise Unlabelled(
            f"data.root: {what} needs two classes or more, and {train.where} has {len(train.classes)}"
            f" ({', '.join(train.classes)}): every answer would be right; put the images in one folder per class"
        )
    if split == "val":
        test = labelled(run, "val", what)
        if not len(test):
            raise Unlabelled(
                f"data.val: {test.where} holds no image, so there is nothing to test; name the part that has them"
            )
        _check_classes(train, test)
        return Part(run, train), Part(run, test)
    fit, held_out = hold_out(len(train))
    return Part(run, train, fit), Part(run, train, held_out)


def labelled(run: Run, split: Literal["train", "val"], what: str) -> Source:
    """Open the images of a split that have a label. Those without one are counted in the lines about the data, and left out.

    Raises:
        Unlabelled: No image has a label, or there is no validation split and none was named.
    """
    if (
        process_group.local_rank() == 0
    ):  # lists of files are made by one rank a machine, the others find them on disk
        source = _opened(run, split)
    collectives.barrier()
    if process_group.local_rank() != 0:
        source = _opened(run, split)
    if split == "train" and process_group.is_main():
        print(*layout_lines(run.config.data, source), sep="\n", file=sys.stderr, flush=True)
    known = np.flatnonzero(source.labels >= 0)
    if 0 < len(known) < len(source):
        source = source.take(known)
    try:
        require_labels(source, what)
    except ValueError as error:
        raise Unlabelled(str(error)) from None
    return source


def _opened(run: Run, split: Literal["train", "val"]) -> Source:
    try:
        return open_source(run.config.data, split)
    except NoSuchSplit as error:
        if run.config.data.val not in (DataConfig().val, "none"):  # named, and not there: a mistake
            raise
        raise Unlabelled(str(error)) from None


def _check_classes(train: Source, test: Source) -> None:
    """A .beton brings a list of classes of its own; labels mean the same only where the two lists are one."""
    unseen = [name for name in test.classes if name not in set(train.classes)]
    if unseen:
        raise ValueError(
            f"data.val: {test.where} has {len(test.classes)} classes and {train.where} {len(train.classes)}: {len(unseen)} were never"
            f" trained on ({', '.join(unseen[:3])}{', ...' if len(unseen) > 3 else ''}); give parts of one data set"
        )
    if test.classes != train.classes[: len(test.classes)]:
        raise ValueError(
            f"data.val: {test.where} numbers its {len(test.classes)} classes otherwise than {train.where} its {len(train.classes)};"
            " write both .beton files from one data set"
        )


def hold_out(n: int, share: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """(kept, held out): a fixed random tenth of range(n) aside, the same on every machine."""
    mixed = rng.permutation(SPLIT_SEED, 0, n, Purpose.SPLIT)
    aside = max(1, round(n * share))
    return np.sort(mixed[aside:]), np.sort(mixed[:aside])


def _shorter_side(part: Part) -> int:
    """Pixels of the shorter side of the first image that can be read."""
    for number in part.numbers.tolist():
        try:
            return min(part.source.read(number).shape[:2])
        except UnreadableImage:
            part.source.check_present()
    raise ValueError(
        f"data.root: none of the {len(part):,} images of {part.source.where} can be read"
    )


def shift(images: Tensor, dx: int, dy: int) -> Tensor:
    """Images (n, channels, height, width) moved dx pixels to the right and dy down; black enters at the edge."""
    if not dx and not dy:
        return images
    height, width = images.shape[-2:]
    padded = F.pad(images, (max(dx, 0), max(-dx, 0), max(dy, 0), max(-dy, 0)))
    return padded[..., max(-dy, 0) :, max(-dx, 0) :][..., :height, :width]


def scale(run: Run, part: Part) -> float:
    """Evaluation pixels per original pixel, from the first image: its shorter side becomes image_size / crop_ratio."""
    return run.image_size / run.config.evaluation.crop_ratio / _shorter_side(part)


def directions(run: Run, part: Part, distance: int) -> list[tuple[int, int]]:
    """The four moves by `distance` original pixels: right, left, down, up, in evaluation pixels."""
    moved = round(distance * scale(run, part))
    return [(moved, 0), (-moved, 0), (0, moved), (0, -moved)]


def default_shifts(part: Part) -> list[int]:
    return [1, 2] if _shorter_side(part) < SMALL else []


def describe_shifts(run: Run, part: Part, shifts: list[int]) -> str:
    moved = ", ".join(
        f"{distance} original = {directions(run, part, distance)[0][0]} evaluation pixels"
        for distance in shifts
    )
    return f"queries only, right, left, down and up ({4 * len(part)} queries a distance), black fill: {moved}"


def protocol(
    run: Run, train: Part, test: Part, split: str = "val", random: bool = True
) -> dict[str, Any]:
    """What every number of this run shares, to be printed beside it. `random`: the table has a row for the random backbone."""
    evaluation, size = run.config.evaluation, run.image_size
    resized = round(size / evaluation.crop_ratio)
    queries = "held-out training images" if split == "train" else "test images"
    first = "the network before its first step, by the run's seed; recalibrated: its batch norm's statistics are of training images"
    return {
        "network": f"{run.network} of {run.checkpoint_path.name}, {run.config.backbone.name}",
        **({"random": first} if random else {}),
        "feature": f"pooled output of the backbone, {run.backbone.feature_dim} numbers",
        "transform": f"shorter side to {resized}, central {size}x{size}, {evaluation.interpolation}, nothing random",
        "images": f"{run.config.data.source}: {len(train)} training, {len(test)} {queries}, {len(train.classes)} classes",
    }
