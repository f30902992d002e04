"""Writes the small files of a run in the background, so that a slow or full disk costs no step and no record."""

from __future__ import annotations

import queue
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.system import durable_files

CLOSE_SECONDS = 60.0  # longest wait for the last records at the end of a run


class Writer:
    """Appends lines to files in a thread of its own, in order, with an fsync.

    A line that the disk refuses stays in memory and is written with the next one, or at the end.

    Args:
        say: Prints a message. Called when a file that could not be written is complete again.
    """

    def __init__(self, say: Callable[[str], None]):
        self._say = say
        self._waiting: queue.SimpleQueue[tuple[Path, str] | None] = queue.SimpleQueue()
        self._kept: dict[Path, str] = {}
        self._news: list[str] = []
        self._thread = threading.Thread(target=self._write_all, daemon=True)
        self._thread.start()

    def append(self, path: Path, line: str) -> None:
        """Queue a line for the end of a file."""
        self._waiting.put((path, f"{line}\n"))

    def attempt(self, path: Path, work: Callable[[], object]) -> bool:
        """Write a file now. Return False if the disk refuses it, in which case it is not tried again."""
        try:
            work()
        except OSError as error:
            self._news.append(refused(path, error))
            return False
        return True

    def has_news(self) -> bool:
        """Return True if a file could not be written since `take_news`."""
        return bool(self._news)

    def take_news(self) -> str | None:
        """Return and forget the messages about files that could not be written, or None."""
        news, self._news = self._news, []
        return "; ".join(dict.fromkeys(news)) or None

    def close(self) -> None:
        """Write what is queued, for up to `CLOSE_SECONDS`, and end the thread."""
        self._waiting.put(None)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._news.append(
                f"the disk did not take the last records within {CLOSE_SECONDS:.0f} s"
            )

    def _write_all(self) -> None:
        while True:
            jobs = [self._waiting.get()]
            while not self._waiting.empty():  # one fsync for all lines that are queued
                jobs.append(self._waiting.get())
            texts = dict(self._kept) if None in jobs else {}  # a last attempt
            for path, text in filter(None, jobs):
                texts[path] = texts.get(path, self._kept.get(path, "")) + text
            for path, text in texts.items():
                self._write(path, text)
            if None in jobs:
                return

    def _write(self, path: Path, text: str) -> None:
        try:
            durable_files.append(path, text)
        except OSError as error:
            if path not in self._kept:
                self._news.append(refused(path, error))
            self._kept[path] = text
            return
        if self._kept.pop(path, None) is not None:
            self._say(f"{path} is written again, with what was missing")


def refused(path: Path, error: OSError) -> str:
    """Return the message about a file that the disk refused."""
    return f"{path} could not be written: {durable_files.reason(error)}. What was written before is whole; free space and resume"


def settle(problem: str | None, on_failure: str) -> None:
    """Warn about rank 0's problem with a file, or stop every rank, as `checkpoint.on_failure` says.

    Raises:
        SaveError: There is a problem and `on_failure` is `stop`.
    """
    problem = collectives.broadcast_object(problem)
    if problem and on_failure == "stop":
        raise durable_files.SaveError(problem)
    if problem and process_group.is_main():
        warnings.warn(
            f"{problem}. The training goes on, as checkpoint.on_failure is warn", stacklevel=2
        )
