"""Write a run's small files in the background, so that a slow or full disk delays no step."""

import queue
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.system import durable_files

CLOSE_SECONDS = 60.0  # longest wait for the last records at the end of a run


@dataclass(frozen=True)
class PendingText:
    """Text that waits to be written to a file."""

    text: str
    replaces_file: bool = False

    def then(self, later: "PendingText") -> "PendingText":
        """Return one text with the same effect as this one and then a later one."""
        if later.replaces_file:
            return later
        return PendingText(self.text + later.text, self.replaces_file)


class BackgroundWriter:
    """Thread that appends lines to files or replaces them, in order and with an fsync.

    A line that cannot be written stays in memory and is written with the next one, or at the end.

    Args:
        print_line: Called with a message when lines that could not be written earlier are on disk.

    Attributes:
        problems: Messages about files that could not be written since the last `take_problems`.
    """

    def __init__(self, print_line: Callable[[str], None]):
        self._print_line = print_line
        self._queue: queue.SimpleQueue[tuple[Path, PendingText] | None] = queue.SimpleQueue()
        self._unwritten: dict[Path, PendingText] = {}  # text that could not be written yet
        self.problems: list[str] = []
        self._thread = threading.Thread(target=self._write_all, daemon=True)
        self._thread.start()

    def append(self, path: Path, line: str) -> None:
        """Queue a line to be appended to a file."""
        self._queue.put((path, PendingText(f"{line}\n")))

    def replace(self, path: Path, text: str) -> None:
        """Queue the replacement of a file's whole content, after the lines queued before."""
        self._queue.put((path, PendingText(text, replaces_file=True)))

    def try_write(self, path: Path, write: Callable[[], object]) -> bool:
        """Call `write` once in the calling thread, and return False if it raises an OSError."""
        try:
            write()
            return True
        except OSError as error:
            self.problems.append(write_failure_message(path, error))
            return False

    def take_problems(self) -> str | None:
        """Return the messages about files that could not be written, and forget them."""
        problems, self.problems = self.problems, []
        return "; ".join(dict.fromkeys(problems)) or None

    def close(self) -> None:
        """Write the queued lines, for up to `CLOSE_SECONDS`, and end the thread."""
        self._queue.put(None)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self.problems.append(
                f"the last records could not be written in {CLOSE_SECONDS:.0f} s; check the disk"
            )

    def _write_all(self) -> None:
        is_closing = False
        while not is_closing:
            entries = [self._queue.get()]
            while not self._queue.empty():  # one fsync for all lines that are queued
                entries.append(self._queue.get())
            is_closing = None in entries
            # The last round tries all unwritten text once more.
            pending = dict(self._unwritten) if is_closing else {}
            for path, text in filter(None, entries):
                earlier = pending.get(path, self._unwritten.get(path))
                pending[path] = text if earlier is None else earlier.then(text)
            for path, text in pending.items():
                self._write(path, text)

    def _write(self, path: Path, pending: PendingText) -> None:
        write = durable_files.replace if pending.replaces_file else durable_files.append
        try:
            write(path, pending.text)
        except OSError as error:
            if path not in self._unwritten:
                self.problems.append(write_failure_message(path, error))
            self._unwritten[path] = pending
        else:
            if self._unwritten.pop(path, None) is not None:
                self._print_line(f"{path} can be written again and is complete")


def write_failure_message(path: Path, error: OSError) -> str:
    """Return the message about a file that could not be written."""
    return (
        f"{path} could not be written: {durable_files.describe_error(error)}. "
        "Everything written earlier is intact. Free some space and resume"
    )


def raise_or_warn(problem: str | None, on_failure: str) -> None:
    """Handle, on every rank, a problem that rank 0 has with a file, as `on_failure` requires.

    Args:
        problem: Message about the problem on rank 0, or None.
        on_failure: Value of `checkpoint.on_failure`.

    Raises:
        SaveError: If there is a problem and `on_failure` is `stop`.
    """
    problem = collectives.broadcast_object(problem)
    if problem and on_failure == "stop":
        raise durable_files.SaveError(problem)
    if problem and process_group.is_main():
        warnings.warn(continuation_warning(problem), stacklevel=2)


def continuation_warning(problem: str) -> str:
    """Return the warning about a problem with a file that does not stop the run."""
    return f"{problem}. Training continues because checkpoint.on_failure is warn"
