"""Small files that survive a crash or a power cut, on file systems that may lack something."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

# How a file system says that it does not know the call. Everything else is a real failure.
UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF}
# Trouble of the disk and not of the command: starting again later may succeed.
TROUBLE = {
    errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE, errno.ETIMEDOUT, errno.ENODEV, errno.ENXIO, errno.ENOTCONN,
}  # fmt: skip


class SaveError(OSError):
    """The disk refused a file of the run. What was written before is untouched."""


def is_trouble(error: BaseException) -> bool:
    """Return True if the error is the disk's: full, read-only, lost. Not a wrong path or a missing right."""
    return isinstance(error, OSError) and error.errno in TROUBLE


def reason(error: OSError) -> str:
    """The system's own words for the error, without the path."""
    return error.strerror or str(error)


def replace(path: Path, text: str) -> None:
    """Write the whole file or leave the old one: a temporary file beside it, fsynced and renamed.

    Raises:
        OSError: the old file is untouched, and the temporary one is removed.
    """
    beside = path.with_name(f".{path.name}.part")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException as error:
        with suppress(OSError):
            beside.unlink()
        if isinstance(error, OSError):
            raise OSError(error.errno, reason(error), str(path)) from None  # a write's error has no name
        raise
    sync_folder(path.parent)


def append(path: Path, text: str) -> None:
    """Add text to the end of a file and fsync it. A failure takes back what got through, so that no line is left half written.

    Raises:
        OSError: the file ends where it ended before.
    """
    existed = path.exists()
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        end = os.fstat(descriptor).st_size
        try:
            rest = memoryview(text.encode())
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
        except BaseException:
            with suppress(OSError):
                os.ftruncate(descriptor, end)
            raise
    finally:
        os.close(descriptor)
    if not existed:
        sync_folder(path.parent)


def sync(path: Path) -> None:
    """Put a file's content on the disk for good."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Put a folder's names on the disk for good, where the file system can. Some network file systems refuse: EINVAL or ENOTSUP."""
    try:
        sync(path)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def allow_as_usual(path: Path, like: Path) -> None:
    """Give a file the mode that the umask gave another one. For writers that always make 0600."""
    with suppress(OSError):  # a file system without modes
        path.chmod(like.stat().st_mode & 0o777)
