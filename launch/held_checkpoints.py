"""Hard links that keep a checkpoint whole while it is evaluated, although the training prunes it.

Each evaluating process has a folder of its own for its links. A killed process leaves its folder
behind, and the next evaluation of the run removes it.
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
STALE_SECONDS = 180.0  # age of the last heartbeat after which a process elsewhere counts as ended


@contextmanager
def hold(path: Path, folder: Path) -> Iterator[Path | None]:
    """Yield the checkpoint as hard links, or None if the training has pruned it.

    On a file system without hard links, yield the checkpoint itself.

    Args:
        path: The checkpoint.
        folder: Folder for the links of all processes.
    """
    with claim(folder) as claimed:
        yield link(path, claimed / path.name)


def link(path: Path, target: Path) -> Path | None:
    """Make `target` of hard links to all files of a checkpoint.

    Returns:
        The target. None if the checkpoint was pruned before all files were linked. The checkpoint
        itself if it cannot be linked or is damaged, which the evaluation then reports.
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


@contextmanager
def claim(folder: Path) -> Iterator[Path]:
    """Make a folder for this process below `folder`, and remove it at the end.

    A heartbeat lets other machines tell it from the folder of a process that has died.
    """
    release_abandoned(folder)
    claimed = folder / f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    claimed.mkdir(parents=True)
    (claimed / OWNER).write_text(LockHolder.this_process().to_json())
    ended = threading.Event()
    heartbeat = threading.Thread(
        target=_send_heartbeats, args=(claimed / OWNER, ended), daemon=True
    )
    heartbeat.start()
    try:
        yield claimed
    finally:
        ended.set()
        heartbeat.join()
        _remove(claimed)


def release_abandoned(folder: Path) -> None:
    """Remove the folders below `folder` whose process has ended without doing so."""
    if not folder.is_dir():
        return
    now = _file_system_time(folder)
    for claimed in folder.iterdir():
        with suppress(OSError):  # its process may be removing it
            if claimed.is_dir() and _is_abandoned(claimed, now):
                _remove(claimed)


def _remove(claimed: Path) -> None:
    shutil.rmtree(claimed, ignore_errors=True)
    with suppress(OSError):
        claimed.parent.rmdir()  # succeeds once it is empty


def _is_abandoned(claimed: Path, now: float) -> bool:
    """Return True if the folder's process has ended, or sent no heartbeat for three minutes."""
    try:
        owner = LockHolder.from_json((claimed / OWNER).read_bytes())
        heartbeat = (claimed / OWNER).stat().st_mtime
    except OSError:  # the folder is being made
        owner, heartbeat = None, claimed.stat().st_mtime
    if owner and owner.born and owner.shares_process_ids(LockHolder.this_process()):
        return owner.has_exited() or _is_zombie(owner.pid)
    return now - heartbeat > STALE_SECONDS


def _is_zombie(pid: int) -> bool:
    """Return True if the process has ended and its parent has not collected its status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("Z", "X")
    except OSError:
        return False


def _file_system_time(folder: Path) -> float:
    """Return the time by the clock of the file system, which may differ from this machine's."""
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
