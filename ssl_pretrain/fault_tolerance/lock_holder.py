"""The lock of a run's folder, made of an flock and a description of the process in lock.json."""

from __future__ import annotations

import errno
import json
import os
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ssl_pretrain.system.platform_support import process_exists

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@dataclass(frozen=True)
class LockHolder:
    """Content of lock.json. Entries missing from an older version's file keep their defaults."""

    host: str = ""
    pid: int = -1
    born: str = ""  # start time of the process, because process ids are reused
    boot: str = ""  # id of the current boot of the kernel
    namespace: str | None = None  # namespace of the process id, such as that of a container
    flock: str = ""  # device and inode of the folder, if the process has its flock
    job: str = ""  # SLURM job id

    @classmethod
    def this_process(cls) -> LockHolder:
        """Return the description of this process."""
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            born=process_start_time(os.getpid()),
            boot=_boot_id(),
            namespace=_pid_namespace(),
            job=os.environ.get("SLURM_JOB_ID", ""),
        )

    @classmethod
    def from_json(cls, data: bytes) -> LockHolder | None:
        """Parse the content of lock.json. Return None if it is damaged."""
        with suppress(ValueError):
            content = json.loads(data)
            if isinstance(content, dict):
                names = {field.name for field in fields(cls)}
                return cls(**{key: value for key, value in content.items() if key in names})
        return None

    def to_json(self) -> str:
        """Format the content of lock.json."""
        return json.dumps(asdict(self))

    def is_on_same_host(self, other: LockHolder) -> bool:
        """Return True if both processes run on the same host, with no reboot in between."""
        return (self.host, self.boot) == (other.host, other.boot)

    def is_on_this_host(self) -> bool:
        """Return True if the process runs on the host of the caller."""
        return self.is_on_same_host(LockHolder.this_process())

    def shares_process_ids(self, other: LockHolder) -> bool:
        """Return True if a process id means the same process to both."""
        namespaces = {self.namespace, other.namespace}
        return self.is_on_same_host(other) and (len(namespaces) == 1 or None in namespaces)

    def is_same_job(self, other: LockHolder) -> bool:
        """Return True if both processes belong to the same SLURM job, such as after a requeue."""
        return bool(self.job) and self.job == other.job

    def has_exited(self) -> bool:
        """Return True if the process has ended. The process id must be valid for the caller."""
        return process_start_time(self.pid) != self.born

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def process_start_time(pid: int) -> str:
    """Return the start time of a process in the kernel's clock ticks, or "" if it has ended."""
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return "running" if process_exists(pid) else ""  # a platform without /proc


def _pid_namespace() -> str:
    with suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def _boot_id() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


class FolderFlock:
    """An flock on a run's folder. It needs no file and is released when its process ends.

    Attributes:
        is_owner: True while this process has the flock.
        is_held_by_other: True if another process had the flock at the last attempt. Both are False
            on a platform or file system without flock for folders.
        folder_id: Device and inode of the folder. They differ between two mounts of one network
            file system, which may have separate locks.
    """

    def __init__(self, folder: Path):
        self.folder, self.folder_id = folder, ""
        self.is_owner = self.is_held_by_other = False
        self._descriptor: int | None = None

    def try_take(self) -> bool:
        """Try to take the flock without waiting, and return True if this process has it."""
        if not self.is_owner:
            self._try_flock(exclusive=True)
        return self.is_owner

    def take_and_release(self) -> bool:
        """Try to take a shared flock, release it, and return True if the attempt succeeded."""
        self._try_flock(exclusive=False)
        was_free = self.is_owner
        self.release()
        return was_free

    def release(self) -> None:
        """Release the flock if it is held."""
        self._close()
        self.is_owner = False

    def _try_flock(self, exclusive: bool) -> None:
        self.is_held_by_other = False
        if fcntl is None:
            return
        try:
            descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            return
        try:
            operation = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
            fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            self.is_held_by_other = error.errno in (errno.EWOULDBLOCK, errno.EACCES)
            return
        self.is_owner, self.folder_id, self._descriptor = (
            True,
            device_and_inode(descriptor),
            descriptor,
        )
        if exclusive:  # a worker that outlives the run must not keep the flock
            os.register_at_fork(after_in_child=self._close)

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with suppress(OSError):
                os.close(descriptor)


def device_and_inode(file: int | Path) -> str:
    """Return this machine's identifier of a file or folder, given by its path or descriptor."""
    status = os.stat(file)
    return f"{status.st_dev}:{status.st_ino}"
