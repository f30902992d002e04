"""Ends a process that waits in vain, with a message that names what it waited for.

A thread counts the seconds since the last sign of life. Time in which the whole process was
suspended does not count. Code that keeps Python's lock in a hung call is ended by faulthandler.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import threading
import time
from contextlib import suppress

from ssl_pretrain.system.exit_status import LOST

TICK_SECONDS = 1.0
COMPILING = 10.0  # multiple of the time given that a first step may take while it computes
BUSY_SHARE = 0.1  # of a processor, from which on a process computes
BACKUP_SECONDS = 60.0  # more than the watchdog's own time, before faulthandler acts


class Watchdog:
    """Counts the silence of this process while it is armed, and ends the process after too much."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._armed = threading.Event()
        self._seconds, self._silence, self._compiling = 0.0, 0.0, 0.0
        self._remedy, self._status = "", LOST
        self.doing = "making the run ready"

    def beat(
        self, seconds: float, doing: str, remedy: str, status: int = LOST, compiles: bool = False
    ) -> None:
        """Give a sign of life, and arm the watchdog for what comes next.

        Args:
            seconds: Time that the next activity may take.
            doing: That activity, for the message: "training step 5".
            remedy: What a user should look at where it takes longer.
            status: Exit status of the process in that case.
            compiles: Whether code is compiled first. Time in which this process computes is then no
                silence, up to `COMPILING` times `seconds`.
        """
        with self._lock:
            self._seconds, self._silence, self._status = seconds, 0.0, status
            self._compiling = (COMPILING - 1) * seconds if compiles else 0.0
            self.doing, self._remedy = doing, remedy
            self._armed.set()
            if self._thread is None:
                self._thread = threading.Thread(target=self._count, daemon=True)
                self._thread.start()

    def rest(self) -> None:
        """Disarm the watchdog until the next sign of life."""
        with self._lock:
            self._armed.clear()
            faulthandler.cancel_dump_traceback_later()

    def _count(self) -> None:
        last, computed = time.monotonic(), time.process_time()
        while True:
            self._armed.wait()
            time.sleep(min(TICK_SECONDS, max(0.05, self._seconds / 4)))
            now, busy = time.monotonic(), time.process_time()
            elapsed = min(now - last, 2 * TICK_SECONDS)  # the rest was a suspension
            with self._lock:
                if self._armed.is_set():
                    if self._compiling > 0 and busy - computed > BUSY_SHARE * elapsed:
                        self._compiling -= elapsed
                    else:
                        self._silence += elapsed
                    self._arm_faulthandler()
                    if self._silence > self._seconds:
                        self._end()
            last, computed = now, busy

    def _arm_faulthandler(self) -> None:
        with suppress(ValueError, OSError, OverflowError):  # stderr may be closed
            seconds = self._seconds - self._silence + self._compiling + BACKUP_SECONDS
            faulthandler.dump_traceback_later(max(1.0, seconds), exit=True, file=2)

    def _end(self) -> None:
        with suppress(ValueError, OSError):
            faulthandler.dump_traceback(file=2, all_threads=True)
        message = (
            f"error: {place()}: no sign of life for {self._seconds:g} s (parallel.timeout_seconds) "
            f"while {self.doing}: {self._remedy}\n"
        )
        with suppress(OSError):
            os.write(2, message.encode())
        os._exit(self._status)


def place() -> str:
    """This rank and its host, as messages name them."""
    rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    return f"rank {rank} of {size} on {socket.gethostname()}"


watchdog = Watchdog()
