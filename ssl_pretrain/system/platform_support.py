"""Replacements for system calls that only some platforms have.

Linux has all of them. macOS and Windows are not tested.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from contextlib import suppress

# Flag of os.open. Without it, Windows converts the line ends of a file.
BINARY = getattr(os, "O_BINARY", 0)
# Flag of os.open. With it, opening a pipe does not wait for the pipe's writer.
NONBLOCK = getattr(os, "O_NONBLOCK", 0)
CAN_FORK_WORKERS = "forkserver" in multiprocessing.get_all_start_methods()
# Start method of the processes that read images.
START_METHOD = "forkserver" if CAN_FORK_WORKERS else "spawn"

_seek_lock = threading.Lock()


def available_signals(*names: str) -> tuple[signal.Signals, ...]:
    """Return the signals of these names that the platform has."""
    return tuple(getattr(signal, name) for name in names if hasattr(signal, name))


def process_exists(pid: int) -> bool:
    """Return True if a process of this user has the id."""
    if sys.platform == "win32":  # os.kill would end the process
        query_limited_information = 0x1000
        handle = ctypes.windll.kernel32.OpenProcess(query_limited_information, False, pid)
        if handle:
            ctypes.windll.kernel32.CloseHandle(handle)
        return bool(handle)
    with suppress(OSError, TypeError):
        os.kill(pid, 0)
        return True
    return False


def read_at(descriptor: int, num_bytes: int, offset: int) -> bytes:
    """Read bytes at an offset of an open file. Several threads may do so at once."""
    if hasattr(os, "pread"):
        return os.pread(descriptor, num_bytes, offset)
    with _seek_lock:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.read(descriptor, num_bytes)


def read_into(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Fill a buffer with the bytes at an offset of an open file, and return their number.

    Several threads may do so at once.
    """
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [buffer], offset)
    content = read_at(descriptor, len(buffer), offset)
    buffer[: len(content)] = content
    return len(content)


def available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
