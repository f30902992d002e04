"""The lock of a run's folder: it keeps a second run out and lets a requeued or restarted one take over."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import socket
import sys
import threading
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.system import durable_files

BEAT_SECONDS = 30.0
STALE_SECONDS = 180.0  # a lock of another machine that was not touched for so long is stale
UNREADABLE_SECONDS = 3.0  # a lock is empty for a moment, between its creation and its content
DYING_SECONDS = 10.0  # longest time the kernel takes to close the files of a killed process
# Errors of a file system without hard links.
NO_LINKS = durable_files.UNSUPPORTED | {errno.EPERM, errno.EMLINK, errno.EXDEV}
MISTAKE = 2  # exit status, as for a folder that is in use at the start


class Lock:
    """Lock of a run's folder, entered by every rank (`with Lock(run): ...`) and held by rank 0.

    The lock is the file lock.json, which names its holder. It is created by a hard link or, on file
    systems without them, by an exclusive creation. The folder is also held by flock where the file
    system has it. An flock ends with its process, so containers that share a host name but not
    process ids exclude each other.

    A stale lock is taken over. It is stale if its process has exited, or if it belongs to this very
    SLURM job, which was requeued. The lock of another machine or container is stale once it was not
    touched for three minutes by the file system's own clock, which `with` waits for.

    Raises:
        ValueError: Another run has the folder. Names its process, machine and job.
        SaveError: The disk is full or failing.
    """

    def __init__(self, run: Path):
        self.run, self.path = run, run / "lock.json"
        self._ended, self._checked = threading.Event(), time.monotonic()
        self._checking = threading.Lock()
        self._flock = _Flock(run)
        self._own = {
            "host": socket.gethostname(), "pid": os.getpid(), "born": _born(os.getpid()), "boot": _boot(),
            "namespace": _namespace(), "flock": "", "job": os.environ.get("SLURM_JOB_ID", ""),
        }  # fmt: skip

    def __enter__(self) -> Lock:
        problem = self._take() if process_group.is_main() else None
        problem = collectives.broadcast_object(problem)
        if problem:
            raise problem
        if process_group.is_main():
            threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._ended.set()
        with self._checking:
            if process_group.is_main() and self._holder() == self._own:
                try:
                    self.path.unlink(missing_ok=True)
                except OSError as error:  # must not hide why the run ended
                    warnings.warn(
                        f"{self.path} could not be removed: {durable_files.reason(error)}",
                        stacklevel=2,
                    )
            self._flock.release()

    def _take(self) -> Exception | None:
        """Take the lock. Return None, or the error for the user."""
        mine = self.path.with_name(f".lock-{os.getpid()}-{time.monotonic_ns()}")
        try:
            self.run.mkdir(parents=True, exist_ok=True)
            problem = self._wait_and_take(mine)
        except OSError as error:
            self._flock.release()
            text = f"output: {self.run} cannot be written to: {durable_files.reason(error)}; give another output"
            if durable_files.is_trouble(error) and error.errno != errno.EROFS:
                return durable_files.SaveError(text)
            return ValueError(text)
        finally:
            with suppress(OSError):
                mine.unlink()
        if problem:
            self._flock.release()
            return ValueError(problem)
        return None

    def _wait_and_take(self, mine: Path) -> str | None:
        """Take the lock. Return None, or a message that names the run that has the folder.

        A lock of another machine is watched until it is touched or becomes stale.

        Args:
            mine: A temporary file beside lock.json that is renamed to it. Its modification time
                gives the time by the file system's clock.
        """
        first_heard, end = self._heard(), time.monotonic() + DYING_SECONDS
        while True:
            if self._flock.take():
                self._own["flock"] = self._flock.name
            mine.write_text(json.dumps(self._own))
            if not self._flock.refused and self._create(mine):
                return None
            holder, silence = (
                self._holder(),
                mine.stat().st_mtime - self._heard(),
            )  # one clock, whatever the machines' say
            stale = self._stale(holder, silence)
            # A suspended machine or container keeps its flock. Its silence counts, and it ends when it wakes (`check`).
            elsewhere = holder is not None and not _is_same_host(holder, self._own)
            if (
                self._flock.refused and not elsewhere
            ):  # by a process of this machine, which may be closing its files
                requeued = holder is not None and self._is_same_job(holder)
                if not stale or (time.monotonic() > end and not requeued):
                    return self._in_use(holder, silence)
                stale = time.monotonic() > end
            if stale:
                os.replace(mine, self.path)
                return None
            if (
                holder
                and (elsewhere or not self._flock.refused)
                and (self._is_here(holder) or self._heard() > first_heard)
            ):
                return self._in_use(holder, silence)
            time.sleep(0.5)

    def _create(self, mine: Path) -> bool:
        """Create lock.json unless it exists, by a hard link to `mine` or, without links, by exclusive creation."""
        try:
            os.link(mine, self.path)
            return True
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
        try:
            with self.path.open("x") as file:
                file.write(mine.read_text())
            return True
        except FileExistsError:
            return False

    def _in_use(self, holder: dict[str, Any] | None, silence: float) -> str:
        found = holder or {"pid": "unknown", "host": self._own["host"]}
        job = f", SLURM job {found['job']}" if found.get("job") else ""
        return (
            f"output: {self.run} is in use by process {found.get('pid')} on {found.get('host')}{job}, "
            f"heard of {max(0, silence):.0f} s ago; give another output, or end that run"
        )

    def _heard(self) -> float:
        with suppress(FileNotFoundError):  # it has just ended
            return self.path.stat().st_mtime
        return -math.inf

    def _is_here(self, holder: dict[str, Any]) -> bool:
        """Return True if the holder's process id is valid here: same host, same boot, same PID namespace."""
        return (
            _is_same_host(holder, self._own)
            and holder.get("namespace", self._own["namespace"]) == self._own["namespace"]
        )

    def _is_same_job(self, holder: dict[str, Any]) -> bool:
        return bool(holder.get("job")) and holder["job"] == self._own["job"]

    def _stale(self, holder: dict[str, Any] | None, silence: float) -> bool:
        if holder is None:
            return silence > UNREADABLE_SECONDS
        if self._is_same_job(holder):
            return True
        if (
            self._flock.held
            and holder.get("flock") == self._flock.name
            and holder.get("boot") == self._own["boot"]
        ):
            return True  # its flock would have kept us from ours
        if self._is_here(holder):
            return _born(holder.get("pid", -1)) != holder.get("born")
        return silence > STALE_SECONDS

    def _holder(self) -> dict[str, Any] | None:
        try:
            content = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return None
        return content if isinstance(content, dict) else None

    def check(self) -> None:
        """Check before a step or a save, after a silence, that this run still holds the folder.

        While a process was suspended or the file system did not answer, another run may have taken over.

        Raises:
            ValueError: Another run holds the lock.
        """
        if process_group.is_main() and time.monotonic() - self._checked > BEAT_SECONDS:
            problem = self._lost()
            if problem:
                raise ValueError(problem)

    def _lost(self) -> str | None:
        """Return a message if another run holds the lock, else None. A lock that was removed is written again."""
        with self._checking:
            try:
                text = self.path.read_text()
            except FileNotFoundError:
                return None if self._ended.is_set() else self._take_again()
            except OSError:  # the file system does not answer, which is no sign of another run
                return None
            with suppress(ValueError):
                found = json.loads(text)
                if found != self._own:
                    return _taken_over(self.run, found)
                self._checked = time.monotonic()
                with suppress(OSError):
                    os.utime(self.path)
                return None
            return self._take_again()  # damaged

    def _take_again(self) -> str | None:
        print(
            f"warning: {self.path} was removed while this run holds its folder; written again",
            file=sys.stderr,
            flush=True,
        )
        with suppress(OSError):
            entry = self.run.stat()
            if f"{entry.st_dev}:{entry.st_ino}" != self._flock.name:  # a new folder has a new flock
                self._flock.release()
        self._take()
        self._checked = time.monotonic()
        found = self._holder()  # a disk that refuses the lock is no other run
        return None if found in (None, self._own) else _taken_over(self.run, found)

    def _beat(self) -> None:
        """Touch the lock regularly, and end the process if another run took it over.

        The main thread may be waiting in a collective, so an exception would not be seen.
        """
        while not self._ended.wait(BEAT_SECONDS):
            problem = self._lost()
            if problem and not self._ended.is_set():
                with suppress(OSError):
                    os.write(2, f"error: {problem}\n".encode())
                os._exit(MISTAKE)


def _taken_over(run: Path, found: Any) -> str:
    named = found if isinstance(found, dict) else {}
    return (
        f"output: {run} was taken over by process {named.get('pid')} on {named.get('host')} while this run was silent; "
        "this one ends and writes nothing more"
    )


class _Flock:
    """An flock on a run's folder, which leaves no file behind and ends with its process, however that ends.

    `held` and `refused` are the result of the last attempt. Both are false on a file system without
    flock for folders. `name` is the folder's device and inode, since two mounts of one network file
    system may have separate locks.
    """

    def __init__(self, run: Path):
        self.run, self.name = run, ""
        self.held = self.refused = False
        self._descriptor: int | None = None

    def take(self) -> bool:
        """Try to take it without waiting, and return True if it is held."""
        if not self.held:
            self._try(fcntl.LOCK_EX)
        return self.held

    def is_free(self) -> bool:
        """Return True if nobody has it. It is taken for a moment to find out."""
        self._try(fcntl.LOCK_SH)
        free = self.held
        self.release()
        return free

    def _try(self, kind: int) -> None:
        self.refused = False
        try:
            descriptor = os.open(self.run, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            self.refused = error.errno in (errno.EWOULDBLOCK, errno.EACCES)
            return
        entry = os.fstat(descriptor)
        self.held, self.name, self._descriptor = True, f"{entry.st_dev}:{entry.st_ino}", descriptor
        if kind == fcntl.LOCK_EX:
            os.register_at_fork(
                after_in_child=self._forget
            )  # a worker that outlives the run must not hold it

    def release(self) -> None:
        self._forget()
        self.held = False

    def _forget(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with suppress(OSError):
                os.close(descriptor)


def holder(run: Path) -> dict[str, Any] | None:
    """Return the lock of the run that trains in this folder now, None if there is none.

    Its entry `here` is True if that run is on this machine.
    """
    lock = Lock(run)
    found = lock._holder()
    if found is None:
        return None
    free = lock._flock.is_free()
    try:
        if lock._flock.refused:
            alive = True
        elif (
            free
            and found.get("flock") == lock._flock.name
            and found.get("boot") == lock._own["boot"]
        ):
            alive = False
        elif lock._is_here(found):
            alive = _born(found.get("pid", -1)) == found.get("born")
        else:
            alive = time.time() - lock.path.stat().st_mtime <= STALE_SECONDS
    except OSError:
        return None  # it ended meanwhile
    return found | {"here": _is_same_host(found, lock._own)} if alive else None


def _is_same_host(holder: dict[str, Any], own: dict[str, Any]) -> bool:
    return holder.get("host") == own["host"] and holder.get("boot") == own["boot"]


def _namespace() -> str:
    """The PID namespace: process ids of another container are not ours, though host name and kernel are."""
    with suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def _born(pid: int) -> str:
    """Return the start time of a process by the kernel's count, empty if it has ended. Pids are reused, start times are not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        pass
    try:
        os.kill(pid, 0)
    except (OSError, TypeError):
        return ""
    return "running"  # no /proc here


def _boot() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""
