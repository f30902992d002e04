"""Small files that survive a crash or a power cut, on file systems that lack some features."""

import errno
import os
from contextlib import suppress
from pathlib import Path

# Errors of a file system that does not support a call. All others are real failures.
UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF}
# Errors of the disk rather than of the command. The same command may succeed later.
DISK_FAILURES = {
    *(errno.ENOSPC, errno.EDQUOT),
    *(errno.EIO, errno.EROFS, errno.ENODEV, errno.ENXIO),
    *(errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN),
}


class SaveError(OSError):
    """The disk refused a file of the run. Files written before are untouched."""


def is_disk_failure(error: BaseException) -> bool:
    """Return True if the disk is full, read-only or lost, and False for a wrong path."""
    return isinstance(error, OSError) and error.errno in DISK_FAILURES


def save_error(error: OSError, message: str) -> SaveError | ValueError:
    """Return a SaveError if the disk failed in a way that may pass, else a ValueError."""
    may_pass = is_disk_failure(error) and error.errno != errno.EROFS
    return SaveError(message) if may_pass else ValueError(message)


def reason(error: OSError) -> str:
    """Return the system's description of the error, without the path."""
    return error.strerror or str(error)


def replace(path: Path, text: str) -> None:
    """Replace a file atomically, through a temporary file beside it that is fsynced and renamed.

    Raises:
        OSError: If the file cannot be written. The old one is then untouched.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):  # the error of a write does not name the file
            raise OSError(error.errno, reason(error), str(path)) from None
        raise
    sync_folder(path.parent)


def append(path: Path, text: str) -> None:
    """Add text to the end of a file and fsync it.

    Raises:
        OSError: If the text cannot be written. A partial write is undone.
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
    """Make the names in a folder durable, where the file system supports that."""
    try:
        sync(path)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def copy_mode(source: Path, target: Path) -> None:
    """Copy the permissions of a file to one whose writer ignores the umask and sets 0600."""
    with suppress(OSError):  # a file system without modes
        target.chmod(source.stat().st_mode & 0o777)
