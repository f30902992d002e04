"""Signals that ask a run to stop. The first is remembered, a second one ends the process."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP)
IMPATIENT_SIGNALS = (signal.SIGTERM, signal.SIGINT)  # a second one of these ends the process
GRACE_SECONDS = 1.0  # a launcher passes on the Ctrl-C that the terminal sent to every process

_stop_requested = False  # remembered until a run is ready to answer
_first_impatient: float | None = None  # time of the first impatient signal


def remember_signals() -> None:
    """Remember a request to stop while the run is being prepared and cannot answer it.

    This replaces handlers that would act at once, in the middle of a step, such as a scheduler's.
    """
    for number in (*STOP_SIGNALS, signal.SIGCONT):  # SIGCONT comes with SLURM's SIGTERM
        if not _is_ignored(number):
            signal.signal(number, _remember)


@contextmanager
def remembering_signals() -> Iterator[None]:
    """Remember requests to stop until a run answers them, and restore the handlers at the end."""
    signals = StopSignals()
    try:
        yield
    finally:
        signals.close()


def _remember(number: int, frame: Any) -> None:
    global _stop_requested
    if number in STOP_SIGNALS:
        _end_at_second_signal(number)
        _stop_requested = True


def _end_at_second_signal(number: int) -> None:
    """End the process, with the status of a killed one, at the second impatient signal."""
    global _first_impatient
    if number not in IMPATIENT_SIGNALS:
        return
    now = time.monotonic()
    if _first_impatient is None:
        _first_impatient = now
    elif now - _first_impatient > GRACE_SECONDS:
        name = signal.Signals(number).name
        _write_to_stderr(f"\na second signal ({name}): ended at once, nothing saved\n")
        os._exit(128 + number)


def _write_to_stderr(text: str) -> None:
    with suppress(OSError):
        os.write(2, text.encode())


def _is_ignored(number: int) -> bool:
    return number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN  # nohup


class StopSignals:
    """Handlers of the stop signals during a run. `requested` is set by the first signal.

    A thread counts the signals, since a main thread that waits for another rank or for a dead disk
    runs no Python. Handlers can only be set in the main thread. A program that trains in another
    thread keeps its own handlers and stops the run in its own way.
    """

    def __init__(self, signals: tuple[int, ...] = STOP_SIGNALS) -> None:
        self.requested = _stop_requested
        self.handled = threading.current_thread() is threading.main_thread()
        self._previous: dict[int, Any] = {}
        self._closed = False
        if not self.handled:
            return
        numbers = [number for number in signals if not _is_ignored(number)]
        # The loader's processes block these signals, and so do processes forked from them.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
        self._terminals = [descriptor for descriptor in (1, 2) if _is_terminal(descriptor)]
        self._pipe_out, self._pipe_in = os.pipe()
        os.set_blocking(self._pipe_in, False)
        self._previous_wakeup = signal.set_wakeup_fd(self._pipe_in, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._count_signals, daemon=True)
        self._thread.start()
        self._previous = {number: signal.signal(number, self._handle) for number in numbers}

    def _handle(self, number: int, frame: Any) -> None:
        self._request()
        if number == signal.SIGHUP:
            self._leave_terminals()

    def _request(self) -> None:
        global _stop_requested
        self.requested = _stop_requested = True

    def _leave_terminals(self) -> None:
        """Discard output to a terminal that was closed, which would raise at every line."""
        devnull = os.open(os.devnull, os.O_WRONLY)
        for descriptor in self._terminals:
            os.dup2(devnull, descriptor)
        os.close(devnull)

    def _count_signals(self) -> None:
        announced = os.environ.get("RANK", "0") != "0"
        while not self._closed:
            for number in os.read(self._pipe_out, 16):
                if number not in STOP_SIGNALS:
                    continue
                self._request()
                if number in IMPATIENT_SIGNALS and not announced:
                    announced = True
                    name = signal.Signals(number).name
                    _write_to_stderr(
                        f"\n{name}: saving and stopping after this step; "
                        "a second signal ends at once\n"
                    )
                _end_at_second_signal(number)

    def close(self) -> None:
        """Restore the handlers that were set before. Can be called twice."""
        global _first_impatient, _stop_requested
        if not self.handled or self._closed:
            return
        self._closed, _first_impatient, _stop_requested = True, None, False
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self._previous_wakeup, warn_on_full_buffer=False)
        os.write(self._pipe_in, b"\0")
        self._thread.join(5)
        os.close(self._pipe_out)
        os.close(self._pipe_in)


def _is_terminal(descriptor: int) -> bool:
    try:
        return os.isatty(descriptor)
    except OSError:
        return False
