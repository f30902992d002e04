"""A line at the bottom of the terminal that stays intact below all other output of the process.

While it is shown, `sys.stdout` and `sys.stderr` erase it before they write, and draw it again below
each complete line. So nothing is printed beside it, and no copy of it stays in the scrollback. The
cursor waits at its first column, because from there a terminal can erase it after a resize, too.
"""

import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, TextIO

ERASE = "\r\x1b[J"  # moves to the first column and clears everything from there on
LOCK_SECONDS = 1.0  # longest wait of an urgent message for another thread's output

_shown: "LiveLine | None" = None


class LiveLine:
    """Line that is drawn again after every other output, until it is closed.

    Args:
        stream: Terminal on which the line is shown.
    """

    def __init__(self, stream: TextIO):
        self.stream = stream
        self._lock = threading.RLock()
        self._render: Callable[[int], str] | None = None
        self._is_drawn = False
        self._is_message_complete = True  # False after a message that does not end its line
        self._process_id = os.getpid()
        self._originals: dict[str, TextIO] = {}

    def show(self, render: Callable[[int], str]) -> None:
        """Show the line.

        Args:
            render: Function that returns the text for the number of columns available.
        """
        global _shown
        with self._lock:
            if self._render is None:
                self._guard_streams()
                _shown = self
            self._render = render
            self._draw()

    def write_above(self, stream: TextIO, text: str) -> None:
        """Write text to a stream, above the line if that is shown."""
        if self._render is None or os.getpid() != self._process_id:
            stream.write(text)
            return
        with self._lock:
            self._erase()
            stream.write(text)
            stream.flush()
            if text:
                self._is_message_complete = text.endswith("\n")
            self._draw()

    def erase_immediately(self) -> bool:
        """Erase the line without Python's streams, and return True if it was drawn."""
        if not self._lock.acquire(timeout=LOCK_SECONDS):
            return False
        try:
            was_drawn, self._is_drawn = self._is_drawn, False
            if was_drawn:
                with suppress(OSError, ValueError):
                    os.write(self.stream.fileno(), ERASE.encode())
            return was_drawn
        finally:
            self._lock.release()

    def close(self) -> None:
        """Erase the line and release the streams."""
        global _shown
        with self._lock:
            self._erase()
            self._render = None
            if _shown is self:
                _shown = None
            for name, original in self._originals.items():
                guard = getattr(sys, name)
                if isinstance(guard, _GuardedStream) and guard.line is self:
                    setattr(sys, name, original)
            self._originals = {}

    def _draw(self) -> None:
        if self._render is not None and self._is_message_complete:
            # A character in the last column could move the cursor to the next row.
            text = self._render(terminal_width(self.stream) - 1)
            self.stream.write(f"\r{text}\x1b[J\r")
            self.stream.flush()
            self._is_drawn = True

    def _erase(self) -> None:
        if self._is_drawn:
            self.stream.write(ERASE)
            self.stream.flush()
            self._is_drawn = False

    def _guard_streams(self) -> None:
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream is not None and stream.isatty():
                self._originals[name] = stream
                setattr(sys, name, _GuardedStream(stream, self))


class _GuardedStream:
    """Standard output or standard error while a line is shown."""

    def __init__(self, stream: TextIO, line: LiveLine):
        self._stream, self.line = stream, line

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self.line.write_above(self._stream, text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))


def erase_shown() -> bool:
    """Erase the line that is shown, if any, and return True if there was one.

    The line is drawn again with its next change or after the next message.
    """
    return _shown is not None and _shown.erase_immediately()


def write_to_stderr(message: str) -> None:
    """Write an urgent message to file descriptor 2, from any thread, around Python's streams."""
    erase_shown()
    with suppress(OSError):
        os.write(2, message.encode())


def is_terminal(stream: TextIO) -> bool:
    """Return True if the stream is a terminal that can erase a line."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def terminal_width(stream: TextIO) -> int:
    """Return the present number of columns of the terminal behind a stream, or 80 if unknown."""
    with suppress(OSError, ValueError):
        if columns := os.get_terminal_size(stream.fileno()).columns:
            return columns
    return shutil.get_terminal_size((80, 24)).columns
