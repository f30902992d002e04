"""Start worker processes quickly, and let nothing but the trainer end them."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, queues, resource_tracker

STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP}
# On macOS a process cannot tell who sent a signal, so workers obey every signal there.
BLOCKED_SIGNALS = STOP_SIGNALS if hasattr(signal, "sigtimedwait") else set()


def start(needs_main: bool) -> None:
    """Start the process that workers fork from.

    It has already imported everything, and it has no threads that a fork would break. It and the
    workers block the signals that stop a run. A scheduler sends them to every process, but the
    trainer still needs its workers while it saves a checkpoint, and ends them itself.

    Args:
        needs_main: True if the workers import the program's main module.
    """
    main = getattr(sys.modules["__main__"].__spec__, "name", None) if needs_main else None
    if main:
        # The forkserver imports the main module once for all workers. Each worker imports it again,
        # and runpy would warn about that.
        sys.warnoptions.append("ignore::RuntimeWarning:runpy")
    multiprocessing.set_forkserver_preload(["ssl_pretrain.data.loader", *([main] if main else [])])
    with _blocking(BLOCKED_SIGNALS & {signal.SIGHUP}):
        # Closing the terminal would end the tracker, and semaphores would be left behind. The
        # tracker is started first, because starting it unblocks the other signals.
        resource_tracker.ensure_running()
    with _blocking(BLOCKED_SIGNALS):
        forkserver.ensure_running()


@contextmanager
def _blocking(signals: set[signal.Signals]) -> Iterator[None]:
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


@contextmanager
def without_main() -> Iterator[None]:
    """Start processes that do not import the program's main module.

    Workers do not need it, and a script without `if __name__ == "__main__":` would start training
    in each of them.
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


def obey_trainer_only(_worker: int) -> None:
    """End this worker when the trainer ends or sends SIGTERM, and at no other stop signal.

    torch watches the process that a worker was forked from. That is the forkserver and not the
    trainer, so without this function a worker would outlive a killed trainer.
    """
    # The forkserver may have been started by another library, with other signals blocked.
    signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED_SIGNALS)
    trainer = multiprocessing.parent_process()
    assert trainer is not None, "runs in a worker"

    queues.Queue._on_queue_feeder_error = staticmethod(_exit_on_error)  # type: ignore[attr-defined]

    def watch() -> None:
        if not BLOCKED_SIGNALS:
            trainer.join()
        while trainer.is_alive():
            received = signal.sigtimedwait({signal.SIGTERM}, 1.0)
            if received is not None and received.si_pid == trainer.pid:
                break
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _exit_on_error(error: Exception, _object: object) -> None:
    """End a worker that could not send its images, as the trainer would wait for them forever."""
    reason = f"{type(error).__name__}: {error}"
    os.write(2, f"error: a worker process could not send its images: {reason}\n".encode())
    os._exit(1)
