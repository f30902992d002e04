"""Signals that ask a run to stop. The first one is remembered. A second one ends the process."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

from ssl_pretrain.system import live_line
from ssl_pretrain.system.output_streams import redirect_to_null
from ssl_pretrain.system.platform_support import available_signals

HAS_SIGNAL_MASKS = hasattr(signal, "pthread_sigmask")  # not on Windows
STOP_SIGNALS = available_signals("SIGTERM", "SIGINT", "SIGUSR2", "SIGHUP")
HANGUP = available_signals("SIGHUP")  # sent when the terminal is closed; Windows has none
FORCE_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)  # a second one of these ends the process
# A second signal within this time is ignored, because a launcher also forwards the Ctrl-C that the
# terminal sends to every process.
GRACE_SECONDS = 1.0

_stop_requested = False  # True from the first stop signal to the end of the run
_first_force_stop_seconds: float | None = None  # monotonic time of the first force-stop signal


def install_early_handlers() -> None:
    """Remember a request to stop while the run is being prepared and cannot respond to it.

    This replaces handlers that would act immediately, in the middle of a step, such as those of a
    scheduler.
    """
    # SLURM sends SIGCONT along with SIGTERM.
    for number in (*STOP_SIGNALS, *available_signals("SIGCONT")):
        if not _is_ignored(number):
            signal.signal(number, _remember)


@contextmanager
def temporary_signal_handlers() -> Iterator[None]:
    """Remember requests to stop until a run responds, then restore the earlier handlers."""
    with closing(StopSignalHandlers()):
        yield


def _remember(number: int, frame: Any) -> None:
    global _stop_requested
    if number in STOP_SIGNALS:
        _end_at_second_signal(number)
        _stop_requested = True


def _end_at_second_signal(number: int) -> None:
    """End the process at the second force-stop signal, with the exit status of a killed process."""
    global _first_force_stop_seconds
    if number not in FORCE_STOP_SIGNALS:
        return
    now = time.monotonic()
    if _first_force_stop_seconds is None:
        _first_force_stop_seconds = now
    elif now - _first_force_stop_seconds > GRACE_SECONDS:
        _announce(number, "{} is the second signal: the process ends without saving\n")
        os._exit(128 + number)


def _announce(number: int, message: str) -> None:
    """Write the message to standard error, with the signal's name in place of `{}`.

    A terminal shows ^C where the cursor is. The message replaces it together with the progress
    line, or else begins on the next line.
    """
    was_erased = live_line.erase_shown()
    text = message.format(signal.Signals(number).name)
    live_line.write_to_stderr(text if was_erased else f"\n{text}")


def _is_ignored(number: int) -> bool:
    """Return True for SIGHUP under nohup."""
    return number in HANGUP and signal.getsignal(number) is signal.SIG_IGN


class StopSignalHandlers:
    """Handlers of the stop signals during a run. The first signal sets `is_stop_requested`.

    A thread counts the signals, because the main thread runs no Python code while it waits for
    another rank or an unresponsive disk. Windows cannot wake such a thread, and the main thread
    responds there. Handlers can only be set in the main thread. A program that trains in another
    thread keeps its own handlers and stops the run in its own way.
    """

    def __init__(self, signals: tuple[int, ...] = STOP_SIGNALS) -> None:
        self.is_stop_requested = _stop_requested
        self.is_installed = threading.current_thread() is threading.main_thread()
        self._previous: dict[int, Any] = {}
        self._closed = False
        if not self.is_installed:
            return
        numbers = [number for number in signals if not _is_ignored(number)]
        self._terminals = list(filter(os.isatty, (1, 2)))
        self._is_announced = os.environ.get("RANK", "0") != "0"  # rank 0 announces it for all
        self._thread: threading.Thread | None = None
        if HAS_SIGNAL_MASKS:
            # A process forked from a loader's process inherits a mask that blocks the signals.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
            self._start_counting()
        self._previous = {number: signal.signal(number, self._handle) for number in numbers}

    def _start_counting(self) -> None:
        self._pipe_out, self._pipe_in = os.pipe()
        os.set_blocking(self._pipe_in, False)
        self._previous_wakeup = signal.set_wakeup_fd(self._pipe_in, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._count_signals, daemon=True)
        self._thread.start()

    def _handle(self, number: int, frame: Any) -> None:
        if self._thread is None:
            self._respond(number)
        self._request()
        if number in HANGUP:  # every line of output to a closed terminal would raise
            redirect_to_null(*self._terminals)

    def _request(self) -> None:
        global _stop_requested
        self.is_stop_requested = _stop_requested = True

    def _count_signals(self) -> None:
        while not self._closed:
            for number in os.read(self._pipe_out, 16):
                if number in STOP_SIGNALS:
                    self._respond(number)

    def _respond(self, number: int) -> None:
        """Request the stop, announce it once, and end the process at the second signal."""
        self._request()
        if number in FORCE_STOP_SIGNALS and not self._is_announced:
            self._is_announced = True
            _announce(
                number,
                "{}: the run saves and stops after this step; a second signal ends it "
                "without saving\n",
            )
        _end_at_second_signal(number)

    def close(self) -> None:
        """Restore the earlier handlers. A second call does nothing."""
        global _first_force_stop_seconds, _stop_requested
        if not self.is_installed or self._closed:
            return
        self._closed, _first_force_stop_seconds, _stop_requested = True, None, False
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if self._thread is not None:
            signal.set_wakeup_fd(self._previous_wakeup, warn_on_full_buffer=False)
            os.write(self._pipe_in, b"\0")
            self._thread.join(5)
            os.close(self._pipe_out)
            os.close(self._pipe_in)
