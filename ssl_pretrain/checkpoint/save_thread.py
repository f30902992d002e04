"""Write a checkpoint in a thread while training continues."""

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.system.exit_status import DISK_ERROR
from ssl_pretrain.system.watchdog import watchdog

DISK_PATIENCE = 10.0  # multiple of parallel.timeout_seconds that a save may take
POLL_SECONDS = 5.0  # longest wait between two checks for ranks that are still saving
DISK_REMEDY = (
    "the disk is slow or does not answer; check that it can be written to, then start the run again"
)


class SaveThread:
    """Thread that writes one checkpoint at a time. `wait` reports a failed save."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._description = ""
        self._problem: str | None = None

    def start(self, write: Callable[[], None], step: int, folder: Path) -> None:
        """Start a thread that calls `write` to save the checkpoint of a step in a folder."""
        self._description = f"the checkpoint of step {step} in {folder}"

        def run() -> None:
            try:
                write()
            except Exception as error:
                self._problem = (
                    f"checkpoint of step {step} could not be written to {folder}: {error}. "
                    "Older checkpoints are intact. Free space and resume"
                )

        self._thread = threading.Thread(target=run)
        self._thread.start()

    def wait(self) -> str | None:
        """Wait until no rank is saving. Return this rank's problem, or None.

        The main rank reports a slow disk every `parallel.timeout_seconds`. If the wait exceeds
        `DISK_PATIENCE` times that, the watchdog ends the process.
        """
        self._wait_for_all_ranks()
        problem, self._thread, self._problem = self._problem, None, None
        return problem

    def _wait_for_all_ranks(self) -> None:
        timeout, start = process_group.timeout_seconds(), time.monotonic()
        next_report, is_armed = timeout, False
        activity = f"waiting for the disk to write {self._description}"
        while True:
            if self._thread is not None:
                self._thread.join(min(POLL_SECONDS, timeout / 4))
            is_saving = self._thread is not None and self._thread.is_alive()
            if not any(collectives.gather_objects(is_saving)):
                return
            if not is_armed:
                is_armed = True
                watchdog.arm(DISK_PATIENCE * timeout, activity, DISK_REMEDY, DISK_ERROR)
            waited = time.monotonic() - start
            if waited > next_report and process_group.is_main():
                next_report = waited + timeout
                message = f"still {activity} after {waited:.0f} s. The disk is slow"
                print(message, file=sys.stderr, flush=True)
