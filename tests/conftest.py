"""Fixtures for all tests, and a helper that runs a function on several gloo ranks."""

import faulthandler
import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fork_server
import pytest
import torch
from case_table import (  # noqa: F401
    observe,
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_runtest_logreport,
    pytest_sessionfinish,
)

os.environ.setdefault("WANDB_MODE", "offline")
# One thread, as in the CPU presets, gives the same bits as the runs that tests start. On small
# tensors it is no slower.
torch.set_num_threads(1)
_context = multiprocessing.get_context("forkserver")


@pytest.fixture(scope="session", autouse=True)
def _fork_server() -> None:
    fork_server.start()


@pytest.fixture
def shared_data() -> Callable[[str], Path]:
    """Return a function that finds a file in the shared data, or skips the test."""
    default = Path(__file__).parents[2] / "shared" / "data"
    root = Path(os.environ.get("SSL_PRETRAIN_DATA", default))

    def find(name: str) -> Path:
        if not (root / name).exists():
            pytest.skip(f"{name} is not in {root}; set SSL_PRETRAIN_DATA to the folder that has it")
        return root / name

    return find


@pytest.fixture
def open_split(tmp_path) -> Callable[..., Any]:
    """Return a function that opens a split of a data set, with a cache of the test's own."""
    from ssl_pretrain.data.sources import DataConfig, open_source

    def open_split(root, split="train", **options):
        options = {"cache_dir": str(tmp_path / "cache")} | options
        return open_source(DataConfig(root=str(root), **options), split)

    return open_split


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium, started once for all tests of pages."""
    import browser_checks

    with browser_checks.start_browser() as driver:
        yield driver


@pytest.fixture(autouse=True)
def reset_threads():
    """Reset the number of threads, which runs inside a test may change."""
    yield
    torch.set_num_threads(1)


def run_ranks(function: Callable[..., Any], *arguments: Any, world_size: int) -> list[Any]:
    """Call a module-level function on every rank of a gloo group and return its results by rank."""
    with tempfile.TemporaryDirectory() as folder:
        pipes = [_context.Pipe(duplex=False) for _ in range(world_size)]
        processes = [
            _context.Process(
                target=_run_rank,
                args=(rank, world_size, f"{folder}/store", sender, function, arguments),
            )
            for rank, (_, sender) in enumerate(pipes)
        ]
        for process in processes:
            process.start()
        for _, sender in pipes:
            sender.close()
        results = []
        try:
            for rank, (receiver, _) in enumerate(pipes):
                if not receiver.poll(240):
                    raise TimeoutError(f"rank {rank} did not answer within 240 s")
                ok, value = pickle.loads(receiver.recv_bytes())
                if not ok:
                    raise AssertionError(f"rank {rank}:\n{value}")
                results.append(value)
        finally:
            for process in processes:
                process.join(10)
                if process.is_alive():
                    process.kill()
        return results


def _run_rank(
    rank: int,
    world_size: int,
    store: str,
    sender: Any,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    import torch.distributed as dist

    faulthandler.enable()  # a rank that crashes in native code prints where
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    try:
        if world_size > 1:
            address = f"file://{store}"
            dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world_size)
        result = True, function(*arguments)
    except BaseException:
        result = False, traceback.format_exc()
    finally:
        # `send` would share tensors' memory with this process, which is about to end.
        sender.send_bytes(pickle.dumps(result))
        sender.close()
        if dist.is_initialized():
            dist.destroy_process_group()
