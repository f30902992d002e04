"""Keep freed memory in the process, so that the next step can use it at once.

By default glibc returns large blocks to the system as soon as they are freed. A training step on a
CPU frees all its activations, and the next step would have the system clear the same pages again,
which takes a fifth of a small network's time.
"""

import ctypes
import sys
from contextlib import suppress

# Parameters of mallopt, from malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_DEFAULT_TRIM_THRESHOLD, _DEFAULT_TOP_PAD, _DEFAULT_MMAP_MAX = 128 * 1024, 128 * 1024, 65_536
_TOP_PAD_BYTES = 64 * 2**20  # the heap grows by this much at a time


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory in this process. Return False on other C libraries.

    All blocks then come from the heap, and the heap never shrinks.
    """
    return _set_options(_TOP_PAD_BYTES, trim_threshold=-1, mmap_max=0)


def release_freed_memory() -> bool:
    """Return freed memory to the system, now and in the future, as glibc does by default."""
    is_set = _set_options(_DEFAULT_TOP_PAD, _DEFAULT_TRIM_THRESHOLD, _DEFAULT_MMAP_MAX)
    trim()
    return is_set


def trim() -> None:
    """Return the memory that is free now to the system, if the C library is glibc."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _set_options(top_pad: int, trim_threshold: int, mmap_max: int) -> bool:
    if sys.platform != "linux":
        return False
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018  # musl has a mallopt that does nothing
    except (OSError, AttributeError):
        return False
    options = {_M_MMAP_MAX: mmap_max, _M_TRIM_THRESHOLD: trim_threshold, _M_TOP_PAD: top_pad}
    return all(library.mallopt(option, value) for option, value in options.items())
