"""Keep a run going when its standard output or standard error is lost."""

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

TEMPORARY_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EAGAIN,
)  # may go away when the disk has room again


class LastingStream:
    """A stream that never raises, even after `tee` was killed or the log's disk is full.

    Lines that cannot be written are dropped. A stream without a reader is replaced by the null
    device, and the other stream reports that once.
    """

    def __init__(self, stream: TextIO, name: str):
        self._stream, self._name = stream, name
        self._closed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write the text without raising OSError, and return its length even if it was dropped."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush the stream without raising OSError."""
        self._try(self._stream.flush)

    def discard_unwritten(self) -> None:
        """Drop lines that cannot be written, because they would make Python fail at exit."""
        try:
            self._stream.flush()
        except OSError:
            self._redirect_to_null()

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            if not self._closed and error.errno not in TEMPORARY_ERRORS:
                self._close(error)

    def _close(self, error: OSError) -> None:
        self._closed = True
        self._redirect_to_null()
        other = sys.stderr if self._name == "stdout" else sys.stdout
        text = f"warning: {self._name} is closed ({error.strerror}); continuing without it"
        print(text, file=other, flush=True)

    def _redirect_to_null(self) -> None:
        with suppress(OSError, ValueError):
            _open_null_device(self._stream.fileno())
            self._stream.flush()


@contextmanager
def lasting_output() -> Iterator[None]:
    """Survive the loss of standard output and error, which may also be closed from the start."""
    previous, streams = (sys.stdout, sys.stderr), []
    for descriptor, name, stream in ((1, "stdout", sys.stdout), (2, "stderr", sys.stderr)):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file to be opened would receive the output
            _open_null_device(descriptor)
        stream = stream or os.fdopen(descriptor, "w", closefd=False)
        streams.append(LastingStream(stream, name))
    sys.stdout, sys.stderr = streams
    try:
        yield
    finally:
        for stream in streams:
            stream.discard_unwritten()
        sys.stdout, sys.stderr = previous


def _open_null_device(descriptor: int) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    if null != descriptor:
        os.dup2(null, descriptor)
        os.close(null)
