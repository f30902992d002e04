"""The small files of a run, written behind the training: a slow or full disk costs no step and no record."""

from __future__ import annotations

import queue
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

from ssl_pretrain import disk, distributed

CLOSE_SECONDS = 60.0  # for what is not on the disk yet at the end


class Writer:
    """Appends lines to files in a thread of its own, in order, each fsynced.

    A line that the disk refuses is kept in memory and written with the next one, or at the end.

    Args:
        say: takes a line for people when a file that could not be written is whole again.
    """

    def __init__(self, say: Callable[[str], None]):
        self._say = say
        self._waiting: queue.SimpleQueue[tuple[Path, str] | None] = queue.SimpleQueue()
        self._kept: dict[Path, str] = {}
        self._news: list[str] = []
        self._thread = threading.Thread(target=self._write_all, daemon=True)
        self._thread.start()

    def append(self, path: Path, line: str) -> None:
        """Add a line to a file, later."""
        self._waiting.put((path, f"{line}\n"))

    def attempt(self, path: Path, work: Callable[[], object]) -> bool:
        """Write a file now, which is lost if the disk refuses it. Return False in that case."""
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
        """What could not be written since the last call."""
        news, self._news = self._news, []
        return "; ".join(dict.fromkeys(news)) or None

    def close(self) -> None:
        """Wait until all is on the disk, within reason, and end the thread."""
        self._waiting.put(None)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._news.append(f"the disk did not take the last records within {CLOSE_SECONDS:.0f} s")

    def _write_all(self) -> None:
        while True:
            jobs = [self._waiting.get()]
            while not self._waiting.empty():  # one fsync for all that came meanwhile
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
            disk.append(path, text)
        except OSError as error:
            if path not in self._kept:
                self._news.append(refused(path, error))
            self._kept[path] = text
            return
        if self._kept.pop(path, None) is not None:
            self._say(f"{path} is written again, with what was missing")


def refused(path: Path, error: OSError) -> str:
    """What to tell of a file that the disk refused."""
    return f"{path} could not be written: {disk.reason(error)}. What was written before is whole; free space and resume"


def settle(problem: str | None, on_failure: str) -> None:
    """Answer rank 0's trouble with a file as `checkpoint.on_failure` says, on every rank alike.

    Raises:
        SaveError: there is a problem and the run has to stop for it.
    """
    problem = distributed.broadcast_object(problem)
    if problem and on_failure == "stop":
        raise disk.SaveError(problem)
    if problem and distributed.is_main():
        warnings.warn(f"{problem}. The training goes on, as checkpoint.on_failure is warn", stacklevel=2)
