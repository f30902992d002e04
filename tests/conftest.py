"""Fixtures of all tests: the shared data, and functions run on several gloo ranks."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from case_table import (  # noqa: F401
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_runtest_logreport,
    pytest_sessionfinish,
    seen,
)

os.environ.setdefault("WANDB_MODE", "offline")
torch.set_num_threads(
    1
)  # as the CPU presets: the same bits here as in the runs that tests start, and no slower on small tensors
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["torch", "torch._dynamo", "ssl_pretrain.train", "pytest", "warm"]
)  # imported once: under a second a test instead of 20


@pytest.fixture
def shared_data() -> Callable[[str], Path]:
    """The path of a file of the shared data, or a skip that says what is absent."""
    root = Path(os.environ.get("SSL_PRETRAIN_DATA", Path(__file__).parents[2] / "shared" / "data"))

    def find(name: str) -> Path:
        if not (root / name).exists():
            pytest.skip(f"{name} is not in {root}; set SSL_PRETRAIN_DATA to the folder that has it")
        return root / name

    return find


@pytest.fixture(autouse=True)
def one_thread():
    """One thread for each test, whatever the run of the test before has set."""
    yield
    torch.set_num_threads(1)


def run_ranks(function: Callable[..., Any], *arguments: Any, world_size: int) -> list[Any]:
    """`function(*arguments)` on every rank of a gloo group; its results in rank order. The function must be a module's."""
    with tempfile.TemporaryDirectory() as folder:
        ends = [_context.Pipe(duplex=False) for _ in range(world_size)]
        ranks = [
            _context.Process(
                target=_rank, args=(rank, world_size, f"{folder}/store", end, function, arguments)
            )
            for rank, (_, end) in enumerate(ends)
        ]
        for process in ranks:
            process.start()
        for _, end in ends:
            end.close()
        results = []
        try:
            for rank, (receiving, _) in enumerate(ends):
                if not receiving.poll(240):
                    raise TimeoutError(f"rank {rank} did not answer in 240 s")
                ok, value = pickle.loads(receiving.recv_bytes())
                if not ok:
                    raise AssertionError(f"rank {rank}:\n{value}")
                results.append(value)
        finally:
            for process in ranks:
                process.join(10)
                if process.is_alive():
                    process.kill()
        return results


def _rank(
    rank: int,
    world_size: int,
    store: str,
    end: Any,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
    )
    try:
        if world_size > 1:
            dist.init_process_group(
                "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size
            )
        answer = True, function(*arguments)
    except BaseException:
        answer = False, traceback.format_exc()
    finally:
        end.send_bytes(
            pickle.dumps(answer)
        )  # not `send`: it would share tensors' memory with a process that is about to end
        end.close()
        if dist.is_initialized():
            dist.destroy_process_group()
