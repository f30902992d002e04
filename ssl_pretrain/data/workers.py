"""Worker processes that make chunks of crops. They report their failures, and end with the run."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler

import torch
from torch.utils.data import DataLoader

from ssl_pretrain.data import forkserver
from ssl_pretrain.data.chunks import Chunk, ChunkRequest
from ssl_pretrain.data.cropping import CropDataset
from ssl_pretrain.data.shared_memory import REMEDY, SHARED_MEMORY, SharedMemoryFull, Transfer
from ssl_pretrain.system.exit_status import LostError

UNGUARDED_SCRIPT = 78  # exit status of a worker that imports a script without a main guard


class LostWorkerError(LostError):
    """A process that reads images was killed."""


class ProcessPool:
    """Processes that make chunks ahead of the trainer, or the trainer itself if there are none."""

    def __init__(self, dataset: CropDataset, num_workers: int, transfer: Transfer, pinned: bool):
        """Prepare the processes. They start with the first call of `take`.

        Args:
            dataset: Makes the chunk of a request.
            num_workers: Number of processes, 0 to make the chunks in this one.
            transfer: How the processes hand over their chunks.
            pinned: Copy the chunks to pinned memory.
        """
        self._requests = _RequestSampler()
        self._num_workers = num_workers
        self._dataset = dataset
        self._copies = transfer.copies
        self._loader = DataLoader(
            dataset,
            sampler=self._requests,
            batch_size=None,  # one request is one task of a worker
            collate_fn=_keep_chunk,  # type: ignore[arg-type]
            num_workers=num_workers,
            prefetch_factor=transfer.prefetch if num_workers else None,
            persistent_workers=num_workers > 0,
            multiprocessing_context="forkserver" if num_workers else None,
            worker_init_fn=forkserver.obey_trainer_only,
            pin_memory=pinned,
            generator=torch.Generator(),  # else iterating would draw from the trainer's generator
        )

    def take(self, requests: Iterable[ChunkRequest]) -> Iterator[Chunk]:
        """Return the chunks in the order of their requests. The processes begin at once.

        Raises:
            LostWorkerError: If a worker is killed. Raised when a chunk is taken.
            ValueError: If this process may not start workers.
        """
        self._requests.requests = requests
        if self._num_workers == 0:
            return iter(self._loader)
        refuse_in_worker()
        if multiprocessing.current_process().daemon:
            raise ValueError(
                f"data.num_workers: {self._num_workers} in a daemonic process, such as those of "
                "multiprocessing.Pool, which may not start processes; set data.num_workers=0, or "
                "train in a concurrent.futures.ProcessPoolExecutor"
            )
        needs_main = b"__main__" in bytes(ForkingPickler.dumps(self._dataset))
        forkserver.start(needs_main)
        with nullcontext() if needs_main else forkserver.without_main():
            try:
                iterator = iter(self._loader)
            except (BrokenPipeError, EOFError, ConnectionError):
                if needs_main:
                    raise _unguarded_script_error() from None
                raise RuntimeError("a worker ended while it was started") from None
        chunks = raise_worker_errors(iterator)
        return map(_copy_pixels, chunks) if self._copies else chunks

    def close(self) -> None:
        """End the processes and wait for them. Idempotent."""
        iterator, self._loader._iterator = self._loader._iterator, None
        if iterator is None:
            return
        # torch itself ends them only when the last reference is dropped.
        iterator._shutdown_workers()  # type: ignore[attr-defined]
        for worker in iterator._workers:  # type: ignore[attr-defined]
            if worker.is_alive():  # it waits for a file system that does not answer
                worker.kill()
                worker.join(5)


class _RequestSampler:
    """Sampler whose requests are replaced at each start, as a DataLoader cannot change samplers."""

    requests: Iterable[ChunkRequest] = ()

    def __iter__(self) -> Iterator[ChunkRequest]:
        return iter(self.requests)


def _keep_chunk(chunk: Chunk) -> Chunk:
    return chunk


def _copy_pixels(chunk: Chunk) -> Chunk:
    return replace(chunk, pixels=chunk.pixels.clone())


def raise_worker_errors(chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    """Yield the chunks of a DataLoader, and turn the failures of its workers into clear errors.

    Raises:
        LostWorkerError: If a worker was killed.
        ValueError: If shared memory is full, or a script without a main guard starts the run.
    """
    try:
        yield from chunks
    except SharedMemoryFull as error:
        lines = reversed(str(error).splitlines())
        line = next((line for line in lines if "shared memory" in line), str(error))
        raise _full_memory_error(line.partition(": ")[2] or line) from None
    except RuntimeError as error:
        processes = chunks._workers  # type: ignore[attr-defined]
        statuses = [process.exitcode or 0 for process in processes]
        if UNGUARDED_SCRIPT in statuses:
            raise _unguarded_script_error() from None
        if "shared memory" in str(error) or -signal.SIGBUS in statuses:
            raise _full_memory_error(str(error).splitlines()[0]) from None
        if min(statuses) < 0:
            raise _lost_worker_error(min(statuses)) from None
        raise
    except (EOFError, ConnectionError):  # it was killed while it sent a chunk
        raise _lost_worker_error() from None


def _lost_worker_error(exit_status: int = 0) -> LostWorkerError:
    """Return the error for a killed worker. `exit_status` is 0 if it is not known."""
    known = -exit_status in set(signal.Signals)
    by_signal = f" by {signal.Signals(-exit_status).name}" if known else ""
    return LostWorkerError(
        f"data.num_workers: a process that reads images was killed{by_signal}, which happens "
        "when memory runs out; give the job more memory or set data.num_workers lower, then "
        "start the command again"
    )


def _full_memory_error(reason: str) -> ValueError:
    return ValueError(f"a worker's images do not fit {SHARED_MEMORY}: {reason}; {REMEDY}")


def refuse_in_worker() -> None:
    """End a worker process whose import of the main module starts another training.

    The trainer then raises an error with the remedy.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        os._exit(UNGUARDED_SCRIPT)


def _unguarded_script_error() -> ValueError:
    script = getattr(sys.modules["__main__"], "__file__", "the main module")
    return ValueError(
        f"data.num_workers: each worker process imports {script}, which starts training when it "
        'is imported; put that below `if __name__ == "__main__":`, or set data.num_workers=0'
    )
