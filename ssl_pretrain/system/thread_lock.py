"""A lock that lets one thread of a process train at a time."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()


@contextmanager
def refuse_concurrent_training() -> Iterator[None]:
    """Refuse to train in two threads at a time, which would share a random number generator.

    Raises:
        ValueError: If another thread of this process is training.
    """
    if not _lock.acquire(blocking=False):
        raise ValueError(
            "another thread of this process is training, and both would use the same random number "
            "generator; train one run after the other, or start each run in its own process"
        )
    try:
        yield
    finally:
        _lock.release()
