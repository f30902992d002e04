"""The process group of a run: starting it, leaving it, ranks and their groups, lost ranks."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ssl_pretrain.system.exit_status import LostError
from ssl_pretrain.system.watchdog import place, watchdog

_timeout_seconds = 600.0
_cpu_group: Any = None  # gloo, for objects and stop requests: never on the accelerator's stream
MEETING_GRACE_SECONDS = (
    3.0  # for the message of torch's own timeout, which says more than the watchdog's
)
# Words of gloo, NCCL and the store for a rank that ended or that is silent.
_LOST = re.compile(
    r"connection (was )?(closed|reset|refused)|timed? ?out|timeout|broken pipe|remote process exited"
    r"|failed to recv|recvvalue failed|sendbytes failed|connect.*failed|no route to host",
    re.IGNORECASE | re.DOTALL,
)
_BACKENDS = re.compile(r"gloo|nccl|tcpstore|store->|socket|\[c10d", re.IGNORECASE)


class RendezvousError(LostError):
    """The ranks did not find each other; the message names the place, how long was waited, and what to look at."""


class LostRankError(LostError):
    """Another rank ended or did not answer; the message names this rank, its activity and what to look at."""


@contextmanager
def naming_lost_ranks() -> Iterator[None]:
    """Turn the errors of a collective that another rank left into one message.

    Raises:
        LostRankError: Another rank ended, or did not answer within the time given to `start`.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        network = isinstance(
            error, dist.DistNetworkError | dist.DistStoreError
        ) or _BACKENDS.search(text)
        if (
            isinstance(error, RendezvousError)
            or world_size() == 1
            or not (network and _LOST.search(text))
        ):
            raise
        reason = text.strip().splitlines()[0]
        raise LostRankError(
            f"{place()}: another rank ended or did not answer within {_timeout_seconds:g} s (parallel.timeout_seconds) "
            f"while {watchdog.doing}: {reason}; look for the first error among the ranks' outputs, mend that, and start all "
            "ranks again: the run goes on from its newest checkpoint"
        ) from error


def start(
    threads: int = 0, deterministic: bool = False, timeout_seconds: float = 600.0
) -> torch.device:
    """Joins the process group that torchrun describes (none: one process) and returns this rank's device.

    Args:
        threads: CPU threads of this rank; 0 shares the machine's cores evenly among its ranks.
        deterministic: ask torch for deterministic algorithms, for bit-for-bit runs on a GPU.
        timeout_seconds: a collective or a step that takes longer ends the run, with this rank's stacks on stderr. So does
            waiting for the other ranks here.

    Raises:
        RendezvousError: the first rank's host or port cannot be had, or a rank did not come.
    """
    global _cpu_group, _timeout_seconds
    _timeout_seconds = timeout_seconds
    torch.set_num_threads(threads or max(1, available_cores() // local_world_size()))
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = (
            not deterministic
        )  # shapes never change, so the search pays within an epoch
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        timeout = timedelta(seconds=timeout_seconds)
        waiting = f"waiting for the other ranks at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        watchdog.beat(timeout_seconds + MEETING_GRACE_SECONDS, waiting, _MISSING)
        try:
            _meet("nccl" if cuda else "gloo", timeout, device if cuda else None)
            _cpu_group = dist.new_group(backend="gloo", timeout=timeout) if cuda else None
        finally:
            watchdog.rest()
        watchdog.doing = "making the run ready"
    return device


_MISSING = "see whether every rank was started, and whether the first one's machine lets that port be reached"


def _meet(backend: str, timeout: timedelta, device: torch.device | None) -> None:
    """Joins the group, or says why not within the timeout and what to do."""
    host, port, began = (
        os.environ.get("MASTER_ADDR", ""),
        os.environ.get("MASTER_PORT", ""),
        time.monotonic(),
    )
    where = f"rank {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')} at {host}:{port} (MASTER_ADDR, MASTER_PORT)"
    while True:
        try:
            socket.getaddrinfo(host, None)
            break
        except OSError as error:  # a name server may be late when a whole cluster starts
            if time.monotonic() - began > min(30.0, timeout.total_seconds()):
                raise RendezvousError(
                    f"{where}: that host is not known here: {error}; give the first rank's name or address"
                ) from None
            time.sleep(1)
    try:
        dist.init_process_group(
            backend, timeout=timeout, device_id=device, **_fresh_store(host, port, timeout)
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        remedy = "another process has that port; give another (launch.port, torchrun --master-port)"
        if "EADDRINUSE" not in str(error):
            remedy = _MISSING
        waited = f"after {time.monotonic() - began:.0f} s (parallel.timeout_seconds {timeout.total_seconds():g})"
        raise RendezvousError(
            f"{where}: the ranks did not meet {waited}: {reason}; {remedy}"
        ) from None


def _fresh_store(host: str, port: str, timeout: timedelta) -> dict[str, Any]:
    """What `init_process_group` needs for a store without anything of an earlier start of these ranks.

    torchrun's agent keeps one store over all its restarts (torch 2.13), where a rank would find the addresses of ranks that
    are dead. It counts the restarts; those for another machine's sake it does not, so `launch.hosts` has it make a store a round.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    rank, size, attempt = (
        int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT")
    )
    store = dist.TCPStore(host, int(port), size, is_master=False, timeout=timeout)
    return {
        "store": dist.PrefixStore(f"attempt {attempt}", store),
        "rank": rank,
        "world_size": size,
    }


def stop() -> None:
    """Leaves the process group, if there is one."""
    global _cpu_group
    if dist.is_initialized():
        dist.destroy_process_group()
    _cpu_group = None


@contextmanager
def pretended(ranks: int) -> Iterator[None]:
    """A process group of `ranks` ranks of which this process is the first and only one: its collectives send nothing and fill nothing.

    For `--plan`, which runs a rank's program on tensors without memory.
    """
    if ranks == 1:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized(), "a plan is made outside a run"
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Ranks on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_main() -> bool:
    return rank() == 0


def new_groups(ranks_per_group: int) -> Any:
    """Splits the ranks into consecutive groups and returns this rank's one; None means all ranks (or one process)."""
    if ranks_per_group >= world_size():
        return None
    group, _ = dist.new_subgroups(ranks_per_group)
    return group


def new_cpu_group(patience: float = 1.0) -> Any:
    """A group of all ranks for what runs beside the training, on CPU: its messages never meet the training's. None for one process.

    Args:
        patience: Its timeout, as a multiple of the one given to `start`.
    """
    return (
        dist.new_group(backend="gloo", timeout=timedelta(seconds=patience * _timeout_seconds))
        if world_size() > 1
        else None
    )


def group_size(group: Any = None) -> int:
    return dist.get_world_size(group) if dist.is_initialized() else 1


def timeout_seconds() -> float:
    """The time given to `start` for a step, a wait for images or a collective."""
    return _timeout_seconds


def cpu_group() -> Any:
    """The group of all ranks on gloo, for objects and stop requests: never on the accelerator's stream. None for one process."""
    return _cpu_group
