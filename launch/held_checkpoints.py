"""Folders of hard links that keep a checkpoint whole while it is evaluated, and what a killed evaluation left of them."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

OWNER = "owner.json"
BEAT_SECONDS = 30.0
STALE_SECONDS = 180.0  # without a sign of life from a process that cannot be looked at from here


@contextmanager
def claim(folder: Path) -> Iterator[Path]:
    """A new folder below `folder` for this process, removed at the end.

    It is touched now and then, so that another machine can tell it from one whose process has died.
    """
    release_abandoned(folder)
    own = folder / f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    own.mkdir(parents=True)
    (own / OWNER).write_text(json.dumps(_this_process()))
    ended = threading.Event()
    beat = threading.Thread(target=_beat, args=(own / OWNER, ended), daemon=True)
    beat.start()
    try:
        yield own
    finally:
        ended.set()
        beat.join()
        _remove(own)


def release_abandoned(folder: Path) -> None:
    """Remove the folders below `folder` whose process has ended without doing so."""
    if not folder.is_dir():
        return
    now = _clock_of(folder)
    for own in folder.iterdir():
        with suppress(OSError):  # its process removes it at this moment
            if own.is_dir() and _is_abandoned(own, now):
                _remove(own)


def _remove(own: Path) -> None:
    shutil.rmtree(own, ignore_errors=True)
    with suppress(OSError):
        own.parent.rmdir()  # once it is empty


def _is_abandoned(own: Path, now: float) -> bool:
    """Return True if the folder's process has ended or has given no sign of life for three minutes."""
    try:
        owner: dict[str, Any] = json.loads((own / OWNER).read_text())
        touched = (own / OWNER).stat().st_mtime
    except (OSError, ValueError):  # of an earlier version, or just being made
        owner, touched = {}, own.stat().st_mtime
    here = _this_process()
    if owner.get("birth") and all(
        owner.get(key) == here[key] for key in ("host", "boot", "namespace")
    ):
        return _birth(owner.get("pid", -1)) != owner.get("birth")
    return now - touched > STALE_SECONDS


def _clock_of(folder: Path) -> float:
    """Time by the file system's own clock, whatever this machine's says."""
    probe = folder / f".clock-{uuid.uuid4().hex[:8]}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        with suppress(OSError):
            probe.unlink()


def _beat(path: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT_SECONDS):
        with suppress(OSError):
            os.utime(path)


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "boot": _read("/proc/sys/kernel/random/boot_id"),
        "namespace": _link("/proc/self/ns/pid"),
        "pid": os.getpid(),
        "birth": _birth(os.getpid()),
    }


def _birth(pid: int) -> str:
    """Start time of a process by the kernel's count, empty if it has ended. Pids are reused, births are not."""
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 and fields[0] not in ("Z", "X") else ""


def _read(path: str) -> str:
    with suppress(OSError):
        return Path(path).read_text().strip()
    return ""


def _link(path: str) -> str:
    with suppress(OSError):
        return os.readlink(path)
    return ""
