"""Keep whole remote shards on a local disk, up to a limit, and download them in the background.

A shard is read by ranges until its copy is complete. Both give the same bytes, so neither the limit
nor the time of a download changes a batch. All processes of a machine share the folder. A lock on
the folder protects the sum of sizes, and a lock on each unfinished copy shows that its process
lives.
"""

import contextlib
import hashlib
import os
import queue
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ssl_pretrain.data.images import UnreachableSource
from ssl_pretrain.data.tar import remote_store
from ssl_pretrain.data.tar.remote_errors import printable_url
from ssl_pretrain.data.tar.shard_index import Shard
from ssl_pretrain.system.platform_support import BINARY

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_BLOCK_BYTES = 16 << 20  # bytes per request of a download
_PROTECTED_SECONDS = 24 * 3600.0  # a copy that was opened more recently is not deleted


class ShardCache:
    """Local copies of remote shards in one folder.

    Args:
        folder: The folder.
        max_bytes: Largest sum of the sizes of the copies. 0 keeps none.
    """

    def __init__(self, folder: Path, max_bytes: int):
        self.folder, self.max_bytes = folder, max_bytes
        self._start()

    def __getstate__(self) -> dict[str, object]:
        return {"folder": self.folder, "max_bytes": self.max_bytes}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._start()

    def _start(self) -> None:
        self._has_reported = False
        self._requested: set[str] = set()
        self._complete: dict[str, Path] = {}
        self._queue: queue.Queue[Shard | None] = queue.Queue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def find_copy(self, shard: Shard) -> Path | None:
        """Return the complete local copy of a shard. If there is none, request it."""
        if not self.max_bytes:
            return None
        path = self._complete.get(shard.path)
        if path is None:
            path = self.folder / _file_name(shard)
            try:
                is_complete = path.stat().st_size == shard.size
            except OSError:
                is_complete = False
            if not is_complete:
                self.request(shard)
                return None
            with contextlib.suppress(OSError):
                os.utime(path)  # the time of the last use, for `_reserve`
            self._complete[shard.path] = path
        return path

    def forget_copy(self, shard: Shard) -> None:
        """Forget a copy that another process has deleted."""
        self._complete.pop(shard.path, None)
        self._requested.discard(shard.path)

    def request(self, shard: Shard) -> None:
        """Ask the background thread to download a shard, once per process."""
        if not self.max_bytes or shard.path in self._requested:
            return
        with self._lock:
            self._requested.add(shard.path)
            self._queue.put(shard)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=_download_all, args=(weakref.ref(self), self._queue), daemon=True
                )
                self._thread.start()
                weakref.finalize(self, self._queue.put, None)

    def report_failure(self, error: OSError) -> None:
        """Print that the disk refuses copies, once per process."""
        if not self._has_reported:
            self._has_reported = True
            print(
                f"data.remote_cache_gb: no copies of shards can be written to {self.folder} "
                f"({error.strerror or error}), so images are requested by their ranges; free "
                "space there, or give another data.cache_dir",
                file=sys.stderr,
                flush=True,
            )

    def download(self, shard: Shard) -> bool:
        """Download a shard unless there is no space or another process does it.

        Returns:
            True if a complete copy exists now.
        """
        path = self.folder / _file_name(shard)
        with self._reserve(path, shard.size) as file:
            if file is None:
                return path.exists()
            for offset in range(0, shard.size, _BLOCK_BYTES):
                length = min(_BLOCK_BYTES, shard.size - offset)
                file.write(remote_store.read_range(shard, offset, length))
            file.flush()
            remote_store.check_unchanged(shard)
        return True

    @contextlib.contextmanager
    def _reserve(self, path: Path, num_bytes: int) -> Iterator[BinaryIO | None]:
        """Open and lock the unfinished copy of a shard, which gets its name after success.

        Yield None if another process has it, it is complete, or there is no space.
        """
        unfinished = path.with_suffix(".part")
        with contextlib.ExitStack() as stack:
            with _locked(self.folder / "lock"):
                file: BinaryIO | None = None
                if not path.exists():
                    file = self._create(unfinished, num_bytes)
                if file is not None:
                    stack.enter_context(file)
            try:
                yield file
            except BaseException:
                with contextlib.suppress(OSError):
                    unfinished.unlink()
                raise
            if file is not None:
                os.replace(unfinished, path)

    def _create(self, unfinished: Path, num_bytes: int) -> BinaryIO | None:
        """Create a file of the final size, which reserves the space, and lock it."""
        descriptor = os.open(unfinished, os.O_RDWR | os.O_CREAT | BINARY, 0o644)
        file = os.fdopen(descriptor, "r+b")
        if _try_lock(file):
            if self._make_space(num_bytes, unfinished):
                file.truncate(num_bytes)
                return file
            unfinished.unlink()
        file.close()
        return None

    def _make_space(self, num_bytes: int, unfinished: Path) -> bool:
        """Delete the copies that were not used for the longest time. Return True on success."""
        statuses = {
            path: path.stat()
            for path in self.folder.iterdir()
            if path.suffix in (".tar", ".part") and path != unfinished
        }
        total = sum(status.st_size for status in statuses.values()) + num_bytes
        deletable = sorted(
            (status.st_mtime, path, status.st_size)
            for path, status in statuses.items()
            if time.time() - status.st_mtime > _PROTECTED_SECONDS
        )
        while total > self.max_bytes and deletable:
            _, path, size = deletable.pop(0)
            path.unlink(missing_ok=True)
            total -= size
        return total <= self.max_bytes


def _file_name(shard: Shard) -> str:
    identity = f"{printable_url(shard.path)}\n{shard.size}\n{shard.version}"
    return f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}.tar"


def _try_lock(file: BinaryIO) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of the folder, which protects the sum of sizes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download_all(cache: "weakref.ref[ShardCache]", shards: "queue.Queue[Shard | None]") -> None:
    """Download the requested shards, one after the other, until the cache is deleted."""
    while (shard := shards.get()) is not None:
        owner = cache()
        if owner is None:
            return
        # A failure costs nothing but speed, because the images are still read by ranges. Those
        # report an outage or a change of the shard.
        try:
            owner.download(shard)
        except UnreachableSource:
            pass
        except OSError as error:
            owner.report_failure(error)
        del owner
