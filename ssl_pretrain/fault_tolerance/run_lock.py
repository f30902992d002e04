"""Lock a run's folder, so that a second run stays out and a restarted run can take over."""

from __future__ import annotations

import errno
import math
import os
import sys
import threading
import time
import warnings
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.fault_tolerance import failure_note
from ssl_pretrain.fault_tolerance.lock_holder import FolderFlock, LockHolder, device_and_inode
from ssl_pretrain.system import durable_files, live_line
from ssl_pretrain.system.exit_status import USER_ERROR

TOUCH_SECONDS = 30.0  # interval between two touches of the lock
STALE_SECONDS = 180.0  # a lock of another machine is stale if it was not touched for this long
EMPTY_LOCK_SECONDS = 3.0  # longest time between creating a lock and writing its content
CLEANUP_SECONDS = 10.0  # longest time that the kernel takes to close a killed process's files
POLL_SECONDS = 0.5  # interval between two attempts to take the lock
# Errors of a file system without hard links.
NO_HARD_LINK_ERRORS = durable_files.UNSUPPORTED_ERRORS | {errno.EPERM, errno.EMLINK, errno.EXDEV}


class RunLock:
    """Lock of a run's folder, entered by every rank (`with RunLock(run): ...`) and held by rank 0.

    The lock is the file lock.json, which names its holder. It is created by a hard link or, on file
    systems without hard links, in exclusive mode. Where the file system supports it, the holder
    also has an flock on the folder. An flock ends with its process, so containers that share a host
    name but not process ids exclude each other.

    A stale lock is taken over. A lock is stale if its process has exited, or if it belongs to the
    same SLURM job, which was requeued. The lock of another machine or container is stale if it was
    not touched for three minutes, measured by the file system's clock. Entering waits until then.

    If an error ends the run, rank 0 leaves a note in the folder, which the next run there removes.

    Raises:
        ValueError: If another run holds the folder. The message names its process, machine and job.
        SaveError: If the disk is full or failing.
    """

    def __init__(self, run: Path):
        self.run, self.path = run, run / "lock.json"
        self._exit_event, self._last_check = threading.Event(), time.monotonic()
        self._check_lock = threading.Lock()
        self._flock = FolderFlock(run)
        self._this_process = LockHolder.this_process()

    def __enter__(self) -> RunLock:
        collectives.run_on_main(self._take)
        if process_group.is_main():
            failure_note.remove(self.run)
            threading.Thread(target=self._touch_regularly, daemon=True).start()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        self._exit_event.set()
        with self._check_lock:
            if process_group.is_main() and self._read_holder() == self._this_process:
                if isinstance(error, Exception):  # not Ctrl-C
                    failure_note.write(self.run, error)
                try:
                    self.path.unlink(missing_ok=True)
                except OSError as error:  # only a warning, which does not hide why the run ended
                    warnings.warn(
                        f"{self.path} could not be removed: {durable_files.describe_error(error)}. "
                        "Remove it if the next run is refused",
                        stacklevel=2,
                    )
            self._flock.release()

    def check(self) -> None:
        """Check that this run still holds the folder, unless the last check was recent.

        Call it before a step or a save. While this process was suspended or the file system did not
        answer, another run may have taken over.

        Raises:
            ValueError: If another run holds the lock.
        """
        is_check_due = time.monotonic() - self._last_check > TOUCH_SECONDS
        if process_group.is_main() and is_check_due and (problem := self._touch_or_restore()):
            raise ValueError(problem)

    def _take(self) -> None:
        """Take the lock, or raise an error with a message for the user."""
        candidate = self.path.with_name(f".lock-{os.getpid()}-{time.monotonic_ns()}")
        try:
            self.run.mkdir(parents=True, exist_ok=True)
            problem = self._wait_and_take(candidate)
        except OSError as error:
            self._flock.release()
            problem = (
                f"output: {self.run} cannot be written to: {durable_files.describe_error(error)}"
            )
            raise durable_files.failed_write_error(
                error, f"{problem}; give another output"
            ) from None
        finally:
            with suppress(OSError):
                candidate.unlink()
        if problem:
            self._flock.release()
            raise ValueError(problem)

    def _wait_and_take(self, candidate: Path) -> str | None:
        """Take the lock and return None, or return a message that names the run in the folder.

        Wait while the lock of another machine is neither touched nor stale.

        Args:
            candidate: Temporary file that becomes lock.json. Its modification time is the current
                time by the file system's clock.
        """
        first_touch, deadline = self._last_touch(), time.monotonic() + CLEANUP_SECONDS
        while True:
            if self._flock.try_take():
                self._this_process = replace(self._this_process, flock=self._flock.folder_id)
            candidate.write_text(self._this_process.to_json())
            if not self._flock.is_held_by_other and self._create(candidate):
                return None
            holder = self._read_holder()
            seconds_since_touch = candidate.stat().st_mtime - self._last_touch()
            is_stale = self._is_stale(holder, seconds_since_touch)
            # A suspended machine or container keeps its flock but still counts as silent. When it
            # wakes, `check` ends its run.
            is_on_other_host = holder is not None and not holder.is_on_same_host(self._this_process)
            is_excluded = self._flock.is_held_by_other and not is_on_other_host
            if is_excluded:  # a process of this machine has the flock, and may be closing its files
                is_requeued = holder is not None and holder.is_same_job(self._this_process)
                is_overdue = time.monotonic() > deadline
                if not is_stale or (is_overdue and not is_requeued):
                    return self._in_use_message(holder, seconds_since_touch)
                is_stale = is_overdue
            if is_stale:
                os.replace(candidate, self.path)
                return None
            if holder and not is_excluded:
                was_touched = self._last_touch() > first_touch
                if was_touched or holder.shares_process_ids(self._this_process):
                    return self._in_use_message(holder, seconds_since_touch)
            time.sleep(POLL_SECONDS)

    def _create(self, candidate: Path) -> bool:
        """Create lock.json unless it exists, and return True if it was created."""
        with suppress(FileExistsError):
            try:
                os.link(candidate, self.path)
            except OSError as error:
                if error.errno not in NO_HARD_LINK_ERRORS:
                    raise
                with self.path.open("x") as file:
                    file.write(candidate.read_text())
            return True
        return False

    def _in_use_message(self, holder: LockHolder | None, seconds_since_touch: float) -> str:
        """Return the message that another run holds the folder."""
        process = holder or f"an unknown process on {self._this_process.host}"
        job = f", SLURM job {holder.job}" if holder and holder.job else ""
        return (
            f"output: {self.run} is in use by {process}{job}, whose last sign of life was "
            f"{max(0, seconds_since_touch):.0f} s ago; give another output, or end that run"
        )

    def _last_touch(self) -> float:
        """Return the time at which the lock was last touched, by the file system's clock."""
        with suppress(FileNotFoundError):
            return self.path.stat().st_mtime
        return -math.inf

    def _is_stale(self, holder: LockHolder | None, seconds_since_touch: float) -> bool:
        if holder is None:
            return seconds_since_touch > EMPTY_LOCK_SECONDS
        if holder.is_same_job(self._this_process) or (
            self._flock.is_owner and self._shares_flock(holder)
        ):
            return True
        if holder.shares_process_ids(self._this_process):
            return holder.has_exited()
        return seconds_since_touch > STALE_SECONDS

    def _shares_flock(self, holder: LockHolder) -> bool:
        """Return True if this process and a living holder exclude each other by the flock."""
        return (holder.flock, holder.boot) == (self._flock.folder_id, self._this_process.boot)

    def _read_holder(self) -> LockHolder | None:
        with suppress(OSError):
            return LockHolder.from_json(self.path.read_bytes())
        return None

    def _touch_or_restore(self) -> str | None:
        """Touch the lock, or write it again if it was removed or damaged.

        Returns:
            A message if another run holds the lock, else None.
        """
        with self._check_lock:
            try:
                holder = LockHolder.from_json(self.path.read_bytes())
            except FileNotFoundError:
                return None if self._exit_event.is_set() else self._restore()
            except OSError:  # the file system does not answer, which is no sign of another run
                return None
            if holder is None:
                return self._restore()
            if holder != self._this_process:
                return self._takeover_message(holder)
            self._last_check = time.monotonic()
            with suppress(OSError):
                os.utime(self.path)
            return None

    def _restore(self) -> str | None:
        """Write the lock again. Return a message if another run holds it, else None."""
        print(
            f"warning: {self.path} was removed or damaged while this run holds its folder; "
            "writing it again",
            file=sys.stderr,
            flush=True,
        )
        with suppress(OSError):
            if device_and_inode(self.run) != self._flock.folder_id:  # a new folder has a new flock
                self._flock.release()
        with suppress(ValueError, OSError):  # the holder is compared below
            self._take()
        self._last_check = time.monotonic()
        holder = (
            self._read_holder()
        )  # None if the disk refuses the lock; that is no sign of another run
        return None if holder in (None, self._this_process) else self._takeover_message(holder)

    def _takeover_message(self, holder: LockHolder | None) -> str:
        return (
            f"output: {self.run} was taken over by {holder} while this run was silent; "
            "this run ends and writes nothing more"
        )

    def _touch_regularly(self) -> None:
        """Touch the lock at intervals, and end the process if another run took it over.

        An exception could not end the run, because the main thread may be waiting in a collective.
        """
        while not self._exit_event.wait(TOUCH_SECONDS):
            problem = self._touch_or_restore()
            if problem and not self._exit_event.is_set():
                live_line.write_to_stderr(f"error: {problem}\n")
                os._exit(USER_ERROR)


def find_holder(run: Path) -> LockHolder | None:
    """Return the process that currently trains in this folder, or None."""
    lock = RunLock(run)
    holder = lock._read_holder()
    if holder is None:
        return None
    is_free = lock._flock.take_and_release()
    if lock._flock.is_held_by_other:
        return holder
    if is_free and lock._shares_flock(holder):
        return None
    if holder.shares_process_ids(lock._this_process):
        return None if holder.has_exited() else holder
    return holder if time.time() - lock._last_touch() <= STALE_SECONDS else None
