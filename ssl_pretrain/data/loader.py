"""Indices -> batches of views: any number of workers and ranks, and any step resumed at, give the same images and the same views.

Workers read each image once and cut all of its crops; what leaves them is uint8. They are threads in machine code where
the images are in a .beton and FFCV is there (`threads`), else processes (`workers`): same order, same draws, same
resizing, so the same views of the same bytes. Colours are drawn and applied to whole batches where the batch is, on the
GPU if there is one. Nothing random is carried (`draws`), so the step number is all that a resumed run needs.
"""

import itertools
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from ssl_pretrain.data import device_cache, order, workers
from ssl_pretrain.data.beton.beton_source import Beton
from ssl_pretrain.data.image_source import Source
from ssl_pretrain.data.images import UnreadableImage
from ssl_pretrain.data.layout_report import layout_lines
from ssl_pretrain.data.native import decode
from ssl_pretrain.data.native.threads import Threads
from ssl_pretrain.data.sources import DataConfig, open_source
from ssl_pretrain.data.value_range import check_range
from ssl_pretrain.data.workers import Chunk, Chunks, Job
from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.views import color, crops, describe, recipe
from ssl_pretrain.views.batch import Batch
from ssl_pretrain.views.recipe import Crop, ViewsConfig
from ssl_pretrain.views.upload import upload

_CHUNK = 64  # images a worker makes at a time, at most: all workers share the first batch, and little shared memory is held
_AHEAD = 2  # batches being made while one is used
_OF_A_BETON = 0.1  # share of data.max_replaced that a .beton is allowed: all of its images decoded when it was written

How = Literal["ffcv", "folder", "device"]
Finish = Callable[
    [Tensor, int, int], Tensor
]  # what else is done to a view, uint8 (3, s, s), of (epoch, index); picklable


class Maker(Protocol):
    """What makes the chunks of jobs: threads, processes, or the device itself."""

    def take(self, jobs: Iterable[Job]) -> Iterator[Chunk]: ...

    def close(self) -> None: ...


class Loader:
    """The training batches of one rank; see `build`. Close it, or use it in a `with`.

    steps_per_epoch: whole global batches in an epoch. source: the training images. how: ffcv, folder or device. num_replaced:
    unreadable images met so far in the batches taken here; each file is warned of once. max_replaced: `data.max_replaced`.
    num_made, seconds: images in those batches, and how long their makers took for them, one after the other. note: what a user
    should know, or empty.
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
        how: How = "folder",
        window: int = 0,
        finish: Finish | None = None,
        view_dtype: torch.dtype = torch.float32,
        max_replaced: float = DataConfig.max_replaced,
    ):
        recipe.check(views)
        order.check_divides(global_batch_size, world_size)
        self.source, self.how, self.num_workers = source, how, num_workers
        self.plan = order.Plan(seed, len(source), global_batch_size, rank, world_size, window)
        self.steps_per_epoch = self.plan.steps_per_epoch
        self.num_replaced, self.num_made, self.seconds = 0, 0, 0.0
        self.max_replaced = max_replaced
        self._replaced_in_epoch, self._num_reported = 0, 0
        self._warned: set[str] = set()
        self._views, self._crops, self._device = (
            views,
            recipe.expand_counts(views),
            torch.device(device),
        )
        self._view_dtype = view_dtype
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        local_batch = global_batch_size // world_size
        self._chunk = _chunk_size(local_batch, num_workers) if how == "folder" else local_batch
        self._copied = False
        self.note = ""
        self._maker: Maker
        if how == "ffcv":
            assert isinstance(source, Beton) and finish is None, (
                "`choose` gives ffcv to a .beton alone, and only processes finish a view"
            )
            self._maker = Threads(
                source.samples, self._crops, self.plan, num_workers, _AHEAD, self._device
            )
        elif how == "device":
            assert finish is None, "only processes finish a view"
            self._maker = device_cache.Cache(source, self._crops, self.plan, self._device)
        else:
            chunks = Chunks(source, partial(_cut, self._crops, seed, finish), self.plan)
            num_ahead = _AHEAD * -(-local_batch // self._chunk)
            wanted, image_bytes = self._chunk, sum(3 * crop.size**2 for crop in self._crops)
            ranks = process_group.local_world_size()
            chosen = workers.sending(
                image_bytes, wanted, num_workers, num_ahead, 2 * local_batch, ranks
            )
            self._chunk, self._copied = chosen.chunk, chosen.copied
            if chosen.copied:
                num_ahead = 0
                self.note = workers.little_room(wanted, self._chunk)
            self._maker = workers.Processes(
                chunks, num_workers, num_ahead, pinned=self._device.type == "cuda"
            )
        self._jobs = _Jobs(
            self.plan, self._chunk, self._maker.expect if isinstance(self._maker, Threads) else None
        )
        weakref.finalize(
            self, self._maker.close
        )  # a loader that is forgotten, or alive at exit, leaves nothing either

    def starting_at(self, step: int) -> Iterator[Batch]:
        """The batches of step `step` of the run and of all later ones, epoch after epoch, without end.

        The workers begin at once. A new call ends the batches of the one before.

        Raises (where a batch is asked for):
            RuntimeError: an image could not be made into views, and its number and file; or a worker was killed.
            ValueError: more images than `data.max_replaced` allows cannot be read, or no image is left to replace one.
            FileNotFoundError: the source's folder or file has gone.
        """
        return self._batches(step, self._maker.take(self._jobs.starting_at(step)))

    def close(self) -> None:
        """Ends the workers. Idempotent; the iterators of `starting_at` end with them."""
        self._maker.close()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def indices(self, step: int) -> np.ndarray:
        """What this rank reads in one step: int64 (local_batch,)."""
        return self.plan.indices(step)

    def described(self, step: int, num_images: int) -> list[list[str]]:
        """What is drawn for each view of the first images of this rank's batch of `step`, in words: (images, views)."""
        numbers, epoch = self.indices(step)[:num_images], self.plan.epoch(step)
        drawn = [
            color.draw(crop, self.plan.seed, epoch, numbers, view)
            for view, crop in enumerate(self._crops)
        ]
        texts = []
        for row, number in enumerate(numbers.tolist()):
            try:
                height, width = self.source.read(number).shape[:2]
            except UnreadableImage:
                texts.append(["another image in place of an unreadable one"] * len(self._crops))
                continue
            boxes = [
                crops.draw(crop, self.plan.seed, epoch, number, view, height, width)
                for view, crop in enumerate(self._crops)
            ]
            texts.append(
                [
                    describe.text(crop, box, parameters, row)
                    for crop, box, parameters in zip(self._crops, boxes, drawn)
                ]
            )
        return texts

    def _batches(self, first_step: int, chunks: Iterator[Chunk]) -> Iterator[Batch]:
        for step in itertools.count(first_step):
            indices = self.indices(step)
            if step == first_step or step % self.steps_per_epoch == 0:
                self._replaced_in_epoch = 0
            made = [
                self._received(chunk)
                for chunk in itertools.islice(chunks, -(-len(indices) // self._chunk))
            ]
            if not made:
                return
            pixels = [
                torch.cat(blocks) if len(blocks) > 1 else blocks[0]
                for blocks in zip(*(chunk.views() for chunk in made))
            ]
            views: list[Tensor] = []
            for crop in self._views.crops.values():
                numbers = range(len(views), len(views) + crop.count)
                drawn = [
                    color.draw(crop, self.plan.seed, self.plan.epoch(step), indices, number)
                    for number in numbers
                ]
                group = [pixels[number] for number in numbers]
                views += color.apply_to_group(
                    group, drawn, crop, self._views.mean, self._views.std, self._view_dtype
                )
            labels = torch.from_numpy(np.concatenate([chunk.labels for chunk in made]))
            yield Batch(
                views,
                upload(labels, self._device),
                upload(torch.from_numpy(indices.copy()), self._device),
            )

    def _received(self, chunk: Chunk) -> Chunk:
        self.num_made += len(chunk.labels)
        self.seconds += chunk.seconds
        for file, message in chunk.replaced:
            self.num_replaced += 1
            self._replaced_in_epoch += 1
            if file not in self._warned:
                self._warned.add(file)
                warnings.warn(message, stacklevel=4)
        if chunk.replaced:
            check_replaced(
                self._replaced_in_epoch,
                len(self.source),
                self.source,
                self.max_replaced,
                chunk.replaced[-1][1],
            )
        if chunk.error is not None:
            raise chunk.error
        if self._copied:
            chunk = replace(chunk, pixels=chunk.pixels.clone())
        return self._sent(chunk)

    def count_replaced(self, step: int, every_steps: int, last_step: int) -> dict[str, int]:
        """Count the replaced images of all ranks, and stop the run where there are too many. A collective on the CPU.

        Args:
            step: Steps done, the same on every rank.
            every_steps: Interval of the records.
            last_step: Of the run, which is recorded too.

        Returns:
            `replaced_images` since the last record, at the steps that are recorded; else nothing.

        Raises:
            ValueError: The ranks have replaced more of the epoch's images than `data.max_replaced`.
        """
        recorded = step % every_steps == 0 or step == last_step
        if not recorded and step % self.steps_per_epoch:
            return {}
        counts = collectives.gather_objects(
            (self._replaced_in_epoch, self.num_replaced - self._num_reported)
        )
        check_replaced(
            sum(in_epoch for in_epoch, _ in counts),
            len(self.source),
            self.source,
            self.max_replaced,
        )
        if not recorded:
            return {}
        self._num_reported = self.num_replaced
        return {"replaced_images": sum(new for _, new in counts)}

    def _sent(self, chunk: Chunk) -> Chunk:
        """The chunk on the device: to a GPU on a stream of its own, beside the step that the GPU is still at."""
        if self._stream is None or chunk.pixels.is_cuda:
            return chunk.to(self._device)
        now = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            chunk = chunk.to(self._device)
        now.wait_stream(self._stream)
        chunk.pixels.record_stream(now)
        return chunk


def build(
    data: DataConfig,
    views: ViewsConfig,
    *,
    seed: int,
    global_batch_size: int,
    device: torch.device | str,
    view_dtype: torch.dtype = torch.float32,
) -> Loader:
    """The training batches of this rank. Lists of files are made by one rank a machine, the others find them on disk.

    Args:
        data: the source, and the number of workers of each rank; no more are started than it has cores.
        views: what is made of each image.
        seed: of the order, and of every choice about a view.
        global_batch_size: images per step, over all ranks.
        device: where the batches are to be.
        view_dtype: Of the views on a GPU, from `parallel.view_dtype`.

    Raises:
        ValueError: a bad key of `data` or `views`, fewer images than the batch, or a batch that does not divide over the ranks.
    """
    order.check_divides(global_batch_size, process_group.world_size())
    if process_group.local_rank() == 0:
        source = open_source(data, "train")
        check_range(source)
    collectives.barrier()
    if process_group.local_rank() != 0:
        source = open_source(data, "train")
    how, why = choose(data, source)
    if process_group.is_main():
        print(
            *layout_lines(data, source),
            f"data.loader: {how}: {why}",
            sep="\n",
            file=sys.stderr,
            flush=True,
        )
    batches = Loader(
        source,
        views,
        seed=seed,
        global_batch_size=global_batch_size,
        device=device,
        num_workers=min(
            data.num_workers,
            process_group.cores_per_rank(),
        ),
        rank=process_group.rank(),
        world_size=process_group.world_size(),
        how=how,
        window=data.quasi_random_window if data.order == "quasi_random" else 0,
        view_dtype=view_dtype,
        max_replaced=data.max_replaced,
    )
    if batches.note and process_group.is_main():
        print(batches.note, file=sys.stderr, flush=True)
    return batches


def check_replaced(
    num_replaced: int, num_images: int, source: Source, max_replaced: float, example: str = ""
) -> None:
    """Raise ValueError if more of the `num_images` of one pass were replaced than `data.max_replaced` allows.

    One image is always allowed where any is. A .beton is allowed a tenth of the share.
    """
    share = max_replaced * (_OF_A_BETON if isinstance(source, Beton) else 1.0)
    allowed = max(1, int(share * num_images)) if share > 0 else 0
    if num_replaced <= allowed:
        return
    remedy = "restore the files, remove them from the data set, or raise data.max_replaced"
    if isinstance(source, Beton):
        remedy = (
            "all of them could be read when the file was written, so it is damaged now; "
            "`python -m ssl_pretrain.data.beton check` names them; copy or write it again"
        )
    raise ValueError(
        f"data.max_replaced: {num_replaced:,} of {num_images:,} images of {source.where} could not be read in one pass, more than "
        f"the {allowed:,} that may be replaced ({share:.3g} of the images)"
        + (f"; the last: {example}" if example else "")
        + f"; {remedy}"
    )


def choose(data: DataConfig, source: Source) -> tuple[How, str]:
    """Which loader reads this source, and why.

    Raises:
        ValueError: `data.loader` asks for what is not there, with the remedy.
    """
    if data.cache == "device":
        return "device", "data.cache asks for all images on the device"
    if data.loader == "folder":
        return "folder", "data.loader asks for it"
    if not isinstance(source, Beton):
        write = "python -m ssl_pretrain.data.beton write writes one"
        if data.loader == "ffcv":
            raise ValueError(
                f"data.loader: ffcv reads .beton files, and {source.where} is none; {write}, or set data.loader=folder"
            )
        return "folder", f"{source.where} is not a .beton; {write}, which is read faster"
    try:
        decode.library()
    except ValueError as error:
        if data.loader == "ffcv":
            raise
        return "folder", f"a .beton, but not by FFCV ({str(error).removeprefix('data.loader: ')})"
    return "ffcv", f"{source.where} is a .beton, and FFCV is installed"


def images(
    source: Source,
    indices: Sequence[int] | np.ndarray | None,
    transform: Callable[[Tensor], Tensor],
    batch_size: int,
    num_workers: int,
    max_replaced: float = DataConfig.max_replaced,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images in the order given, each once, without anything random: for evaluations.

    Args:
        source: where they come from.
        indices: which, (n,); None: all.
        transform: uint8 (3, height, width) -> uint8 (3, s, s), and picklable, as `partial(crops.evaluate, size=32)` is.
        batch_size: images at a time; the last batch holds the rest.
        num_workers: processes; 0: this one.
        max_replaced: `data.max_replaced`, here of the source's images in this one pass.

    Returns:
        An iterator of (pixels uint8 (batch, 3, s, s), labels int64 (batch,)), on the CPU. An unreadable image is
        replaced by the next one that can be read, label and all, and warned of.

    Raises (where a batch is asked for):
        ValueError: more images than `max_replaced` allows cannot be read.
    """
    chosen = np.arange(len(source)) if indices is None else np.asarray(indices, np.int64)
    batches = [chosen[start : start + batch_size] for start in range(0, len(chosen), batch_size)]
    num_workers = min(num_workers, len(batches))
    chunks = Chunks(source, partial(_one_view, transform))
    size = batch_size
    if num_workers:
        first = chunks[Job(0, chosen[:1])]
        if first.error is not None:
            raise first.error
        held, ranks = 2 * batch_size, process_group.local_world_size()
        size = workers.sending(
            first.pixels.numel(), batch_size, num_workers, 2 * num_workers, held, ranks
        ).chunk
    jobs = [
        [Job(0, batch[start : start + size]) for start in range(0, len(batch), size)]
        for batch in batches
    ]
    processes = workers.Processes(chunks, num_workers, 2 * num_workers, pinned=False)
    num_replaced = 0
    try:
        taken = processes.take(itertools.chain.from_iterable(jobs))
        for parts in jobs:
            pixels, labels = [], []
            for chunk in itertools.islice(taken, len(parts)):
                for _, message in chunk.replaced:
                    warnings.warn(message, stacklevel=2)
                if chunk.replaced:
                    num_replaced += len(chunk.replaced)
                    check_replaced(
                        num_replaced, len(chosen), source, max_replaced, chunk.replaced[-1][1]
                    )
                if chunk.error is not None:
                    raise chunk.error
                views = chunk.views()[0]
                pixels.append(views if len(parts) == 1 else views.clone())
                labels.append(chunk.labels)
            yield (
                torch.cat(pixels) if len(parts) > 1 else pixels[0],
                torch.from_numpy(np.concatenate(labels)),
            )
    finally:
        processes.close()


class _Jobs:
    """What is to be made, chunk by chunk, from a step on without end. Knows no loader, which could not be forgotten otherwise."""

    def __init__(self, plan: order.Plan, chunk: int, expect: Callable[[np.ndarray], None] | None):
        self.plan, self.chunk, self.expect = plan, chunk, expect

    def starting_at(self, first_step: int) -> Iterator[Job]:
        expected: list[int] = []
        for step in itertools.count(first_step):
            if (
                self.expect is not None
                and self.plan.window
                and expected != (blocks := self.plan.blocks_after(step)).tolist()
            ):
                expected = blocks.tolist()
                self.expect(blocks)
            indices = self.plan.indices(step)
            for start in range(0, len(indices), self.chunk):
                yield Job(self.plan.epoch(step), indices[start : start + self.chunk], step, start)


def _chunk_size(local_batch: int, num_workers: int) -> int:
    if num_workers == 0:
        return local_batch
    return min(_CHUNK, max(16, -(-local_batch // num_workers)))


def _cut(
    each: list[Crop], seed: int, finish: Finish | None, image: Tensor, epoch: int, index: int
) -> list[Tensor]:
    _, height, width = image.shape
    views = [
        crops.apply(image, crops.draw(crop, seed, epoch, index, view, height, width), crop)
        for view, crop in enumerate(each)
    ]
    return views if finish is None else [finish(view, epoch, index) for view in views]


def _one_view(
    transform: Callable[[Tensor], Tensor], image: Tensor, _epoch: int, _index: int
) -> list[Tensor]:
    return [transform(image)]
