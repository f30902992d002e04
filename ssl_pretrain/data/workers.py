"""Worker processes that make chunks of crops. They report failures and end with the run."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from multiprocessing import forkserver, queues, resource_tracker
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch.utils.data import DataLoader

from ssl_pretrain.data.chunks import Chunk, ChunkRequest, CropDataset
from ssl_pretrain.data.shared_memory import (
    SHARED_MEMORY,
    SHARED_MEMORY_REMEDY,
    SharedMemoryFull,
    Transfer,
)
from ssl_pretrain.system.exit_status import LostProcessError
from ssl_pretrain.system.platform_support import (
    CAN_FORK_WORKERS,
    START_METHOD,
    available_signals,
)

UNGUARDED_SCRIPT_STATUS = 78  # exit status of a worker that imports a script without a main guard
STOP_SIGNALS = set(available_signals("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP"))
# On macOS a process cannot tell who sent a signal, so workers obey signals from anyone.
BLOCKED_SIGNALS = STOP_SIGNALS if hasattr(signal, "sigtimedwait") else set()


class LostWorkerError(LostProcessError):
    """Error raised when a worker process was killed."""


class ProcessPool:
    """Pool of processes that make chunks ahead of the trainer.

    Without processes, the trainer makes the chunks itself.
    """

    def __init__(
        self, dataset: CropDataset, num_workers: int, transfer: Transfer, pin_memory: bool
    ):
        """Prepare the processes. They start on the first call to `make_chunks`.

        Args:
            dataset: Data set that makes the chunk of a request.
            num_workers: Number of processes, or 0 to make the chunks in this process.
            transfer: How the processes hand over their chunks.
            pin_memory: True to copy the chunks to pinned memory.
        """
        self._requests = _RequestSampler()
        self._copies_chunks = transfer.copies_chunks
        self._loader = DataLoader(
            dataset,
            sampler=self._requests,
            batch_size=None,  # a worker makes the chunk of one request at a time
            num_workers=num_workers,
            prefetch_factor=transfer.prefetch_factor if num_workers else None,
            persistent_workers=num_workers > 0,
            multiprocessing_context=START_METHOD if num_workers else None,
            worker_init_fn=_obey_trainer_only,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # else iterating would advance the trainer's generator
        )

    def make_chunks(self, requests: Iterable[ChunkRequest]) -> Iterator[Chunk]:
        """Return the chunks in the order of their requests. The processes start immediately.

        Raises:
            LostWorkerError: If a worker is killed. It is raised during the iteration.
            ValueError: If this process is not allowed to start workers.
        """
        self._requests.requests = requests
        if self._loader.num_workers == 0:
            return iter(self._loader)
        exit_if_in_worker()
        if multiprocessing.current_process().daemon:
            raise ValueError(
                f"data.num_workers: {self._loader.num_workers} workers cannot be started by a "
                "daemonic process, such as a worker of multiprocessing.Pool; set "
                "data.num_workers=0, or train in a concurrent.futures.ProcessPoolExecutor"
            )
        needs_main = b"__main__" in bytes(ForkingPickler.dumps(self._loader.dataset))
        if CAN_FORK_WORKERS:
            _start_forkserver(needs_main)
        with nullcontext() if needs_main else _hide_main_module():
            try:
                iterator = iter(self._loader)
            except (BrokenPipeError, EOFError, ConnectionError):
                if needs_main:
                    raise _unguarded_script_error() from None
                raise RuntimeError("a worker process ended while it was being started") from None
        chunks = raise_worker_errors(iterator)
        if self._copies_chunks:
            return (replace(chunk, pixels=chunk.pixels.clone()) for chunk in chunks)
        return chunks

    def close(self) -> None:
        """End the processes and wait for them. Further calls have no effect."""
        iterator, self._loader._iterator = self._loader._iterator, None
        if iterator is None:
            return
        # torch ends the processes only when the last reference to the iterator is dropped.
        iterator._shutdown_workers()  # type: ignore[attr-defined]
        for worker in iterator._workers:  # type: ignore[attr-defined]
            if worker.is_alive():  # it may be waiting for an unresponsive file system
                worker.kill()
                worker.join(5)


class _RequestSampler:
    """Sampler whose requests can be replaced, because a DataLoader cannot change its sampler."""

    requests: Iterable[ChunkRequest] = ()

    def __iter__(self) -> Iterator[ChunkRequest]:
        return iter(self.requests)


def _start_forkserver(needs_main: bool) -> None:
    """Start the process that workers fork from.

    That process has already imported all modules, and it has no threads that a fork would break.
    Like the workers, it blocks the signals that stop a run. A scheduler sends them to every
    process, but the trainer needs its workers while it saves a checkpoint, and ends them itself.

    Args:
        needs_main: True if the workers import the program's main module.
    """
    main = getattr(sys.modules["__main__"].__spec__, "name", None) if needs_main else None
    if main:
        # The forkserver imports the main module once for all workers. Each worker imports it again,
        # and runpy would warn about the second import.
        sys.warnoptions.append("ignore::RuntimeWarning:runpy")
    multiprocessing.set_forkserver_preload(["ssl_pretrain.data.loader", *([main] if main else [])])
    with _block_signals(BLOCKED_SIGNALS & set(available_signals("SIGHUP"))):
        # Otherwise closing the terminal would end the tracker and leave semaphores behind. The
        # tracker is started first, because starting it unblocks the other signals.
        resource_tracker.ensure_running()
    with _block_signals(BLOCKED_SIGNALS):
        forkserver.ensure_running()


@contextmanager
def _block_signals(signals: set[signal.Signals]) -> Iterator[None]:
    previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)


@contextmanager
def _hide_main_module() -> Iterator[None]:
    """Let processes start without importing the program's main module.

    Workers do not need it, and a script without `if __name__ == "__main__":` would start training
    in each of them.
    """
    main = vars(sys.modules["__main__"])
    attributes: dict[str, Any] = {
        name: main[name] for name in ("__spec__", "__file__") if name in main
    }
    main["__spec__"] = None
    main.pop("__file__", None)
    try:
        yield
    finally:
        main.update(attributes)


def _obey_trainer_only(_worker: int) -> None:
    """End this worker when the trainer ends or sends SIGTERM, and ignore other stop signals.

    torch watches the process that a worker was forked from. That process is the forkserver, not the
    trainer, so without this function a worker would outlive a killed trainer.
    """
    # The forkserver may have been started by another library, with other signals blocked.
    if BLOCKED_SIGNALS:
        signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED_SIGNALS)
    trainer = multiprocessing.parent_process()
    assert trainer is not None, "only a worker process calls this function"

    queues.Queue._on_queue_feeder_error = staticmethod(_exit_on_error)  # type: ignore[attr-defined]

    def watch() -> None:
        if not BLOCKED_SIGNALS:
            trainer.join()
        while trainer.is_alive():
            signal_info = signal.sigtimedwait({signal.SIGTERM}, 1.0)
            if signal_info is not None and signal_info.si_pid == trainer.pid:
                break
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _exit_on_error(error: Exception, _object: object) -> None:
    """End a worker that could not send its images. The trainer would wait for them forever."""
    message = (
        f"error: a worker process could not send its images: {type(error).__name__}: {error}\n"
    )
    os.write(2, message.encode())
    os._exit(1)


def raise_worker_errors(chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    """Yield the chunks of a DataLoader and turn failures of its workers into clear errors.

    Raises:
        LostWorkerError: If a worker was killed.
        ValueError: If shared memory is full, or a script without a main guard starts the run.
    """
    try:
        yield from chunks
    except SharedMemoryFull as error:
        lines = reversed(str(error).splitlines())
        line = next((line for line in lines if "shared memory" in line), str(error))
        raise _full_shared_memory_error(line.partition(": ")[2] or line) from None
    except RuntimeError as error:
        workers = chunks._workers  # type: ignore[attr-defined]
        statuses = [worker.exitcode or 0 for worker in workers]
        if UNGUARDED_SCRIPT_STATUS in statuses:
            raise _unguarded_script_error() from None
        if "shared memory" in str(error) or -signal.SIGBUS in statuses:
            raise _full_shared_memory_error(str(error).splitlines()[0]) from None
        if min(statuses) < 0:
            raise _lost_worker_error(min(statuses)) from None
        raise
    except (EOFError, ConnectionError):  # a worker was killed while it sent a chunk
        raise _lost_worker_error() from None


def _lost_worker_error(exit_status: int = 0) -> LostWorkerError:
    """Return the error for a killed worker. Pass 0 if the exit status is unknown."""
    is_signal = -exit_status in set(signal.Signals)
    by_signal = f" by {signal.Signals(-exit_status).name}" if is_signal else ""
    return LostWorkerError(
        f"data.num_workers: a process that reads images was killed{by_signal}, which happens "
        "when memory runs out; give the job more memory or lower data.num_workers, then "
        "repeat the command"
    )


def _full_shared_memory_error(reason: str) -> ValueError:
    return ValueError(
        f"data.num_workers: a worker's images do not fit into {SHARED_MEMORY}: {reason}; "
        f"{SHARED_MEMORY_REMEDY}"
    )


def exit_if_in_worker() -> None:
    """End a worker process whose import of the main module starts another training run.

    The trainer then raises an error with the remedy.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        os._exit(UNGUARDED_SCRIPT_STATUS)


def _unguarded_script_error() -> ValueError:
    script = getattr(sys.modules["__main__"], "__file__", "the main module")
    return ValueError(
        f"data.num_workers: each worker process imports {script}, which starts training when it "
        'is imported; put the call that starts training below `if __name__ == "__main__":`, or set '
        "data.num_workers=0"
    )
