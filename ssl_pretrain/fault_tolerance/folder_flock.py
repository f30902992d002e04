"""An flock on a folder, which ends with its process however that ends."""

import errno
import fcntl
import os
from contextlib import suppress
from pathlib import Path


class FolderFlock:
    """An flock on a run's folder, which leaves no file behind.

    `held` and `refused` are the result of the last attempt. Both are false on a file system without
    flock for folders. `name` is the folder's device and inode, since two mounts of one network file
    system may have separate locks.
    """

    def __init__(self, folder: Path):
        self.folder, self.name = folder, ""
        self.held = self.refused = False
        self._descriptor: int | None = None

    def take(self) -> bool:
        """Try to take the flock without waiting, and return True if it is held."""
        if not self.held:
            self._try(fcntl.LOCK_EX)
        return self.held

    def take_and_release(self) -> bool:
        """Take the flock for a moment, shared, and return True if that was possible."""
        self._try(fcntl.LOCK_SH)
        free = self.held
        self.release()
        return free

    def release(self) -> None:
        """Release the flock if it is held."""
        self._close()
        self.held = False

    def _try(self, kind: int) -> None:
        self.refused = False
        try:
            descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            self.refused = error.errno in (errno.EWOULDBLOCK, errno.EACCES)
            return
        self.held, self.name, self._descriptor = True, device_and_inode(descriptor), descriptor
        if kind == fcntl.LOCK_EX:  # a worker that outlives the run must not hold the folder
            os.register_at_fork(after_in_child=self._close)

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with suppress(OSError):
                os.close(descriptor)


def device_and_inode(file: int | Path) -> str:
    """Identify a file or folder, given its path or descriptor, as this machine mounts it."""
    status = os.stat(file)
    return f"{status.st_dev}:{status.st_ino}"
