"""Small files that survive a crash or a power cut, on file systems that may lack something."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

# Errors of a file system that does not implement a call. All others are real failures.
UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF}
# Errors of the disk rather than of the command. The same command may succeed later.
TROUBLE = {
    errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE, errno.ETIMEDOUT, errno.ENODEV, errno.ENXIO, errno.ENOTCONN,
}  # fmt: skip


class SaveError(OSError):
    """The disk refused a file of the run. Files written before are untouched."""


def is_trouble(error: BaseException) -> bool:
    """Return True if the disk is at fault (full, read-only, lost) rather than a path or a permission."""
    return isinstance(error, OSError) and error.errno in TROUBLE


def reason(error: OSError) -> str:
    """Return the system's description of the error, without the path."""
    return error.strerror or str(error)


def replace(path: Path, text: str) -> None:
    """Replace a file atomically, through a temporary file beside it that is fsynced and renamed.

    Raises:
        OSError: The old file is untouched and the temporary one is removed.
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
            raise OSError(
                error.errno, reason(error), str(path)
            ) from None  # a write's error has no name
        raise
    sync_folder(path.parent)


def append(path: Path, text: str) -> None:
    """Add text to the end of a file and fsync it.

    Raises:
        OSError: Nothing was added. A partial write is truncated, so no line is left half written.
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
    """Fsync a file or a folder by its path."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Fsync a folder, which makes the names in it durable. Do nothing on file systems that lack this call."""
    try:
        sync(path)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def allow_as_usual(path: Path, like: Path) -> None:
    """Copy the mode bits that the umask gave another file. For writers that always create 0600."""
    with suppress(OSError):  # a file system without modes
        path.chmod(like.stat().st_mode & 0o777)
