"""Signals that ask a run to stop: the first is remembered, a second one ends the process at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP)
IMPATIENT = (signal.SIGTERM, signal.SIGINT)  # a second one of these ends the process
GRACE_SECONDS = 1.0  # a launcher passes on the Ctrl-C that the terminal sent to every process

_noted = False  # a stop was asked for before a run could answer; see `note_signals`
_asked_at: float | None = None  # time of the first impatient signal


def note_signals() -> None:
    """Remember a request to stop until a run answers it, for the time in which it is made ready.

    This replaces handlers that would act at once, in the middle of a step, such as a scheduler's.
    """
    for number in (*STOP_SIGNALS, signal.SIGCONT):  # SIGCONT comes with SLURM's SIGTERM
        if not _is_ignored(number):
            signal.signal(number, _note)


@contextmanager
def signals_noted() -> Iterator[None]:
    """Remember requests to stop until a run answers them, and give the signals back at the end."""
    signals = StopSignals()
    try:
        yield
    finally:
        signals.close()


def _note(number: int, frame: Any) -> None:
    global _noted
    if number in STOP_SIGNALS:
        _count(number)
        _noted = True


def _count(number: int) -> None:
    """End the process, with the status of a killed one, at the second impatient signal."""
    global _asked_at
    if number not in IMPATIENT:
        return
    now = time.monotonic()
    if _asked_at is None:
        _asked_at = now
    elif now - _asked_at > GRACE_SECONDS:
        name = signal.Signals(number).name
        with suppress(OSError):
            os.write(2, f"\na second signal ({name}): ended at once, nothing saved\n".encode())
        os._exit(128 + number)


def _is_ignored(number: int) -> bool:
    return number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN  # nohup


class StopSignals:
    """Handlers of the stop signals for the time of a run; `requested` is set by the first.

    Signals are counted by a thread, since a main thread that waits for another rank or for a dead
    disk runs no Python. Handlers can only be set in the main thread: in any other one, a program
    that trains keeps its own and stops the run in its own way.
    """

    def __init__(self, signals: tuple[int, ...] = STOP_SIGNALS) -> None:
        self.requested = _noted
        self.handled = threading.current_thread() is threading.main_thread()
        self._previous: dict[int, Any] = {}
        self._closed = False
        if not self.handled:
            return
        chosen = [number for number in signals if not _is_ignored(number)]
        # The loader's processes block them, and so do processes that were forked there.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, chosen)
        self._terminals = [descriptor for descriptor in (1, 2) if _is_terminal(descriptor)]
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._wakeup = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        self._previous = {number: signal.signal(number, self._set) for number in chosen}

    def _set(self, number: int, frame: Any) -> None:
        self._remember()
        if number == signal.SIGHUP:
            self._leave_terminals()

    def _remember(self) -> None:
        global _noted
        self.requested = _noted = True

    def _leave_terminals(self) -> None:
        """Replace output to a terminal that is closed, which would raise at every line."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in self._terminals:
            os.dup2(nowhere, descriptor)
        os.close(nowhere)

    def _watch(self) -> None:
        told = False
        while not self._closed:
            for number in os.read(self._reading, 16):
                if number not in STOP_SIGNALS:
                    continue
                self._remember()
                if number in IMPATIENT and not told and os.environ.get("RANK", "0") == "0":
                    told = True
                    name = signal.Signals(number).name
                    text = (
                        f"\n{name}: saves and stops after this step; a second signal ends at once\n"
                    )
                    with suppress(OSError):
                        os.write(2, text.encode())
                _count(number)

    def close(self) -> None:
        """Give the signals back to whoever had them. Idempotent."""
        global _asked_at, _noted
        if not self.handled or self._closed:
            return
        self._closed, _asked_at, _noted = True, None, False
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        os.write(self._writing, b"\0")
        self._thread.join(5)
        os.close(self._reading)
        os.close(self._writing)


def _is_terminal(descriptor: int) -> bool:
    try:
        return os.isatty(descriptor)
    except OSError:
        return False
