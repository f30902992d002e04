"""The cache of remote shards: its limit, several processes, a killed one, and a full disk."""

import importlib.util
import multiprocessing
import os
import resource
import threading
import time
import zlib
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from tars import build_loader, make_tar, open_shards, write_folder_and_shards
from web_server import server

from ssl_pretrain.views.recipe import Crop, ViewsConfig

MISSING = [name for name in ("fsspec", "aiohttp") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"not installed: {', '.join(MISSING)}, of the extra remote"
)
NUM_SHARDS = 4


@pytest.fixture
def shards(server, tmp_path) -> str:
    """Return the pattern of four shards of 51,200 bytes."""
    for number in range(NUM_SHARDS):
        image = os.urandom(40_000)
        path = make_tar(tmp_path / f"{number}.tar", [(f"{number}.jpg", image)])
        server.objects[f"/{number}.tar"] = path.read_bytes()
    return f"{server.address}/{{0..{NUM_SHARDS - 1}}}.tar"


def open_cached(url: str, cache_dir: str, num_shards: int = NUM_SHARDS):
    return open_shards(url, cache_dir=cache_dir, remote_cache_gb=num_shards * 51_200 / 1e9)


def download_all(url: str, cache_dir: str, numbers: list[int]) -> None:
    """Open the shards in a process, and download them in this order into a cache for two."""
    source = open_cached(url, cache_dir, num_shards=2)
    for number in numbers:
        source.cache.download(source.shards[number])


def start_process(*arguments, target=download_all) -> multiprocessing.Process:
    process = multiprocessing.get_context("forkserver").Process(target=target, args=arguments)
    process.start()
    return process


def cached_contents(cache_dir: Path) -> list[bytes]:
    return sorted(path.read_bytes() for path in (cache_dir / "shards").glob("*.tar"))


def test_two_processes_share_a_cache_and_its_limit(server, shards, tmp_path):
    open_cached(shards, str(tmp_path))
    server.ranges.clear()
    sizes = []
    server.before_answer = lambda: sizes.append(
        sum(path.stat().st_size for path in (tmp_path / "shards").iterdir())
    )
    orders = ([0, 1, 2, 3], [3, 2, 1, 0])
    processes = [start_process(shards, str(tmp_path), order) for order in orders]
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    contents = cached_contents(tmp_path)
    assert len(contents) == 2
    assert set(contents) <= set(server.objects.values())
    assert max(sizes) <= 2 * 51_200
    assert len(server.ranges) == 2  # each copy was downloaded once
    assert not list((tmp_path / "shards").glob("*.part"))


def test_a_killed_download_leaves_no_broken_copy(server, shards, tmp_path):
    source = open_cached(shards, str(tmp_path))
    has_begun, may_answer = threading.Event(), threading.Event()
    server.before_answer = lambda: (has_begun.set(), may_answer.wait(60))
    process = start_process(shards, str(tmp_path), [0])
    assert has_begun.wait(120)
    process.kill()
    process.join(60)
    may_answer.set()
    copies = tmp_path / "shards"
    assert [path.suffix for path in copies.iterdir() if path.name != "lock"] == [".part"]
    assert cached_contents(tmp_path) == []
    assert source.cache.download(source.shards[0])
    assert cached_contents(tmp_path) == [server.objects["/0.tar"]]
    assert source.read_bytes(0) in server.objects["/0.tar"]
    assert not list(copies.glob("*.part"))


def read_with_a_full_disk(url: str, cache_dir: str, output: str) -> None:
    """Read all images in a process that may write no file of more than 10,000 bytes."""
    with Path(output).open("w") as file, redirect_stdout(file), redirect_stderr(file):
        source = open_cached(url, cache_dir)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        for shard in source.shards:
            source.cache.find_copy(shard)
        source.cache._queue.put(None)
        source.cache._thread.join()
        print([zlib.crc32(source.read_bytes(index)) for index in range(NUM_SHARDS)])


def test_a_full_disk_is_reported_once_and_images_are_read_by_ranges(shards, tmp_path):
    source = open_cached(shards, str(tmp_path), num_shards=0)
    process = start_process(
        shards, str(tmp_path), str(tmp_path / "output"), target=read_with_a_full_disk
    )
    process.join(120)
    expected = [zlib.crc32(source.read_bytes(index)) for index in range(NUM_SHARDS)]
    assert (tmp_path / "output").read_text() == (
        f"data.remote_cache_gb: no copies of shards can be written to {tmp_path}/shards (File too "
        "large), so images are requested by their ranges; free space there, or give another "
        f"data.cache_dir\n{expected}\n"
    )


@pytest.mark.full
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_quasi_random_order_reads_two_blocks_at_a_time(world_size, server, tmp_path):
    """A window of 128 images has two blocks of 64 neighbors, on any number of ranks.

    Without a cache every image is requested once per epoch. With it every shard is, as a whole.
    """
    _, folder = write_folder_and_shards(tmp_path, 384, 96)
    for path in folder.glob("*.tar"):
        server.objects[f"/{path.name}"] = path.read_bytes()
    url = f"{server.address}/train-{{000000..000003}}.tar"
    views = ViewsConfig(crops={"global": Crop(count=1, size=8)})
    source = open_shards(url, cache_dir=str(tmp_path / "c"))
    numbers = {
        (f"/train-{number:06d}.tar", offset): index
        for index, (number, offset) in enumerate(zip(source.shard_number, source.offset.tolist()))
    }

    def read_epoch(rank: int, cache_gb: float) -> list[tuple[str, int, int]]:
        """Return the ranges that are requested in an epoch."""
        server.ranges.clear()
        options = {"world_size": world_size, "window": 128, "global_batch_size": 16}
        source = open_shards(url, cache_dir=str(tmp_path / "c"), remote_cache_gb=cache_gb)
        loader = build_loader(source, views, "threads", rank=rank, num_workers=1, **options)
        with loader:
            for _ in zip(range(384 // 16), loader.iterate_from(0)):
                pass
        while cache_gb and len(cached_contents(tmp_path / "c")) < len(server.objects):
            time.sleep(0.02)
        return list(server.ranges)

    indices = []
    for rank in range(world_size):
        epoch = [numbers[path, first] for path, first, _ in read_epoch(rank, 0)]
        epoch = epoch[: 384 // world_size]  # without what is read ahead of the next epoch
        per_window = 128 // world_size
        for start in range(0, len(epoch), per_window):
            assert len({index // 64 for index in epoch[start : start + per_window]}) == 2
        indices += epoch
    assert sorted(indices) == list(range(384))
    whole_shards = []
    for rank in range(world_size):
        whole_shards += [
            path
            for path, first, end in read_epoch(rank, 1)
            if (first, end) == (0, len(server.objects[path]))
        ]
    assert sorted(whole_shards) == sorted(server.objects)
