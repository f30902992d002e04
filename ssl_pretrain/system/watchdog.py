"""End a process that no longer makes progress, with a message that names its activity.

A thread counts the seconds since the last sign of life. Time in which the whole process was
suspended does not count. If a hung call holds Python's global interpreter lock, the thread cannot
run, and faulthandler ends the process.
"""

import faulthandler
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from ssl_pretrain.system import live_line
from ssl_pretrain.system.exit_status import PROCESS_LOST

TICK_SECONDS = 1.0
COMPILE_FACTOR = 10.0  # a first step that compiles may take this many times its limit
BUSY_FRACTION = 0.1  # a process that uses more than this fraction of a core counts as computing
BACKUP_SECONDS = 60.0  # faulthandler waits this much longer than the watchdog


class Watchdog:
    """Timer that, while armed, ends the process after too many seconds without a sign of life.

    Attributes:
        activity: Name of the current activity for messages.
        describe_missing_ranks: Function that returns a clause about the ranks that do not answer,
            or "". It must not wait.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._armed = threading.Event()
        self._limit_seconds, self._silent_seconds, self._compile_seconds_left = 0.0, 0.0, 0.0
        self._remedy, self._status = "", PROCESS_LOST
        self.activity = "preparing the run"
        self._seconds_by_activity: dict[str, float] = {}
        self._activity_start = time.monotonic()
        self.describe_missing_ranks: Callable[[], str] = lambda: ""

    def arm(
        self,
        limit_seconds: float,
        activity: str,
        remedy: str,
        status: int = PROCESS_LOST,
        includes_compilation: bool = False,
    ) -> None:
        """Record a sign of life and arm the watchdog for the next activity.

        Args:
            limit_seconds: Time that the next activity may take.
            activity: Name of that activity in messages, such as "training step 5".
            remedy: Advice for the user if the watchdog ends the process.
            status: Exit status of the process if the watchdog ends it.
            includes_compilation: True if the activity compiles code first. The limit is then up to
                `COMPILE_FACTOR` times as long, if this process is computing.
        """
        with self._lock:
            self._limit_seconds, self._silent_seconds, self._status = limit_seconds, 0.0, status
            self._compile_seconds_left = (
                (COMPILE_FACTOR - 1) * limit_seconds if includes_compilation else 0.0
            )
            self._count_activity()
            self.activity, self._remedy = activity, remedy
            self._armed.set()
            if self._thread is None:
                self._thread = threading.Thread(target=self._count_silence, daemon=True)
                self._thread.start()

    def disarm(self) -> None:
        """Stop counting until the next sign of life."""
        with self._lock:
            self._armed.clear()
            faulthandler.cancel_dump_traceback_later()

    def take_seconds_by_activity(self) -> dict[str, float]:
        """Return the seconds spent in each activity since the previous call.

        The numbers of steps are not part of the names.
        """
        with self._lock:
            self._count_activity()
            seconds, self._seconds_by_activity = self._seconds_by_activity, {}
        return seconds

    def _count_activity(self) -> None:
        """Add the time since the last call to the current activity. The lock must be held."""
        now, name = time.monotonic(), self.activity.rstrip("0123456789 ")
        total = self._seconds_by_activity.get(name, 0.0) + now - self._activity_start
        self._seconds_by_activity[name], self._activity_start = total, now

    def _count_silence(self) -> None:
        previous_time, previous_cpu_time = time.monotonic(), time.process_time()
        while True:
            self._armed.wait()
            time.sleep(min(TICK_SECONDS, max(0.05, self._limit_seconds / 4)))
            now, cpu_time = time.monotonic(), time.process_time()
            # A longer interval means that the process was suspended.
            elapsed = min(now - previous_time, 2 * TICK_SECONDS)
            with self._lock:
                if self._armed.is_set():
                    if (
                        self._compile_seconds_left > 0
                        and cpu_time - previous_cpu_time > BUSY_FRACTION * elapsed
                    ):
                        self._compile_seconds_left -= elapsed
                    else:
                        self._silent_seconds += elapsed
                    self._arm_faulthandler()
                    if self._silent_seconds > self._limit_seconds:
                        self._end_process()
            previous_time, previous_cpu_time = now, cpu_time

    def _arm_faulthandler(self) -> None:
        with suppress(ValueError, OSError, OverflowError):  # stderr may be closed
            seconds = (
                self._limit_seconds
                - self._silent_seconds
                + self._compile_seconds_left
                + BACKUP_SECONDS
            )
            faulthandler.dump_traceback_later(max(1.0, seconds), exit=True, file=2)

    def _end_process(self) -> None:
        live_line.erase_shown()
        with suppress(ValueError, OSError):
            faulthandler.dump_traceback(file=2, all_threads=True)
        missing_ranks = self.describe_missing_ranks()
        advice = f"{missing_ranks}; {self._remedy}" if missing_ranks else self._remedy
        message = (
            f"error: {rank_and_host()}: no sign of life for {self._limit_seconds:g} s "
            f"(parallel.timeout_seconds) while {self.activity}: {advice}\n"
        )
        live_line.write_to_stderr(message)
        os._exit(self._status)


def rank_and_host() -> str:
    """Return the name of this rank and its host for messages."""
    rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    return f"rank {rank} of {size} on {socket.gethostname()}"


watchdog = Watchdog()
