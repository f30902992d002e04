"""Write small files that survive a crash or a power cut, and verify files by their SHA-256.

File systems that cannot fsync a folder or set a file's mode are tolerated.
"""

import errno
import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from ssl_pretrain.system.platform_support import BINARY

# Errors of a file system that does not support a call. All other errors are real failures.
UNSUPPORTED_ERRORS = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF}
# Errors of the disk rather than of the command. The same command may succeed later.
DISK_FAILURES = {
    *(errno.ENOSPC, errno.EDQUOT),
    *(errno.EIO, errno.EROFS, errno.ENODEV, errno.ENXIO),
    *(errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN),
}


_CAN_OPEN_FOLDERS = hasattr(os, "O_DIRECTORY")
# Windows only syncs files that are open for writing.
_SYNC_FLAGS = os.O_RDONLY if _CAN_OPEN_FOLDERS else os.O_RDWR | BINARY


class SaveError(OSError):
    """A file of the run cannot be written to disk. Files written earlier are unchanged."""


def is_disk_failure(error: BaseException) -> bool:
    """Return True if the disk is full, read-only or lost, and False for a wrong path."""
    return isinstance(error, OSError) and error.errno in DISK_FAILURES


def failed_write_error(error: OSError, message: str) -> SaveError | ValueError:
    """Return the error to raise for a failed write, SaveError if the disk may recover."""
    may_recover = is_disk_failure(error) and error.errno != errno.EROFS
    return SaveError(message) if may_recover else ValueError(message)


def describe_error(error: OSError) -> str:
    """Return the system's description of an error, without the path."""
    return error.strerror or str(error)


def replace(path: Path, text: str) -> None:
    """Replace a file atomically by renaming an fsynced temporary file in the same folder.

    Raises:
        OSError: If the file cannot be written. The old file is then unchanged.
    """
    replace_by_writing(path, lambda file: file.write(text.encode()))


def replace_by_writing(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replace a file atomically by one that a function writes.

    Args:
        path: File to replace or create.
        write: Function that writes the content to an open temporary file in the same folder. The
            file is fsynced and renamed afterwards.

    Raises:
        OSError: If the file cannot be written. The old file is then unchanged.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("w+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):  # the original error may not name the file
            raise OSError(error.errno, describe_error(error), str(path)) from None
        raise
    sync_folder(path.parent)


def append(path: Path, text: str) -> None:
    """Append text to a file and fsync the file.

    Raises:
        OSError: If the text cannot be written. A partial write is undone.
    """
    is_new = not path.exists()
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | BINARY, 0o666)
    try:
        old_size = os.fstat(descriptor).st_size
        try:
            remaining = memoryview(text.encode())
            while remaining:
                remaining = remaining[os.write(descriptor, remaining) :]
            os.fsync(descriptor)
        except BaseException:
            with suppress(OSError):
                os.ftruncate(descriptor, old_size)
            raise
    finally:
        os.close(descriptor)
    if is_new:
        sync_folder(path.parent)


def sync(path: Path) -> None:
    """Fsync a file or a folder."""
    descriptor = os.open(path, _SYNC_FLAGS)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Make the entries of a folder durable, if the platform and file system support that."""
    if not _CAN_OPEN_FOLDERS:
        return
    try:
        sync(path)
    except OSError as error:
        if error.errno not in UNSUPPORTED_ERRORS:
            raise


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def copy_permissions(source: Path, target: Path) -> None:
    """Copy the permissions of `source` to `target`, such as a file created with mode 0600."""
    with suppress(OSError):  # some file systems have no modes
        target.chmod(source.stat().st_mode & 0o777)
