"""The process that holds the lock of a run's folder, as lock.json describes it."""

from __future__ import annotations

import json
import os
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path


@dataclass(frozen=True)
class LockHolder:
    """Content of lock.json. Entries that an older version did not write have their defaults."""

    host: str = ""
    pid: int = -1
    born: str = ""  # start time of the process; process ids are reused, start times are not
    boot: str = ""  # id of the kernel's last boot
    namespace: str | None = None  # process ids of another container mean other processes
    flock: str = ""  # name of the folder's flock, if the process holds it
    job: str = ""  # SLURM job id

    @classmethod
    def this_process(cls) -> LockHolder:
        """Describe this process."""
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            born=start_time(os.getpid()),
            boot=_boot_id(),
            namespace=_pid_namespace(),
            job=os.environ.get("SLURM_JOB_ID", ""),
        )

    @classmethod
    def from_json(cls, text: bytes) -> LockHolder | None:
        """Read the content of lock.json. Return None if it is damaged."""
        try:
            content = json.loads(text)
        except ValueError:
            return None
        if not isinstance(content, dict):
            return None
        names = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in content.items() if key in names})

    def to_json(self) -> str:
        """Format the content of lock.json."""
        return json.dumps(asdict(self))

    def is_on_same_host(self, other: LockHolder) -> bool:
        """Return True if both processes run on one host that was not rebooted in between."""
        return (self.host, self.boot) == (other.host, other.boot)

    def is_on_this_host(self) -> bool:
        """Return True if the process runs on the host of the caller."""
        return self.is_on_same_host(LockHolder.this_process())

    def shares_process_ids(self, other: LockHolder) -> bool:
        """Return True if the process id of one is valid for the other."""
        same_namespace = self.namespace == other.namespace or None in (
            self.namespace,
            other.namespace,
        )
        return self.is_on_same_host(other) and same_namespace

    def is_same_job(self, other: LockHolder) -> bool:
        """Return True if both processes belong to one SLURM job, which was requeued in between."""
        return bool(self.job) and self.job == other.job

    def has_exited(self) -> bool:
        """Return True if this process of our process ids has ended."""
        return start_time(self.pid) != self.born

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def start_time(pid: int) -> str:
    """Return the start time of a process by the kernel's count, empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        pass
    try:
        os.kill(pid, 0)
    except (OSError, TypeError):
        return ""
    return "running"  # this system has no /proc


def _pid_namespace() -> str:
    with suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def _boot_id() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""
