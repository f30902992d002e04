"""Worker processes that read images and cut views. They start fast, report their failures, and end with the run."""

import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from multiprocessing import forkserver, queues, resource_tracker
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ssl_pretrain.data import replacement
from ssl_pretrain.data.image_source import Source
from ssl_pretrain.data.images import UnreadableImage
from ssl_pretrain.data.order import Plan
from ssl_pretrain.system.exit_status import LostError

# macOS cannot tell who sent a signal, so workers obey all of them there
_HANDLED = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP}
_STOP_SIGNALS = _HANDLED if hasattr(signal, "sigtimedwait") else set()
_NO_GUARD = 78  # exit status of a worker that imports a script which trains wherever it is imported
PREFETCH = 2  # chunks that each worker makes ahead, at least
SHARED_MEMORY = Path("/dev/shm")
_USABLE_SHARE = 0.8  # of the shared memory that is free when the workers start
Make = Callable[
    [Tensor, int, int], list[Tensor]
]  # (uint8 (3, height, width), epoch, index) -> uint8 (3, size, size) for each view


class Job(NamedTuple):
    """Images to be made into one chunk.

    epoch: passes over the data before this one. indices: the images. step, first_row: the rank's batch that they belong to,
    and the row of the first of them in it.
    """

    epoch: int
    indices: np.ndarray
    step: int = 0
    first_row: int = 0


@dataclass(frozen=True)
class Chunk:
    """The views of a few images on their way to the trainer.

    pixels: uint8, flat, all images' view 0, then view 1, ...: one piece of shared memory and one copy to the device. shapes: of each
    view. labels: int64 (n,). replaced: (file, what happened) of each image that could not be read. seconds: that making it took.
    error: why there are no pixels, raised by the trainer so that a user reads the message and not a worker's traceback.
    """

    pixels: Tensor
    shapes: list[torch.Size]
    labels: np.ndarray
    replaced: list[tuple[str, str]]
    seconds: float = 0.0
    error: Exception | None = None

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
    """Dataset that makes the chunk of a job, in any process. Each image is read once, however many views are made of it.

    plan: the order of the run, from which an unreadable image gets its replacement. None for a pass over a list of images, where
    the next image of the source replaces it.
    """

    def __init__(self, source: Source, make: Make, plan: Plan | None = None):
        self.source = source
        self.make = make
        self.plan = plan

    def __getitem__(self, job: Job) -> Chunk:
        began = time.perf_counter()
        labels = np.empty(len(job.indices), np.int64)
        replaced: list[tuple[str, str]] = []
        for row, index in enumerate(job.indices.tolist()):
            try:
                pixels, taken = self._read(job, row, replaced)
            except (FileNotFoundError, ValueError) as error:
                return Chunk(torch.empty(0, dtype=torch.uint8), [], labels, replaced, error=error)
            labels[row] = self.source.label(taken)
            try:
                views = self.make(torch.from_numpy(pixels).permute(2, 0, 1), job.epoch, index)
                if row == 0:
                    shapes = [view.shape for view in views]
                    pixels_of_all = _room_to_send(
                        len(labels) * sum(shape.numel() for shape in shapes)
                    )
                    chunk = Chunk(pixels_of_all, shapes, labels, replaced)
                    blocks = chunk.views()
                for view, block in zip(views, blocks):
                    block[row] = view
            except SharedMemoryFull:
                raise
            except Exception as error:
                raise RuntimeError(
                    f"image {index}, {self.source.name(taken)}: {type(error).__name__}: {error}"
                ) from error
        return replace(chunk, seconds=time.perf_counter() - began)

    def _read(self, job: Job, row: int, replaced: list[tuple[str, str]]) -> tuple[np.ndarray, int]:
        """Return the pixels of the image in a row, or of its replacement, and the number of the image that they belong to.

        Raises:
            ValueError: no image is left that could replace it.
            FileNotFoundError: the source is gone.
        """
        index = int(job.indices[row])
        found = self._attempt(index)
        if not isinstance(found, UnreadableImage):
            return found, index
        last: list[np.ndarray] = []

        def readable(number: int) -> bool:
            pixels = self._attempt(number)
            if isinstance(pixels, UnreadableImage):
                return False
            last[:] = [pixels]
            return True

        if self.plan is not None:
            taken = replacement.spare(self.plan, job.step, job.first_row + row, readable)
        else:
            taken = self._next(index, job.indices, readable)
        if taken is None:
            replaced.append((self.source.name(index), str(found)))
            raise ValueError(irreplaceable(str(found), self.source.where, len(self.source)))
        replaced.append(
            (self.source.name(index), f"{found}; {self.source.name(taken)} takes its place")
        )
        return last[0], taken

    def _attempt(self, number: int) -> np.ndarray | UnreadableImage:
        """The pixels of an image, or why it cannot be read."""
        try:
            return self.source.read(number)
        except UnreadableImage as error:
            self.source.check_present()
            return error
        except Exception as error:
            raise RuntimeError(
                f"image {number}, {self.source.name(number)}: {type(error).__name__}: {error}"
            ) from error

    def _next(self, index: int, chunk: np.ndarray, readable: Callable[[int], bool]) -> int | None:
        """The next readable image of the source, one outside the chunk where there is one."""
        n, used = len(self.source), set(chunk.tolist())
        numbers = [(index + offset) % n for offset in range(1, n)]
        outside = (number for number in numbers if number not in used)
        inside = (number for number in numbers if number in used)
        return next(
            (number for numbers in (outside, inside) for number in numbers if readable(number)),
            None,
        )


def irreplaceable(reason: str, where: str, num_images: int) -> str:
    """The message for an unreadable image in whose place no other image can be put."""
    return (
        f"data.root: {reason}; no other readable image of the {num_images:,} in {where} is left outside its batch to take its place; "
        "repair or remove the unreadable images, or give a smaller global_batch_size"
    )


class SharedMemoryFull(RuntimeError):
    """A worker found no room in shared memory for its chunk."""


def _room_to_send(size: int) -> Tensor:
    """An empty tensor of `size` bytes; in a worker in shared memory, where a failure is the trainer's to hear.

    The queue would move it there later, in a thread that prints its error and drops the chunk.
    """
    if torch.utils.data.get_worker_info() is None:
        return torch.empty(size, dtype=torch.uint8)
    try:
        storage = torch.UntypedStorage._new_shared(size)
    except RuntimeError as error:
        raise SharedMemoryFull(f"{size / 2**20:.1f} MiB of shared memory: {error}") from None
    return torch.empty(0, dtype=torch.uint8).set_(storage)


@dataclass(frozen=True)
class Sending:
    """How workers hand over their images: per chunk, and whether the trainer copies each chunk to memory of its own at once."""

    chunk: int
    copied: bool


def sending(
    image_bytes: int, chunk: int, num_workers: int, num_ahead: int, held: int, ranks: int
) -> Sending:
    """Choose the size of chunks so that all that are under way fit the shared memory that is free on this machine.

    Args:
        image_bytes: All views of one image.
        chunk: Images per chunk where there is room.
        num_workers: Processes per rank.
        num_ahead: Chunks that are made before they are asked for.
        held: Images that the trainer still uses where it does not copy them.
        ranks: Ranks on this machine.

    Raises:
        ValueError: Not even chunks of one image fit; names the place and the remedies.
    """
    if num_workers == 0 or not SHARED_MEMORY.is_dir():
        return Sending(chunk, copied=False)
    free = shutil.disk_usage(SHARED_MEMORY).free
    images = _USABLE_SHARE * free / (image_bytes * ranks)  # room for so many on this rank
    if _prefetch(num_ahead, num_workers) * num_workers * chunk + held <= images:
        return Sending(chunk, copied=False)
    under_way = PREFETCH * num_workers + 1
    if images < under_way:
        raise ValueError(
            f"data.num_workers: {num_workers} workers for each of {ranks} ranks here have at least {ranks * under_way} images of "
            f"{image_bytes / 2**20:.2f} MiB under way, and {SHARED_MEMORY} has {free / 2**20:.1f} MiB free; {_ROOM}"
        )
    return Sending(min(chunk, int(images / under_way)), copied=True)


def little_room(wanted: int, chunk: int) -> str:
    """Message for a run whose workers send few images at a time for lack of shared memory."""
    free = shutil.disk_usage(SHARED_MEMORY).free
    return (
        f"data.num_workers: {SHARED_MEMORY} has {free / 2**20:.0f} MiB free, so workers send {chunk} images at a time instead of "
        f"{wanted}, which is slower; {_ROOM}"
    )


def _prefetch(num_ahead: int, num_workers: int) -> int:
    return max(PREFETCH, -(-num_ahead // num_workers))


_ROOM = "give the container more shared memory (--shm-size=8g or --ipc=host), or set data.num_workers lower (0 needs none)"


class Processes:
    """`num_workers` processes (0: this one) that make the chunk of each job, `num_ahead` of them before they are asked for."""

    def __init__(self, chunks: Chunks, num_workers: int, num_ahead: int, pinned: bool):
        self._jobs = _Jobs()
        self._num_workers = num_workers
        self._chunks = chunks
        self._loader = DataLoader(
            chunks,
            sampler=self._jobs,
            batch_size=None,  # a job is what one worker does at a time
            collate_fn=_as_it_is,  # type: ignore[arg-type]
            num_workers=num_workers,
            prefetch_factor=_prefetch(num_ahead, num_workers) if num_workers else None,
            persistent_workers=num_workers > 0,
            multiprocessing_context="forkserver" if num_workers else None,
            worker_init_fn=_obey_trainer_only,
            pin_memory=pinned,
            generator=torch.Generator(),  # else iterating would draw from the trainer's generator
        )

    def take(self, jobs: Iterable[Job]) -> Iterator[Chunk]:
        """Return the chunks, from the first job on. The workers begin at once.

        Raises:
            LostWorkerError: When a chunk is asked for and a worker was killed.
            ValueError: This process may not start workers.
        """
        self._jobs.jobs = jobs
        if self._num_workers == 0:
            return iter(self._loader)
        refuse_in_worker()
        if multiprocessing.current_process().daemon:
            raise ValueError(
                f"data.num_workers: {self._num_workers} in a daemonic process, as those of multiprocessing.Pool are, which may "
                "start no other; set data.num_workers=0, or train in a concurrent.futures.ProcessPoolExecutor"
            )
        needs_main = b"__main__" in bytes(ForkingPickler.dumps(self._chunks))
        _start_forkserver(needs_main)
        with nullcontext() if needs_main else _without_main():
            try:
                iterator = iter(self._loader)
            except (
                BrokenPipeError,
                EOFError,
                ConnectionError,
            ):  # a worker ended while it was started
                raise (
                    _no_guard()
                    if needs_main
                    else RuntimeError("a worker ended while it was started")
                ) from None
        return _taken(iterator)

    def close(self) -> None:
        """End the processes and wait for them. Idempotent."""
        iterator, self._loader._iterator = self._loader._iterator, None
        if iterator is None:
            return
        iterator._shutdown_workers()  # type: ignore[attr-defined]  # torch ends them only when the last reference goes, whenever that is
        for worker in iterator._workers:  # type: ignore[attr-defined]
            if worker.is_alive():  # stuck in a dead file system
                worker.kill()
                worker.join(5)


class _Jobs:
    """Sampler whose jobs are set at each start, as a DataLoader keeps one sampler for its whole life."""

    jobs: Iterable[Job] = ()

    def __iter__(self) -> Iterator[Job]:
        return iter(self.jobs)


def refuse_in_worker() -> None:
    """End a worker process that imports a script which trains wherever it is imported; the trainer names the remedy."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        os._exit(_NO_GUARD)


def _no_guard() -> ValueError:
    return ValueError(
        f"data.num_workers: each worker process imports {getattr(sys.modules['__main__'], '__file__', 'the main module')}, which "
        'starts to train wherever it is imported; put that below `if __name__ == "__main__":`, or set data.num_workers=0'
    )


@contextmanager
def _without_main() -> Iterator[None]:
    """Start processes that do not import the program's main module.

    They need nothing of it, and a script without `if __name__ == "__main__":` would train in each of them.
    """
    main = sys.modules["__main__"]
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    main.__spec__ = None
    if file is not None:
        del main.__file__
    try:
        yield
    finally:
        main.__spec__ = spec
        if file is not None:
            main.__file__ = file


class LostWorkerError(LostError):
    """A process that reads images was killed."""


def _lost_worker(number: int = 0) -> LostWorkerError:
    """The error for a worker that ended with the exit status `number`, where it is known."""
    name = f" by {signal.Signals(-number).name}" if -number in set(signal.Signals) else ""
    return LostWorkerError(
        f"data.num_workers: a process that reads images was killed{name}, as it happens where memory runs out; give the job more "
        "memory or set data.num_workers lower, then start the command again"
    )


def _taken(chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    try:
        yield from chunks
    except SharedMemoryFull as error:
        first = next(
            (line for line in reversed(str(error).splitlines()) if "shared memory" in line),
            str(error),
        )
        raise ValueError(
            f"a worker's images do not fit {SHARED_MEMORY}: {first.partition(': ')[2] or first}; {_ROOM}"
        ) from None
    except RuntimeError as error:
        statuses = [worker.exitcode or 0 for worker in chunks._workers]  # type: ignore[attr-defined]
        if _NO_GUARD in statuses:
            raise _no_guard() from None
        if "shared memory" in str(error) or -signal.SIGBUS in statuses:
            raise ValueError(
                f"a worker's images do not fit {SHARED_MEMORY}: {str(error).splitlines()[0]}; {_ROOM}"
            ) from None
        if (killed := min(statuses)) < 0:
            raise _lost_worker(killed) from None
        raise
    except (EOFError, ConnectionError):  # it was killed while it sent images
        raise _lost_worker() from None


def _start_forkserver(needs_main: bool) -> None:
    """Start the process that workers fork from. It has imported everything, and runs no threads that a fork would break.

    It and the workers block the signals that stop a run. A scheduler sends those to every process, and the trainer,
    which then saves a checkpoint, needs its workers until it ends them.
    """
    main = getattr(sys.modules["__main__"].__spec__, "name", None) if needs_main else None
    if main:  # each worker imports it anew, so what it imports is kept; runpy would warn in every worker of exactly that
        sys.warnoptions.append("ignore::RuntimeWarning:runpy")
    multiprocessing.set_forkserver_preload(["ssl_pretrain.data.loader", *([main] if main else [])])
    hangup = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS & {signal.SIGHUP})
    try:  # a closed terminal would end the tracker, which then leaves semaphores behind
        resource_tracker.ensure_running()  # before the mask, which starting it would clear
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, hangup)
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _obey_trainer_only(_worker: int) -> None:
    """End a worker when the trainer has ended or sends it SIGTERM, and at nobody else's signal.

    torch watches the process that a worker was forked from: that is not the trainer here, and a killed trainer would leave it behind.
    """
    signal.pthread_sigmask(
        signal.SIG_BLOCK, _STOP_SIGNALS
    )  # the process it was forked from may have been another's
    trainer = multiprocessing.parent_process()
    assert trainer is not None, "runs in a worker"

    queues.Queue._on_queue_feeder_error = staticmethod(_end_unsent)  # type: ignore[attr-defined]

    def watch() -> None:
        if not _STOP_SIGNALS:
            trainer.join()
        while trainer.is_alive():
            received = signal.sigtimedwait({signal.SIGTERM}, 1.0)
            if received is not None and received.si_pid == trainer.pid:
                break
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _end_unsent(error: Exception, _object: object) -> None:
    """End a worker that could not send its chunk: the trainer would wait for it in vain."""
    os.write(
        2,
        f"error: a worker process could not send its images: {type(error).__name__}: {error}\n".encode(),
    )
    os._exit(1)


def _as_it_is(chunk: Chunk) -> Chunk:
    return chunk
