"""Indices -> batches of views: any number of workers and ranks, and any step resumed at, give the same images and the same views.

Workers read each image once and cut all of its crops; what leaves them is uint8. Colours are drawn and applied to
whole batches where the batch is, on the GPU if there is one. Nothing random is carried (`draws`), so the step number
is all that a resumed run needs.
"""

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ssl_pretrain import distributed
from ssl_pretrain.data import order, workers
from ssl_pretrain.data.sources import DataConfig, Source, open_source
from ssl_pretrain.data.workers import Chunk, Chunks, Job
from ssl_pretrain.views import colour, crops, recipe
from ssl_pretrain.views.recipe import Crop, ViewsConfig

_CHUNK = 64  # images a worker makes at a time, at most: all workers share the first batch, and little shared memory is held
_AHEAD = 2  # batches being made while one is used


@dataclass(frozen=True)
class Batch:
    """One rank's images of one step, on the device.

    views: each float32 (local_batch, 3, height, width), normalized, global views first. labels: int64 (local_batch,), -1 for none.
    indices: int64 (local_batch,), numbers of the images in the source; where one was unreadable it keeps its number, and
    pixels and label are those of the image that took its place.
    """

    views: list[Tensor]
    labels: Tensor
    indices: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    def to(self, device: torch.device | str) -> "Batch":
        return Batch([view.to(device) for view in self.views], self.labels.to(device), self.indices.to(device))

    def part(self, k: int, num_parts: int) -> "Batch":
        """The k-th of `num_parts` slices of equal length. Raises ValueError if they would not be equal."""
        if len(self) % num_parts:
            raise ValueError(f"a batch of {len(self)} images does not divide into {num_parts} parts")
        size = len(self) // num_parts
        rows = slice(k * size, (k + 1) * size)
        return Batch([view[rows] for view in self.views], self.labels[rows], self.indices[rows])


class Loader:
    """The training batches of one rank; see `build`. Close it, or use it in a `with`.

    steps_per_epoch: whole global batches in an epoch. source: the training images. num_replaced: unreadable images met so
    far in the batches taken here; each file is warned of once.
    """

    def __init__(
        self,
        source: Source,
        views: ViewsConfig,
        *,
        seed: int,
        global_batch_size: int,
        device: torch.device | str = "cpu",
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        recipe.check(views)
        order.check_divides(global_batch_size, world_size)
        self.source = source
        self.steps_per_epoch = order.steps_per_epoch(len(source), global_batch_size)
        self.num_replaced = 0
        self._warned: set[str] = set()
        self._views, self._crops, self._device = views, recipe.each(views), torch.device(device)
        self._seed, self._global_batch_size, self._rank, self._world_size = seed, global_batch_size, rank, world_size
        local_batch = global_batch_size // world_size
        self._chunk = _chunk_size(local_batch, num_workers)
        self._jobs = _Jobs(self)
        chunks = Chunks(source, partial(_cut, self._crops, seed))
        num_ahead = _AHEAD * -(-local_batch // self._chunk)
        self._workers = workers.start(chunks, self._jobs, num_workers, num_ahead, pinned=self._device.type == "cuda")

    def starting_at(self, step: int) -> Iterator[Batch]:
        """The batches of step `step` of the run and of all later ones, epoch after epoch, without end.

        The workers begin at once. A new call ends the batches of the one before.

        Raises (where a batch is asked for):
            RuntimeError: an image could not be made into views, and its number and file; or no image of the source can
                be read; or a worker was killed.
            FileNotFoundError: the source's folder or file has gone.
        """
        self._jobs.first_step = step
        return self._batches(step, workers.take(self._workers))

    def close(self) -> None:
        """Ends the workers. Idempotent; the iterators of `starting_at` end with them."""
        workers.end(self._workers)

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def indices(self, step: int) -> np.ndarray:
        """What this rank reads in one step: int64 (local_batch,)."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        n = len(self.source)
        return order.local_indices(self._seed, epoch, step_in_epoch, n, self._global_batch_size, self._rank, self._world_size)

    def _batches(self, first_step: int, chunks: Iterator[Chunk]) -> Iterator[Batch]:
        for step in itertools.count(first_step):
            indices = self.indices(step)
            made = [self._received(next(chunks)) for _ in range(0, len(indices), self._chunk)]
            views = []
            for number, (crop, *blocks) in enumerate(zip(self._crops, *(chunk.views() for chunk in made))):
                pixels = torch.cat(blocks) if len(blocks) > 1 else blocks[0]
                parameters = colour.draw(crop, self._seed, step // self.steps_per_epoch, indices, number).to(self._device)
                views.append(colour.apply(pixels, parameters, crop, self._views.mean, self._views.std))
            labels = torch.from_numpy(np.concatenate([chunk.labels for chunk in made]))
            yield Batch(views, labels.to(self._device), torch.from_numpy(indices.copy()).to(self._device))

    def _received(self, chunk: Chunk) -> Chunk:
        for file, message in chunk.replaced:
            self.num_replaced += 1
            if file not in self._warned:
                self._warned.add(file)
                warnings.warn(message, stacklevel=4)
        return chunk.to(self._device)


def build(data: DataConfig, views: ViewsConfig, *, seed: int, global_batch_size: int, device: torch.device | str) -> Loader:
    """The training batches of this rank. Lists of files are made by one rank a machine, the others find them on disk.

    Args:
        data: the source, and the number of workers of each rank; no more are started than it has cores.
        views: what is made of each image.
        seed: of the order, and of every choice about a view.
        global_batch_size: images per step, over all ranks.
        device: where the batches are to be.

    Raises:
        ValueError: a bad key of `data` or `views`, fewer images than the batch, or a batch that does not divide over the ranks.
    """
    order.check_divides(global_batch_size, distributed.world_size())
    if distributed.local_rank() == 0:
        source = open_source(data, "train")
    distributed.barrier()
    if distributed.local_rank() != 0:
        source = open_source(data, "train")
    return Loader(
        source,
        views,
        seed=seed,
        global_batch_size=global_batch_size,
        device=device,
        num_workers=min(data.num_workers, max(1, distributed.available_cores() // distributed.local_world_size())),
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )


def images(
    source: Source, indices: Sequence[int] | np.ndarray | None, transform: Callable[[Tensor], Tensor], batch_size: int, num_workers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images in the order given, each once, without anything random: for evaluations.

    Args:
        source: where they come from.
        indices: which, (n,); None: all.
        transform: uint8 (3, height, width) -> uint8 (3, s, s), and picklable, as `partial(crops.evaluate, size=32)` is.
        batch_size: images at a time; the last batch holds the rest.
        num_workers: processes; 0: this one.

    Returns:
        An iterator of (pixels uint8 (batch, 3, s, s), labels int64 (batch,)), on the CPU. An unreadable image is
        replaced as in training, label and all, and warned of.
    """
    chosen = np.arange(len(source)) if indices is None else np.asarray(indices, np.int64)
    jobs = [(0, chosen[start : start + batch_size]) for start in range(0, len(chosen), batch_size)]
    loader = workers.start(Chunks(source, partial(_one_view, transform)), jobs, min(num_workers, len(jobs)), 2 * num_workers, pinned=False)
    try:
        for chunk in workers.take(loader):
            for _, message in chunk.replaced:
                warnings.warn(message, stacklevel=2)
            yield chunk.views()[0], torch.from_numpy(chunk.labels)
    finally:
        workers.end(loader)


class _Jobs:
    """What the workers are to make, chunk by chunk, from `first_step` on without end."""

    def __init__(self, loader: Loader):
        self.loader = loader
        self.first_step = 0

    def __iter__(self) -> Iterator[Job]:
        for step in itertools.count(self.first_step):
            indices = self.loader.indices(step)
            for start in range(0, len(indices), self.loader._chunk):
                yield step // self.loader.steps_per_epoch, indices[start : start + self.loader._chunk]


def _chunk_size(local_batch: int, num_workers: int) -> int:
    if num_workers == 0:
        return local_batch
    return min(_CHUNK, max(16, -(-local_batch // num_workers)))


def _cut(each: list[Crop], seed: int, image: Tensor, epoch: int, index: int) -> list[Tensor]:
    _, height, width = image.shape
    return [crops.apply(image, crops.draw(crop, seed, epoch, index, view, height, width), crop) for view, crop in enumerate(each)]


def _one_view(transform: Callable[[Tensor], Tensor], image: Tensor, _epoch: int, _index: int) -> list[Tensor]:
    return [transform(image)]
