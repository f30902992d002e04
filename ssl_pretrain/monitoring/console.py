"""What a person at the terminal sees: a bar with the time that is left, plain lines in a file, each warning once."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

WIDTH = 24  # of the bar, in characters
SMOOTHING = 0.1  # of the newest pace in the one that the time left is computed from
GREEN, YELLOW, DIM, PLAIN = "\x1b[32m", "\x1b[33m", "\x1b[2m", "\x1b[0m"


class Console:
    """One progress line a second at most: redrawn in place on a terminal, appended elsewhere.

    Args:
        past: records of metrics.jsonl so far, so that a resumed run's time left starts from the pace it had.
    """

    def __init__(
        self, last_step: int, past: list[dict[str, Any]] | None = None, stream: TextIO | None = None
    ):
        self.stream = stream or sys.stdout
        self.terminal = self.stream.isatty()
        self.colours = (
            self.terminal and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
        )
        self.last_step, self._shown, self._open = last_step, 0.0, False
        self._pace: float | None = None  # seconds a step
        self._knn: float | None = None
        for record in past or []:
            self._take(record)

    def progress(self, record: dict[str, Any]) -> None:
        self._take(record)
        last = record["step"] == self.last_step
        if time.monotonic() - self._shown < 1 and not last:
            return
        self._shown = time.monotonic()
        line = self.line(record)
        if not self.terminal:
            print(line, file=self.stream, flush=True)
            return
        share = record["step"] / max(1, self.last_step)
        bar = "█" * int(WIDTH * share) + "░" * (WIDTH - int(WIDTH * share))
        room = shutil.get_terminal_size().columns - WIDTH - 8
        text = f"{self._in(GREEN, bar)} {100 * share:3.0f} %  {line[: max(20, room)]}"
        print(f"\r\x1b[K{text}", end="\n" if last else "", file=self.stream, flush=True)
        self._open = not last

    def line(self, record: dict[str, Any]) -> str:
        left = int((self.last_step - record["step"]) * (self._pace or 0.0))
        shown = [
            f"step {record['step']}/{self.last_step}",
            f"epoch {record['epoch']:.2f}",
            f"loss {record['loss']:.4f}",
        ]
        shown.append(f"lr {record['lr']:.4g}")
        if self._knn is not None:
            shown.append(f"k-NN {100 * self._knn:.1f} %")
        shown += [
            f"{record['images_per_second']:,.0f} images/s",
            f"data wait {100 * record['data_wait']:.0f} %",
        ]
        if record.get("skipped_steps"):
            shown.append(f"{record['skipped_steps']:.0f} steps skipped")
        return "  ".join([*shown, f"ETA {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"])

    def say(self, text: str, colour: str = "") -> None:
        """A line of its own, above the bar."""
        start = "\r\x1b[K" if self._open else ""
        print(f"{start}{self._in(colour, text)}", file=self.stream, flush=True)
        self._open = False

    def warn(self, text: str) -> None:
        self.say(f"warning: {text}", YELLOW)

    def _take(self, record: dict[str, Any]) -> None:
        self._knn = record.get("knn", self._knn)
        pace = record.get("seconds_per_step")
        if pace:
            self._pace = (
                pace if self._pace is None else self._pace + SMOOTHING * (pace - self._pace)
            )

    def _in(self, colour: str, text: str) -> str:
        return f"{colour}{text}{PLAIN}" if self.colours and colour else text


class LastingStream:
    """Standard output or error that never raises, say because `tee` was killed or the log's disk is full.

    Lines that cannot be written are dropped. A stream that nobody reads any more is replaced by
    the null device, and the other stream says so once.
    """

    def __init__(self, stream: TextIO, name: str):
        self._stream, self._name = stream, name
        self._left = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._answer(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._answer(error)

    def close_if_failing(self) -> None:
        """Give up lines that cannot be written, so that Python does not fail over them at its exit."""
        try:
            self._stream.flush()
        except OSError:
            self._leave()

    def _answer(self, error: OSError) -> None:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EAGAIN) or self._left:
            return  # a disk may have room again
        self._left = True
        self._leave()
        other = sys.stderr if self._name == "stdout" else sys.stdout
        print(
            f"warning: {self._name} is closed ({error.strerror}); going on without it",
            file=other,
            flush=True,
        )

    def _leave(self) -> None:
        with suppress(OSError, ValueError):
            _open_null_device(self._stream.fileno())
            self._stream.flush()


@contextmanager
def lasting_output() -> Iterator[None]:
    """Keep going whatever happens to standard output and error, which may also be closed from the start."""
    previous, streams = (sys.stdout, sys.stderr), []
    for descriptor, name, stream in ((1, "stdout", sys.stdout), (2, "stderr", sys.stderr)):
        try:
            os.fstat(descriptor)
        except OSError:  # closed, and the next file to be opened would get the messages
            _open_null_device(descriptor)
        stream = stream or os.fdopen(descriptor, "w", closefd=False)
        streams.append(LastingStream(stream, name))
    sys.stdout, sys.stderr = streams
    try:
        yield
    finally:
        for stream in streams:
            stream.close_if_failing()
        sys.stdout, sys.stderr = previous


def _open_null_device(descriptor: int) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    if null != descriptor:
        os.dup2(null, descriptor)
        os.close(null)


class Warnings:
    """Takes Python's warnings while it is installed: rank 0's are shown at once, the other ranks' kept to be collected.

    A text is shown once, whatever rank and however often it comes from.
    """

    def __init__(self, show: Callable[[str], None] | None):
        self.show = show  # None on ranks that only collect
        self.waiting: list[str] = []
        self._known: set[str] = set()
        self._previous: Any = None

    def install(self) -> None:
        self._previous = warnings.showwarning
        warnings.showwarning = self._take

    def remove(self) -> None:
        """Gives warnings back to Python; what nobody collected goes to this rank's stderr."""
        if self._previous is not None and warnings.showwarning == self._take:
            warnings.showwarning = self._previous
        self._previous = None
        for text in self.collected():
            print(f"warning: {text}", file=sys.stderr, flush=True)

    def _take(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: Any = None,
        line: Any = None,
    ) -> None:
        text = f"{message} ({os.path.basename(filename)}:{lineno})"
        if text in self._known:
            return
        self._known.add(text)
        if self.show is not None:
            self.show(text)
        else:
            self.waiting.append(text)

    def collected(self) -> list[str]:
        taken, self.waiting = self.waiting, []
        return taken

    def others(self, by_rank: list[list[str]]) -> None:
        """On rank 0: shows what other ranks collected, each text once."""
        ranks: dict[str, list[int]] = {}
        for rank, texts in enumerate(by_rank):
            for text in texts:
                ranks.setdefault(text, []).append(rank)
        for text, found in ranks.items():
            if text not in self._known and self.show is not None:
                self._known.add(text)
                self.show(
                    f"{text} on rank{'s' if len(found) > 1 else ''} {', '.join(map(str, found))}"
                )
