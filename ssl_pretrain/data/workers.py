"""The processes that read images and cut them: started fast, heard when they fail, gone when the run is."""

import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from multiprocessing import forkserver, resource_tracker

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ssl_pretrain.data.images import UnreadableImage
from ssl_pretrain.data.sources import Source

Job = tuple[int, np.ndarray]  # the epoch, and the images to read in it
# macOS cannot tell who sent a signal, so workers obey all of them there
_STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP} if hasattr(signal, "sigtimedwait") else set()
Make = Callable[[Tensor, int, int], list[Tensor]]  # (uint8 (3, height, width), epoch, index) -> uint8 (3, size, size) for each view


@dataclass(frozen=True)
class Chunk:
    """The views of a few images on their way to the trainer.

    pixels: uint8, flat, all images' view 0, then view 1, ...: one piece of shared memory and one copy to the device. shapes: of each
    view. labels: int64 (n,). replaced: (file, what happened) of each image that could not be read. seconds: that making it took.
    """

    pixels: Tensor
    shapes: list[torch.Size]
    labels: np.ndarray
    replaced: list[tuple[str, str]]
    seconds: float = 0.0

    def pin_memory(self) -> "Chunk":
        return replace(self, pixels=self.pixels.pin_memory())

    def to(self, device: torch.device) -> "Chunk":
        return replace(self, pixels=self.pixels.to(device, non_blocking=True))

    def views(self) -> list[Tensor]:
        """uint8 (n, 3, size, size) for each view."""
        n = len(self.labels)
        blocks = self.pixels.split([n * shape.numel() for shape in self.shapes])
        return [block.view(n, *shape) for block, shape in zip(blocks, self.shapes)]


class Chunks(Dataset[Chunk]):
    """A job -> its chunk, in whichever process. Each image is read once, however many views are made of it."""

    def __init__(self, source: Source, make: Make):
        self.source = source
        self.make = make

    def __getitem__(self, job: Job) -> Chunk:
        epoch, indices = job
        began = time.perf_counter()
        labels = np.empty(len(indices), np.int64)
        replaced: list[tuple[str, str]] = []
        for row, index in enumerate(indices.tolist()):
            pixels, taken = self._read(index, replaced)
            labels[row] = self.source.label(taken)
            try:
                views = self.make(torch.from_numpy(pixels).permute(2, 0, 1), epoch, index)
                if row == 0:
                    shapes = [view.shape for view in views]
                    pixels_of_all = torch.empty(len(indices) * sum(shape.numel() for shape in shapes), dtype=torch.uint8)
                    chunk = Chunk(pixels_of_all, shapes, labels, replaced)
                    blocks = chunk.views()
                for view, block in zip(views, blocks):
                    block[row] = view
            except Exception as error:
                raise RuntimeError(f"image {index}, {self.source.name(taken)}: {type(error).__name__}: {error}") from error
        return replace(chunk, seconds=time.perf_counter() - began)

    def _read(self, index: int, replaced: list[tuple[str, str]]) -> tuple[np.ndarray, int]:
        """The pixels of an image, or of the next one that can be read (the same in every run), and the number of the one taken."""
        n = len(self.source)
        first: UnreadableImage | None = None
        for taken in itertools.chain(range(index, n), range(index)):
            try:
                pixels = self.source.read(taken)
            except UnreadableImage as error:
                self.source.check_present()
                first = first or error
                continue
            except Exception as error:
                raise RuntimeError(f"image {taken}, {self.source.name(taken)}: {type(error).__name__}: {error}") from error
            if first is not None:
                replaced.append((self.source.name(index), f"{first}; {self.source.name(taken)} takes its place"))
            return pixels, taken
        raise RuntimeError(f"none of the {n} images of {self.source.where} can be read; one of them: {first}")


class Processes:
    """`num_workers` processes (0: this one) that make the chunk of each job, `num_ahead` of them before they are asked for."""

    def __init__(self, chunks: Chunks, num_workers: int, num_ahead: int, pinned: bool):
        self._jobs = _Jobs()
        self._num_workers = num_workers
        self._loader = DataLoader(
            chunks,
            sampler=self._jobs,
            batch_size=None,  # a job is what one worker does at a time
            collate_fn=_as_it_is,  # type: ignore[arg-type]
            num_workers=num_workers,
            prefetch_factor=max(2, -(-num_ahead // num_workers)) if num_workers else None,
            persistent_workers=num_workers > 0,
            multiprocessing_context="forkserver" if num_workers else None,
            worker_init_fn=_obey_trainer_only,
            pin_memory=pinned,
            generator=torch.Generator(),  # else iterating would draw from the trainer's generator
        )

    def take(self, jobs: Iterable[Job]) -> Iterator[Chunk]:
        """The chunks, from the first job on; the workers begin at once. Raises RuntimeError where a worker was killed."""
        if self._num_workers:
            _start_forkserver()
        self._jobs.jobs = jobs
        return _taken(iter(self._loader))

    def close(self) -> None:
        """Ends the processes and waits for them. Idempotent."""
        iterator, self._loader._iterator = self._loader._iterator, None
        if iterator is None:
            return
        iterator._shutdown_workers()  # type: ignore[attr-defined]  # torch ends them only when the last reference goes, whenever that is
        for worker in iterator._workers:  # type: ignore[attr-defined]
            if worker.is_alive():  # stuck in a dead file system
                worker.kill()
                worker.join(5)


class _Jobs:
    """torch takes one sampler for good; the jobs of each start are put into it."""

    jobs: Iterable[Job] = ()

    def __iter__(self) -> Iterator[Job]:
        return iter(self.jobs)


def _taken(chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    try:
        yield from chunks
    except (EOFError, ConnectionError) as error:  # torch's own message covers the workers that die between two sendings
        raise RuntimeError("a worker was killed while it sent images; if that was for memory, set data.num_workers lower") from error


def _start_forkserver() -> None:
    """Workers fork from a process that has imported everything and runs no threads: safe beside numba's and torch's, and quick.

    It and they are deaf to the signals that stop a run: a scheduler sends those to every process, and the trainer,
    which then saves a checkpoint, needs its workers until it ends them.
    """
    main = getattr(sys.modules["__main__"].__spec__, "name", None)  # each worker imports the main module anew: keep what it imports
    if main:  # runpy would warn in every worker of exactly that
        sys.warnoptions.append("ignore::RuntimeWarning:runpy")
    multiprocessing.set_forkserver_preload(["__main__", "ssl_pretrain.data.loader", *([main] if main else [])])
    resource_tracker.ensure_running()  # before the mask, which starting it would clear
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _obey_trainer_only(_worker: int) -> None:
    """A worker leaves when the trainer has gone or sends SIGTERM itself, and for nobody else.

    torch watches the process that a worker was forked from: that is not the trainer here, and a killed trainer would leave it behind.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)  # the process it was forked from may have been another's
    trainer = multiprocessing.parent_process()
    assert trainer is not None, "runs in a worker"

    def watch() -> None:
        if not _STOP_SIGNALS:
            trainer.join()
        while trainer.is_alive():
            received = signal.sigtimedwait({signal.SIGTERM}, 1.0)
            if received is not None and received.si_pid == trainer.pid:
                break
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _as_it_is(chunk: Chunk) -> Chunk:
    return chunk
