"""Hard links that keep a checkpoint on disk during its evaluation, even if training prunes it.

Each evaluating process has its own folder of links. A killed process leaves its folder behind, and
the next evaluation of the run removes it.
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

from ssl_pretrain.checkpoint.manifest import MANIFEST_FILE
from ssl_pretrain.fault_tolerance.lock_holder import LockHolder

OWNER_FILE = "owner.json"
HEARTBEAT_SECONDS = 30.0  # interval between heartbeats
# A process on another host counts as ended after this time without a heartbeat.
STALE_SECONDS = 180.0


@contextmanager
def hold(path: Path, parent: Path) -> Iterator[Path | None]:
    """Yield a folder of hard links to a checkpoint, or None if training has pruned the checkpoint.

    On a file system without hard links, yield the checkpoint's own folder. Regular heartbeats tell
    other machines that this process is still running.

    Args:
        path: Folder of the checkpoint.
        parent: Folder for the links of all processes.
    """
    remove_abandoned_folders(parent)
    folder = parent / f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    folder.mkdir(parents=True)
    (folder / OWNER_FILE).write_text(LockHolder.this_process().to_json())
    stop = threading.Event()
    heartbeat = threading.Thread(
        target=_send_heartbeats, args=(folder / OWNER_FILE, stop), daemon=True
    )
    heartbeat.start()
    try:
        yield link_checkpoint(path, folder / path.name)
    finally:
        stop.set()
        heartbeat.join()
        _remove(folder)


def link_checkpoint(path: Path, target: Path) -> Path | None:
    """Fill the folder `target` with hard links to all files of a checkpoint.

    Returns:
        `target`, or None if the checkpoint was pruned before all files were linked. If the
        checkpoint cannot be linked or is damaged, the result is `path`, and the evaluation reports
        any damage.
    """
    target.mkdir(parents=True, exist_ok=True)
    try:
        for file in sorted(path.rglob("*")):  # a folder comes before its files
            link_path = target / file.relative_to(path)
            if file.is_dir():
                link_path.mkdir(exist_ok=True)
            else:
                os.link(file, link_path)
        files = json.loads((target / MANIFEST_FILE).read_text())["files"]
        return target if all((target / name).exists() for name in files) else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError):
        return path if path.exists() else None


def remove_abandoned_folders(parent: Path) -> None:
    """Remove the folders in `parent` whose processes have ended without removing them."""
    if not parent.is_dir():
        return
    now = _file_system_time(parent)
    for folder in parent.iterdir():
        with suppress(OSError):  # another process may be removing the folder
            if folder.is_dir() and _is_abandoned(folder, now):
                _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a process's folder, and then the parent folder if it is empty."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        folder.parent.rmdir()


def _is_abandoned(folder: Path, now: float) -> bool:
    """Return True if the folder's process has ended or its heartbeats have stopped."""
    try:
        owner = LockHolder.from_json((folder / OWNER_FILE).read_bytes())
        last_heartbeat = (folder / OWNER_FILE).stat().st_mtime
    except OSError:  # the process has not written its owner file yet
        owner, last_heartbeat = None, folder.stat().st_mtime
    if owner and owner.born and owner.shares_process_ids(LockHolder.this_process()):
        return owner.has_exited() or _is_zombie(owner.pid)
    return now - last_heartbeat > STALE_SECONDS


def _is_zombie(pid: int) -> bool:
    """Return True if the process has ended and its parent has not collected the exit status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("Z", "X")
    except OSError:
        return False


def _file_system_time(folder: Path) -> float:
    """Return the time of the file system's clock, which may differ from this machine's clock."""
    probe = folder / f".clock-{uuid.uuid4().hex[:8]}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        with suppress(OSError):
            probe.unlink()


def _send_heartbeats(path: Path, stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT_SECONDS):
        with suppress(OSError):
            os.utime(path)
