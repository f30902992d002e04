"""One run folder, one run: a lock file that a second run respects and a requeued or restarted one takes over."""

from __future__ import annotations

import json
import math
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from ssl_pretrain import distributed

BEAT_SECONDS = 30.0
STALE_SECONDS = 180.0  # of silence from another machine


class Lock:
    """Held by rank 0 while the run lasts: `with Lock(run): ...` on every rank.

    A lock is stale, and taken over, if its process has gone from this machine, if it is of this very SLURM job (requeued),
    or if another machine has not touched it for three minutes by the file system's own clock; that is waited for.

    Raises:
        ValueError: another run has the folder; names its process, machine and job.
    """

    def __init__(self, run: Path):
        self.run, self.path = run, run / "lock.json"
        self._ended = threading.Event()
        self._own = {
            "host": socket.gethostname(), "pid": os.getpid(), "born": _born(os.getpid()), "boot": _boot(),
            "job": os.environ.get("SLURM_JOB_ID", ""),
        }  # fmt: skip

    def __enter__(self) -> Lock:
        problem = self._take() if distributed.is_main() else None
        problem = distributed.broadcast_object(problem)
        if problem:
            raise ValueError(problem)
        if distributed.is_main():
            threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._ended.set()
        if distributed.is_main() and self._holder() == self._own:
            self.path.unlink(missing_ok=True)

    def _take(self) -> str | None:
        """None once it is ours, else what to tell the user."""
        mine = self.path.with_name(f".lock-{os.getpid()}-{time.monotonic_ns()}")
        try:
            self.run.mkdir(parents=True, exist_ok=True)
            mine.write_text(json.dumps(self._own))
        except OSError as error:
            return f"output: {self.run} cannot be written to: {error.strerror or error}; give another output"
        try:
            os.link(mine, self.path)  # as O_EXCL, with the content already there
            return None
        except FileExistsError:
            problem = self._held(mine)
            if problem is None:
                os.replace(mine, self.path)
            return problem
        finally:
            mine.unlink(missing_ok=True)

    def _held(self, mine: Path) -> str | None:
        """Who has the folder; None where its lock is stale. Another machine's is waited for, until it is heard of or too long silent."""
        first_heard = self._heard()
        while True:
            os.utime(mine)
            holder, silence = self._holder(), mine.stat().st_mtime - self._heard()  # one clock, whatever the machines' say
            if holder is None or self._stale(holder, silence):
                return None
            if self._is_here(holder) or self._heard() > first_heard:
                job = f", SLURM job {holder['job']}" if holder.get("job") else ""
                return (
                    f"output: {self.run} is in use by process {holder.get('pid')} on {holder.get('host')}{job}, "
                    f"heard of {max(0, silence):.0f} s ago; give another output, or end that run"
                )
            time.sleep(0.5)

    def _heard(self) -> float:
        with suppress(FileNotFoundError):  # it has just ended
            return self.path.stat().st_mtime
        return -math.inf

    def _is_here(self, holder: dict[str, Any]) -> bool:
        return holder.get("host") == self._own["host"] and holder.get("boot") == self._own["boot"]

    def _stale(self, holder: dict[str, Any], silence: float) -> bool:
        if holder.get("job") and holder["job"] == self._own["job"]:
            return True
        if self._is_here(holder):
            return _born(holder.get("pid", -1)) != holder.get("born")
        return silence > STALE_SECONDS

    def _holder(self) -> dict[str, Any] | None:
        try:
            return json.loads(self.path.read_text())
        except (OSError, ValueError):
            return None

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with suppress(OSError):
                os.utime(self.path)


def holder(run: Path) -> dict[str, Any] | None:
    """Who trains in this folder now: host, pid, job, and `here`, whether that is this machine; None where nobody does."""
    lock = Lock(run)
    found = lock._holder()
    if found is None:
        return None
    here = found.get("host") == lock._own["host"] and found.get("boot") == lock._own["boot"]
    try:
        alive = _born(found.get("pid", -1)) == found.get("born") if here else time.time() - lock.path.stat().st_mtime <= STALE_SECONDS
    except OSError:
        return None  # it ended meanwhile
    return found | {"here": here} if alive else None


def _born(pid: int) -> str:
    """When the process started, by the kernel's count; empty where it has gone. Numbers are given again, births are not."""
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
