"""Hard links that keep a checkpoint intact during its evaluation if the training prunes it.

Each evaluating process has its own folder for its links. A killed process leaves its folder behind,
and the next evaluation of the run removes it.
"""

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

from ssl_pretrain.checkpoint.manifest import MANIFEST
from ssl_pretrain.fault_tolerance.lock_holder import LockHolder

OWNER = "owner.json"
HEARTBEAT_SECONDS = 30.0
# A process on another host counts as ended if its last heartbeat is older.
STALE_SECONDS = 180.0


@contextmanager
def hold(path: Path, parent: Path) -> Iterator[Path | None]:
    """Yield the checkpoint as hard links, or None if the training has pruned it.

    On a file system without hard links, yield the checkpoint itself. A heartbeat in the folder of
    the links tells other machines that this process is still running.

    Args:
        path: The checkpoint.
        parent: Folder for the links of all processes.
    """
    release_abandoned(parent)
    folder = parent / f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    folder.mkdir(parents=True)
    (folder / OWNER).write_text(LockHolder.this_process().to_json())
    ended = threading.Event()
    heartbeat = threading.Thread(target=_send_heartbeats, args=(folder / OWNER, ended), daemon=True)
    heartbeat.start()
    try:
        yield link(path, folder / path.name)
    finally:
        ended.set()
        heartbeat.join()
        _remove(folder)


def link(path: Path, target: Path) -> Path | None:
    """Fill the folder `target` with hard links to all files of a checkpoint.

    Returns:
        The target, or None if the checkpoint was pruned before all files were linked. If the
        checkpoint cannot be linked or is damaged, it is returned itself. The evaluation reports any
        damage.
    """
    target.mkdir(parents=True, exist_ok=True)
    try:
        for file in sorted(path.rglob("*")):  # a folder comes before its files
            copy = target / file.relative_to(path)
            if file.is_dir():
                copy.mkdir(exist_ok=True)
            else:
                os.link(file, copy)
        files = json.loads((target / MANIFEST).read_text())["files"]
        return target if all((target / name).exists() for name in files) else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError):
        return path if path.exists() else None


def release_abandoned(parent: Path) -> None:
    """Remove the folders below `parent` whose process has ended without removing its own."""
    if not parent.is_dir():
        return
    now = _file_system_time(parent)
    for folder in parent.iterdir():
        with suppress(OSError):  # its process may be removing it
            if folder.is_dir() and _is_abandoned(folder, now):
                _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a process's folder, and the parent once it is empty."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        folder.parent.rmdir()


def _is_abandoned(folder: Path, now: float) -> bool:
    """Return True if the folder's process has ended, or sent no heartbeat for three minutes."""
    try:
        owner = LockHolder.from_json((folder / OWNER).read_bytes())
        heartbeat = (folder / OWNER).stat().st_mtime
    except OSError:  # its process has not written the owner yet
        owner, heartbeat = None, folder.stat().st_mtime
    if owner and owner.born and owner.shares_process_ids(LockHolder.this_process()):
        return owner.has_exited() or _is_zombie(owner.pid)
    return now - heartbeat > STALE_SECONDS


def _is_zombie(pid: int) -> bool:
    """Return True if the process has ended, but its parent has not collected its exit status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("Z", "X")
    except OSError:
        return False


def _file_system_time(folder: Path) -> float:
    """Return the time by the file system's clock, which may differ from this machine's."""
    probe = folder / f".clock-{uuid.uuid4().hex[:8]}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        with suppress(OSError):
            probe.unlink()


def _send_heartbeats(path: Path, ended: threading.Event) -> None:
    while not ended.wait(HEARTBEAT_SECONDS):
        with suppress(OSError):
            os.utime(path)
