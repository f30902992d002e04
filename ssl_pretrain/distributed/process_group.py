"""Join and leave the process group of a run, and describe its ranks.

Without a process group, this process is rank 0 of 1, and functions that return a group return None.
"""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TextIO

import torch
import torch.distributed as dist

from ssl_pretrain.distributed import cuda_settings
from ssl_pretrain.distributed.heartbeat import Heartbeat
from ssl_pretrain.system import allocator
from ssl_pretrain.system.exit_status import LostProcessError
from ssl_pretrain.system.platform_support import available_cores
from ssl_pretrain.system.watchdog import watchdog

RENDEZVOUS_GRACE_SECONDS = 3.0  # added so that torch, whose message says more, times out first
NAME_SERVER_SECONDS = 30.0  # a name server may be late when a whole cluster starts
MISSING_RANK_REMEDY = (
    "check that every rank was started, and that the port on the first rank's machine can be "
    "reached"
)

_timeout_seconds = 600.0
_cpu_group: Any = None  # on gloo, so that nothing waits for the accelerator's stream
_heartbeat: Heartbeat | None = None


class RendezvousError(LostProcessError):
    """The ranks did not meet. The message names the address, the time waited, and a remedy."""


def start(
    num_threads: int = 0, deterministic: bool = False, timeout_seconds: float = 600.0
) -> torch.device:
    """Join the process group that torchrun describes, if any, and return this rank's device.

    Args:
        num_threads: CPU threads of this rank. 0 shares the machine's cores evenly among its ranks.
        deterministic: Use deterministic algorithms, for bit-for-bit runs on a GPU.
        timeout_seconds: Time limit of a collective, of a step, and of waiting for the other ranks.
            A longer wait ends the run, with this rank's stacks on stderr.

    Raises:
        RendezvousError: If the address of rank 0 cannot be used, or a rank is missing.
    """
    global _cpu_group, _heartbeat, _timeout_seconds
    _timeout_seconds = timeout_seconds
    torch.set_num_threads(num_threads or cores_per_rank())
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    has_cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank()) if has_cuda else torch.device("cpu")
    if has_cuda:
        cuda_settings.apply(device, deterministic)
    else:
        allocator.keep_freed_memory()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        timeout = timedelta(seconds=timeout_seconds)
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        watchdog.arm(
            timeout_seconds + RENDEZVOUS_GRACE_SECONDS,
            f"waiting for the other ranks at {address}",
            MISSING_RANK_REMEDY,
        )
        try:
            _join("nccl" if has_cuda else "gloo", timeout, device if has_cuda else None)
            _cpu_group = dist.new_group(backend="gloo", timeout=timeout) if has_cuda else None
        finally:
            watchdog.disarm()
        watchdog.activity = "preparing the run"
        store = dist.distributed_c10d._get_default_store()
        _heartbeat = Heartbeat(store, dist.get_rank(), dist.get_world_size(), timeout_seconds)
        watchdog.describe_missing_ranks = _heartbeat.describe_missing_ranks
    return device


def _join(backend: str, timeout: timedelta, device: torch.device | None) -> None:
    """Join the process group described by torchrun's environment variables.

    Raises:
        RendezvousError: If the ranks did not meet within the timeout.
    """
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    rank, size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    address = f"rank {rank} of {size} at {host}:{port} (MASTER_ADDR, MASTER_PORT)"
    start_time = time.monotonic()
    while True:
        try:
            socket.getaddrinfo(host, None)
            break
        except OSError as error:
            limit_seconds = min(NAME_SERVER_SECONDS, timeout.total_seconds())
            if time.monotonic() - start_time > limit_seconds:
                raise RendezvousError(
                    f"{address}: this machine does not know that host: {error}; "
                    "give the name or address of the first rank's machine"
                ) from None
            time.sleep(1)
    start_time = time.monotonic()
    try:
        dist.init_process_group(
            backend, timeout=timeout, device_id=device, **_store_arguments(host, port, timeout)
        )
    except (RuntimeError, ValueError) as error:
        remedy = MISSING_RANK_REMEDY
        if "EADDRINUSE" in str(error):
            remedy = (
                "another process uses that port; give another one "
                "(launch.port, torchrun --master-port)"
            )
        raise RendezvousError(
            f"{address}: the ranks did not meet after {time.monotonic() - start_time:.0f} s "
            f"(parallel.timeout_seconds {timeout.total_seconds():g}): "
            f"{str(error).strip().splitlines()[0]}; {remedy}"
        ) from None


def _store_arguments(host: str, port: str, timeout: timedelta) -> dict[str, Any]:
    """Return the arguments that make `init_process_group` use a store without entries.

    torchrun's agent keeps one store over all its restarts (torch 2.13), in which a rank would find
    the addresses of dead ranks. The agent counts its restarts, and each count has its own prefix.
    It does not count the restarts that another machine causes, so `launch.local` makes it create a
    new store for each of those.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    variables = ("RANK", "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT")
    rank, size, attempt = (int(os.environ[name]) for name in variables)
    store = dist.TCPStore(host, int(port), size, is_master=False, timeout=timeout)
    return {
        "store": dist.PrefixStore(f"attempt {attempt}", store),
        "rank": rank,
        "world_size": size,
    }


def stop() -> None:
    """Leave the process group, if there is one."""
    global _cpu_group
    if _heartbeat is not None:
        _heartbeat.close()
    if dist.is_initialized():
        dist.destroy_process_group()
    _cpu_group = None


@contextmanager
def fake_process_group(num_ranks: int) -> Iterator[None]:
    """Pretend to be rank 0 of a group whose collectives send and receive nothing.

    `--plan` uses it to run the program of one rank on tensors without memory.
    """
    if num_ranks == 1:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized(), "a plan cannot be made inside a run"
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """Return the rank of this process among all ranks."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Return True on rank 0."""
    return rank() == 0


def print_once(*lines: str, file: TextIO | None = None) -> None:
    """Print lines on rank 0 alone, to standard output unless `file` is given."""
    if is_main():
        print(*lines, sep="\n", file=file, flush=True)


def local_rank() -> int:
    """Return the rank of this process among those on this host."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Return the number of ranks on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def cores_per_rank() -> int:
    """Return each rank's share of this host's cores, at least 1."""
    return max(1, available_cores() // local_world_size())


def timeout_seconds() -> float:
    """Return the time limit that was given to `start`."""
    return _timeout_seconds


def cpu_group() -> Any:
    """Return the gloo group of all ranks, for objects and stop requests."""
    return _cpu_group


def group_size(group: Any = None) -> int:
    """Return the number of ranks in a group, or of all ranks by default."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def new_subgroup(ranks_per_group: int) -> Any:
    """Split the ranks into consecutive groups. Return this rank's group, or None for all ranks."""
    return dist.new_subgroups(ranks_per_group)[0] if ranks_per_group < world_size() else None


def new_cpu_group(timeout_factor: float = 1.0) -> Any:
    """Create a gloo group of all ranks, whose messages never mix with those of training.

    Args:
        timeout_factor: Timeout of the group as a multiple of `timeout_seconds`.
    """
    if world_size() == 1:
        return None
    timeout = timedelta(seconds=timeout_factor * _timeout_seconds)
    return dist.new_group(backend="gloo", timeout=timeout)
