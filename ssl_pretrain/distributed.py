"""Every collective in the package. With no process group, each function is the one-process identity.

Gradient rule. DDP *averages* gradients over ranks. So a method returns, on rank r, a loss L_r with
mean_r(L_r) = L(global batch), and every collective below has the true (summed) backward. Then DDP's
average is exactly dL/dparams of one process on the whole batch.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ssl_pretrain.stop_signals import STOP_SIGNALS, StopSignals
from ssl_pretrain.watchdog import place, watchdog

# torch 2.13 renamed both; 2.11 has the old names only
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
Batch = TypeVar("Batch")
_timeout_seconds = 600.0
_cpu_group: Any = None  # gloo, for objects and stop requests: never on the accelerator's stream
MEETING_GRACE_SECONDS = 3.0  # for the message of torch's own timeout, which says more than the watchdog's
# Words of gloo, NCCL and the store for a rank that ended or that is silent.
_LOST = re.compile(
    r"connection (was )?(closed|reset|refused)|timed? ?out|timeout|broken pipe|remote process exited"
    r"|failed to recv|recvvalue failed|sendbytes failed|connect.*failed|no route to host",
    re.IGNORECASE | re.DOTALL,
)
_BACKENDS = re.compile(r"gloo|nccl|tcpstore|store->|socket|\[c10d", re.IGNORECASE)


_NO_IMAGES = (
    "the disk or a worker that reads images does not answer; see whether data.root can be read, whether /dev/shm has room "
    "(docker --shm-size or --ipc=host), set data.num_workers lower, or raise parallel.timeout_seconds where it is only slow"
)
_NO_STEP = (
    "another rank or the device does not answer, or this machine is too slow; the stacks above say where; see the other ranks' "
    "outputs, or raise parallel.timeout_seconds where a step takes that long"
)


class RendezvousError(RuntimeError):
    """The ranks did not find each other; the message names the place, how long was waited, and what to look at."""


class LostRankError(RuntimeError):
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
        network = isinstance(error, dist.DistNetworkError | dist.DistStoreError) or _BACKENDS.search(text)
        if isinstance(error, RendezvousError) or world_size() == 1 or not (network and _LOST.search(text)):
            raise
        reason = text.strip().splitlines()[0]
        raise LostRankError(
            f"{place()}: another rank ended or did not answer within {_timeout_seconds:g} s (parallel.timeout_seconds) "
            f"while {watchdog.doing}: {reason}; look for the first error among the ranks' outputs, mend that, and start all "
            "ranks again: the run goes on from its newest checkpoint"
        ) from error


def start(threads: int = 0, deterministic: bool = False, timeout_seconds: float = 600.0) -> torch.device:
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
        torch.backends.cudnn.benchmark = not deterministic  # shapes never change, so the search pays within an epoch
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
    host, port, began = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", ""), time.monotonic()
    where = f"rank {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')} at {host}:{port} (MASTER_ADDR, MASTER_PORT)"
    while True:
        try:
            socket.getaddrinfo(host, None)
            break
        except OSError as error:  # a name server may be late when a whole cluster starts
            if time.monotonic() - began > min(30.0, timeout.total_seconds()):
                raise RendezvousError(f"{where}: that host is not known here: {error}; give the first rank's name or address") from None
            time.sleep(1)
    try:
        dist.init_process_group(backend, timeout=timeout, device_id=device, **_fresh_store(host, port, timeout))
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        remedy = "another process has that port; give another (launch.port, torchrun --master-port)"
        if "EADDRINUSE" not in str(error):
            remedy = _MISSING
        waited = f"after {time.monotonic() - began:.0f} s (parallel.timeout_seconds {timeout.total_seconds():g})"
        raise RendezvousError(f"{where}: the ranks did not meet {waited}: {reason}; {remedy}") from None


def _fresh_store(host: str, port: str, timeout: timedelta) -> dict[str, Any]:
    """What `init_process_group` needs for a store without anything of an earlier start of these ranks.

    torchrun's agent keeps one store over all its restarts (torch 2.13), where a rank would find the addresses of ranks that
    are dead. It counts the restarts; those for another machine's sake it does not, so `launch.hosts` has it make a store a round.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    rank, size, attempt = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"))
    store = dist.TCPStore(host, int(port), size, is_master=False, timeout=timeout)
    return {"store": dist.PrefixStore(f"attempt {attempt}", store), "rank": rank, "world_size": size}


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
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=patience * _timeout_seconds)) if world_size() > 1 else None


def group_size(group: Any = None) -> int:
    return dist.get_world_size(group) if dist.is_initialized() else 1


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.shape, ctx.group = x.shape, group
        out = x.new_empty(group_size(group) * x.shape[0], *x.shape[1:])
        _all_gather(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        own = grad.new_empty(ctx.shape)  # autograd owns grad: never reduce it in place
        _reduce_scatter(own, grad.contiguous(), group=ctx.group)  # other ranks' losses use this rank's rows too
        return own, None


class _ReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        out = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


def gather(x: Tensor, group: Any = None) -> Tensor:
    """Concatenates every rank's (local_batch, ...) in rank order: (global_batch, ...). Differentiable."""
    return _Gather.apply(x, group) if group_size(group) > 1 else x


def reduce_sum(x: Tensor, group: Any = None) -> Tensor:
    """Sum of every rank's `x`, same shape on all ranks. Differentiable."""
    return _ReduceSum.apply(x, group) if group_size(group) > 1 else x


def is_sharded(tensor: Tensor) -> bool:
    """Whether each rank holds a part of it alone, as FSDP's weights and their gradients."""
    return isinstance(tensor, DTensor)


def shards(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This rank's part of each, sharing its memory: its rows of a sharded tensor, all of any other. Carries no graph."""
    with torch.no_grad():
        return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def norms(*lists: Sequence[Tensor]) -> list[Tensor]:
    """The 2-norms of each list's tensors, (len(list),): of whole tensors, also where ranks hold shards. One collective for all."""
    found = [torch.stack(torch._foreach_norm(shards(tensors))) for tensors in lists]
    first = lists[0][0]
    if not isinstance(first, DTensor):
        return found
    dims = [dim for dim, placement in enumerate(first.placements) if placement.is_shard()]
    assert len(dims) == 1, "tensors are sharded along one dimension of the mesh"
    total = reduce_sum(torch.cat(found).square(), first.device_mesh.get_group(dims[0])).sqrt()
    return list(total.split([len(tensors) for tensors in lists]))


def gather_objects(value: Any, group: Any = None) -> list[Any]:
    """Every rank's `value`, in rank order. Sent as a pickle between the ranks of one run only."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=group or _cpu_group)
    return values


def broadcast_object(value: Any, group: Any = None) -> Any:
    """Rank 0's `value`, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group or _cpu_group)
    return box[0]


def timeout_seconds() -> float:
    """The time given to `start` for a step, a wait for images or a collective."""
    return _timeout_seconds


def barrier() -> None:
    if world_size() > 1:
        dist.barrier(group=_cpu_group)


def straggler(step: int, every_steps: int) -> dict[str, float]:
    """Which rank the others wait for where a step begins, and how long, by the hosts' clocks: its images, its processor, its logging.

    Measured every `every_steps`, on the CPU group. Time within a step is shared: there, all wait for each other in every collective.
    """
    if world_size() == 1 or step % every_steps:
        return {}
    began = time.monotonic()
    barrier()
    waited = gather_objects(time.monotonic() - began)
    return {"straggler": waited.index(min(waited)), "straggler_seconds": max(waited) - min(waited)}


class StopRequest:
    """A signal sets a flag; all ranks agree on it once a step, and the answer is used one step later.

    The reduction of one step travels on a CPU group while the next step computes, so asking costs nothing. A second
    signal ends this process at once. `watched` and `agreed` are also the rank's signs of life: where the next one does
    not come within the time given to `start`, the process ends with a message, so that the others, and the scheduler,
    do not wait for it.
    """

    def __init__(self, signals: tuple[int, ...] = STOP_SIGNALS, pretend_at: int | None = None):
        self._pretend_at = pretend_at  # after this step rank 0 sends itself SIGUSR2, as a scheduler would
        self._pending: tuple[Tensor, Any] | None = None
        self._signals = StopSignals(signals)

    @property
    def requested(self) -> bool:
        """Whether this rank was asked to stop."""
        return self._signals.requested

    def watched(self, batches: Iterable[Batch], first_step: int) -> Iterator[Batch]:
        """The batches, the wait for each of them and the step that follows under the watchdog."""
        iterator = iter(batches)
        for step in itertools.count(first_step + 1):
            first = step == first_step + 1
            watchdog.beat(_timeout_seconds, f"waiting for the images of step {step}", _NO_IMAGES, compiles=first)
            batch = next(iterator, None)
            if batch is None:
                return
            watchdog.beat(_timeout_seconds, f"training step {step}", _NO_STEP, compiles=first)
            yield batch

    def agreed(self, step: int = -1) -> bool:
        """Whether any rank had been asked to stop when the previous step ended; the same answer on all ranks."""
        watchdog.beat(_timeout_seconds, f"ending step {step}", _NO_STEP)
        if step == self._pretend_at and rank() == 0:
            if self._signals.handled:
                os.kill(os.getpid(), signal.SIGUSR2)
            self._signals.requested = True
        if world_size() == 1:
            return self.requested
        answer = self._wait()
        flag = torch.tensor([int(self.requested)])
        self._pending = flag, dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=_cpu_group, async_op=True)
        return answer

    def _wait(self) -> bool:
        if self._pending is None:
            return False
        flag, work = self._pending
        work.wait()
        self._pending = None
        return bool(flag.item())

    def close(self) -> None:
        """Finishes the reduction under way and gives the signals back."""
        self._wait()
        self._rest()

    def __enter__(self) -> StopRequest:
        return self

    def __exit__(self, kind: object, *_exception: object) -> None:
        if kind is None:
            self._wait()  # after an error the others may never answer
        self._rest()

    def _rest(self) -> None:
        watchdog.rest()
        self._signals.close()
