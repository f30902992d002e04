"""Find the index of each shard beside it or in the cache, and build those that are missing or old.

An index belongs to one size and one modification time of its shard (one ETag in an object store).
Several processes may build the same index, because it is written atomically and is always the same.
"""

import contextlib
import errno
import hashlib
import multiprocessing
import os
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path

from ssl_pretrain.data.messages import abbreviate
from ssl_pretrain.data.tar import remote_store
from ssl_pretrain.data.tar.remote_errors import printable_url
from ssl_pretrain.data.tar.remote_store import is_remote
from ssl_pretrain.data.tar.shard_index import Shard, ShardIndex, load_index, save_index
from ssl_pretrain.data.tar.shard_scan import LOCAL_WINDOW_BYTES, REMOTE_WINDOW_BYTES, scan_shard
from ssl_pretrain.system.platform_support import (
    BINARY,
    NONBLOCK,
    START_METHOD,
    available_cores,
    read_at,
)

_NUM_REMOTE_THREADS = 16
_MIN_BYTES_PER_PROCESS = 8 << 30  # with fewer, starting a process takes longer than it saves
_REPORT_SECONDS = 5.0


def stat_shards(paths: Sequence[str]) -> list[Shard]:
    """Return the present size and version of each shard.

    Raises:
        ValueError: If shards are absent or cannot be read.
    """
    if paths and is_remote(paths[0]):
        with ThreadPoolExecutor(_NUM_REMOTE_THREADS) as pool:
            return list(pool.map(remote_store.stat, paths))
    missing = [path for path in paths if not os.path.exists(path)]
    if missing:
        verb = "does" if len(missing) == 1 else "do"
        raise ValueError(
            f"data.root: {abbreviate(missing, 3)} {verb} not exist, of {len(paths)} shards; "
            "check the pattern, or copy the missing shards"
        )
    return list(map(local_shard, paths))


def local_shard(path: str | Path) -> Shard:
    """Return the size and the modification time of a local shard.

    Raises:
        ValueError: If it is not a regular file.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"data.root: {path} is not a regular file; give a tar")
    return Shard(os.path.abspath(path), status.st_size, str(status.st_mtime_ns))


def index_beside(path: str | Path) -> Path:
    """Return the path of the index beside a local shard."""
    return Path(f"{path}.index")


def open_indexes(
    shards: Sequence[Shard], cache_dir: Path, num_processes: int | None = None
) -> list[ShardIndex]:
    """Return the index of each shard, and build and store those that are missing or old.

    Args:
        shards: The shards, all local or all remote.
        cache_dir: Folder for the indexes that cannot be written beside their shards.
        num_processes: Processes that build the indexes of local shards, or None to choose.

    Raises:
        ValueError: If a shard cannot be used, or an index can be stored nowhere.
    """
    with ThreadPoolExecutor(min(8, max(1, len(shards)))) as pool:
        loaded = list(pool.map(partial(_load, cache_dir), shards))
    indexes = dict(enumerate(loaded))
    missing = [number for number, index in indexes.items() if index is None]
    if missing:
        start = last_report = time.monotonic()
        builder = _builder([shards[number] for number in missing], num_processes)
        with builder as pool:
            futures = {
                pool.submit(_build_and_store, shards[number], cache_dir): number
                for number in missing
            }
            try:
                for num_done, future in enumerate(as_completed(futures), start=1):
                    indexes[futures[future]] = future.result()
                    if time.monotonic() - last_report > _REPORT_SECONDS:
                        last_report = time.monotonic()
                        _report(shards[0], num_done, len(missing), last_report - start)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return [index for index in indexes.values() if index is not None]


def build_index(shard: Shard, writer: dict[str, object] | None = None) -> ShardIndex:
    """Return the index of a shard by reading its headers, or all of it if it is remote.

    Raises:
        ValueError: If the shard cannot be used.
    """
    name = printable_url(shard.path)
    if is_remote(shard.path):
        read = partial(remote_store.read_range, shard)
        return scan_shard(shard, name, read, REMOTE_WINDOW_BYTES)
    try:
        with _open_shard(shard.path) as descriptor:
            return scan_shard(
                shard,
                name,
                lambda offset, num_bytes: read_at(descriptor, num_bytes, offset),
                LOCAL_WINDOW_BYTES,
                writer,
            )
    except OSError as error:
        raise ValueError(
            f"data.root: {name} cannot be read: {error.strerror or error}; check its permissions"
        ) from None


@contextlib.contextmanager
def _open_shard(path: str) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | BINARY | NONBLOCK)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _candidates(cache_dir: Path, shard: Shard) -> list[Path]:
    """Return the paths at which the index of a shard may be, the preferred one first."""
    # A signed URL is a different one every time.
    name = printable_url(shard.path).encode("utf-8", "surrogateescape")
    digest = hashlib.sha256(name).hexdigest()[:24]
    cached = cache_dir / f"tar-{digest}.index"
    return [cached] if is_remote(shard.path) else [index_beside(shard.path), cached]


def _load(cache_dir: Path, shard: Shard) -> ShardIndex | None:
    """Return the stored index of a shard, or None if it is missing, damaged or of another shard."""
    for path in _candidates(cache_dir, shard):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            index = load_index(path)
            if index.is_of(shard):
                return index
    return None


def _build_and_store(shard: Shard, cache_dir: Path) -> ShardIndex:
    """Build the index of a shard and write it to the first place that can be written."""
    index = build_index(shard)
    reasons = []
    for path in _candidates(cache_dir, shard):
        try:
            if path.parent == cache_dir:
                cache_dir.mkdir(parents=True, exist_ok=True)
            save_index(index, path)
        except OSError as error:
            reasons.append(f"{path.parent} ({error.strerror or error})")
            if error.errno == errno.ENOSPC:
                break
        else:
            return index
    old = next((path for path in _candidates(cache_dir, shard) if path.exists()), None)
    problem = (
        f"the index {old} is older than its shard or of another one, and a new one"
        if old is not None
        else f"the index of {printable_url(shard.path)}"
    )
    raise ValueError(
        f"data.cache_dir: {problem} can be written neither to {' nor to '.join(reasons)}; give a "
        "folder that can be written, as in data.cache_dir=/scratch/cache"
    )


def _builder(shards: Sequence[Shard], num_processes: int | None) -> Executor:
    """Return the threads or processes that build indexes."""
    if is_remote(shards[0].path):
        return ThreadPoolExecutor(_NUM_REMOTE_THREADS)
    if num_processes is None:
        total_bytes = sum(shard.size for shard in shards)
        num_processes = min(available_cores(), len(shards), total_bytes // _MIN_BYTES_PER_PROCESS)
    if num_processes > 1:
        return ProcessPoolExecutor(num_processes, multiprocessing.get_context(START_METHOD))
    return ThreadPoolExecutor(1)


def _report(shard: Shard, num_done: int, total: int, seconds: float) -> None:
    folder = os.path.dirname(printable_url(shard.path))
    print(
        f"indexing {folder}: {num_done:,} of {total:,} shards, about "
        f"{seconds / num_done * (total - num_done):.0f} s left",
        file=sys.stderr,
        flush=True,
    )
