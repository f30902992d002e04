"""Keep a run going when its standard output or standard error is lost."""

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

TEMPORARY_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EAGAIN)  # a later write may succeed


class TolerantStream:
    """A stream whose writes never raise, even if `tee` is killed or the log's disk is full.

    Text that cannot be written is dropped. A stream that has lost its reader is redirected to the
    null device, and the other stream reports that once.
    """

    def __init__(self, stream: TextIO, name: str):
        self._stream, self._name, self._is_lost = stream, name, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write the text, and return its length even if it was dropped."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        self._try(self._stream.flush)

    def discard_pending_text(self) -> None:
        """Drop buffered text that cannot be written, because Python would fail at exit."""
        try:
            self._stream.flush()
        except OSError:
            self._redirect_to_null()

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            if not self._is_lost and error.errno not in TEMPORARY_ERRORS:
                self._is_lost = True
                self._redirect_to_null()
                message = f"{self._name} is closed ({error.strerror}); continuing without it"
                other = sys.stderr if self._name == "stdout" else sys.stdout
                print(f"warning: {message}", file=other, flush=True)

    def _redirect_to_null(self) -> None:
        with suppress(OSError, ValueError):
            redirect_to_null(self._stream.fileno())
            self._stream.flush()


@contextmanager
def tolerate_lost_output() -> Iterator[None]:
    """Tolerate that standard output or standard error is lost, or closed from the start."""
    previous, streams = (sys.stdout, sys.stderr), []
    for descriptor, name, stream in ((1, "stdout", sys.stdout), (2, "stderr", sys.stderr)):
        try:
            os.fstat(descriptor)
        except OSError:  # closed, so the next file to be opened would receive the output
            redirect_to_null(descriptor)
        stream = stream or os.fdopen(descriptor, "w", closefd=False)
        streams.append(TolerantStream(stream, name))
    sys.stdout, sys.stderr = streams
    try:
        yield
    finally:
        for stream in streams:
            stream.discard_pending_text()
        sys.stdout, sys.stderr = previous


def redirect_to_null(*descriptors: int) -> None:
    """Discard everything that is written to these file descriptors from now on."""
    null = os.open(os.devnull, os.O_WRONLY)
    for descriptor in descriptors:
        os.dup2(null, descriptor)
    if null not in descriptors:
        os.close(null)
