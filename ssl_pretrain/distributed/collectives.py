"""All collectives of the package. With one process each collective is the identity.

The gradient rule follows from DDP, which averages the gradients of all ranks. A method returns, on
rank r, a loss L_r with mean_r(L_r) = L(global batch), and the backward pass of every collective
sums the gradients of all ranks. DDP's average then equals the gradient of one process on the whole
batch.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ssl_pretrain.distributed import process_group
from ssl_pretrain.system.exit_status import LostProcessError
from ssl_pretrain.system.watchdog import rank_and_host, watchdog

T = TypeVar("T")
# torch 2.13 renamed both functions. torch 2.11 has only the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
# Phrases in which gloo, NCCL and the store report a rank that has ended or does not answer.
_LOST_RANK = re.compile(
    r"connection (was )?(closed|reset|refused)|timed? ?out|timeout|broken pipe"
    r"|remote process exited|failed to recv|recvvalue failed|sendbytes failed|connect.*failed"
    r"|no route to host",
    re.IGNORECASE | re.DOTALL,
)
# Names of gloo, NCCL and the store in error messages.
_BACKEND_NAME = re.compile(r"gloo|nccl|tcpstore|store->|socket|\[c10d", re.IGNORECASE)


class LostRankError(LostProcessError):
    """Another rank has ended or does not answer. The message names this rank and its activity."""


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        gathered = x.new_empty(process_group.group_size(group) * x.shape[0], *x.shape[1:])
        _all_gather(gathered, x.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # The losses of other ranks use this rank's rows too.
        return reduce_scatter(grad, ctx.group), None


class _ReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _sum_over_ranks(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sum_over_ranks(grad, ctx.group), None


def _sum_over_ranks(x: Tensor, group: Any) -> Tensor:
    """Return the sum of `x` over the ranks, without changing `x`."""
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def gather(x: Tensor, group: Any = None) -> Tensor:
    """Concatenate `x` of all ranks, shape (local_batch, ...), to (global_batch, ...).

    Gradients flow to all ranks.
    """
    return _Gather.apply(x, group) if process_group.group_size(group) > 1 else x


def reduce_scatter(x: Tensor, group: Any = None) -> Tensor:
    """Sum `x`, shape (global_batch, ...), over the ranks and return this rank's rows.

    It is not differentiable, and `x` is not changed.
    """
    total = x.new_empty(len(x) // process_group.group_size(group), *x.shape[1:])
    _reduce_scatter(total, x.contiguous(), group=group)
    return total


def reduce_sum(x: Tensor, group: Any = None) -> Tensor:
    """Sum `x` over all ranks. Differentiable."""
    return _ReduceSum.apply(x, group) if process_group.group_size(group) > 1 else x


def reduce_max(x: Tensor, group: Any = None) -> Tensor:
    """Return the largest value of each entry of `x` over all ranks. It is not differentiable."""
    if process_group.group_size(group) == 1:
        return x
    largest = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return largest


def shift_around_ring(x: Tensor, group: Any = None) -> Tensor:
    """Send `x` to the next rank and return the tensor of the previous rank.

    The last rank sends to the first. After as many shifts as there are ranks, every tensor is back
    at its rank. It is not differentiable, and `x` is not changed.
    """
    num_ranks = process_group.group_size(group)
    if num_ranks == 1:
        return x
    rank, received = (
        dist.get_rank(group),
        torch.empty_like(x, memory_format=torch.contiguous_format),
    )
    following, previous = (rank + 1) % num_ranks, (rank - 1) % num_ranks
    transfers = [
        dist.P2POp(dist.isend, x.contiguous(), group=group, group_peer=following),
        dist.P2POp(dist.irecv, received, group=group, group_peer=previous),
    ]
    for transfer in dist.batch_isend_irecv(transfers):
        transfer.wait()
    return received


def is_sharded(tensor: Tensor) -> bool:
    """Return True if this rank has only a shard of the tensor, as with FSDP."""
    return isinstance(tensor, DTensor)


def local_tensors(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return this rank's shard of each sharded tensor, and the other tensors whole.

    The results share memory with the tensors and are detached from the autograd graph.
    """
    with torch.no_grad():
        return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def tensor_norms(*lists: Sequence[Tensor], sharded_as: Tensor | None = None) -> list[Tensor]:
    """Return the 2-norms of the tensors in each list, with one collective if they are sharded.

    Args:
        lists: Sharded or whole tensors.
        sharded_as: Tensor whose sharding the tensors have, if they are plain tensors with this
            rank's shards.
    """
    local_norms = [torch.stack(torch._foreach_norm(local_tensors(tensors))) for tensors in lists]
    first = lists[0][0] if sharded_as is None else sharded_as
    if not isinstance(first, DTensor):
        return local_norms
    dims = [dim for dim, placement in enumerate(first.placements) if placement.is_shard()]
    assert len(dims) == 1, "tensors are sharded along one dimension of the mesh"
    total = reduce_sum(torch.cat(local_norms).square(), first.device_mesh.get_group(dims[0])).sqrt()
    return list(total.split([len(tensors) for tensors in lists]))


def gather_objects(value: Any, group: Any = None) -> list[Any]:
    """Return the values of all ranks, in rank order. They are sent as pickles."""
    if process_group.world_size() == 1:
        return [value]
    values: list[Any] = [None] * process_group.world_size()
    dist.all_gather_object(values, value, group=group or process_group.cpu_group())
    return values


def broadcast_object(value: Any, group: Any = None) -> Any:
    """Return rank 0's value on every rank."""
    if process_group.world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, group=group or process_group.cpu_group())
    return values[0]


def run_on_main(function: Callable[[], T], group: Any = None) -> T:
    """Call a function on rank 0, and return its result or raise its error on every rank."""
    result, error = None, None
    if process_group.is_main():
        try:
            result = function()
        except (ValueError, OSError) as failure:  # raised below on every rank
            error = failure
    result, error = broadcast_object((result, error), group)
    if error is not None:
        raise error
    return cast(T, result)


def barrier(group: Any = None) -> None:
    """Wait for all ranks."""
    if process_group.world_size() > 1:
        dist.barrier(group=group or process_group.cpu_group())


@contextmanager
def explain_lost_ranks() -> Iterator[None]:
    """Raise a `LostRankError` instead of the various errors of a collective that lost a rank.

    Raises:
        LostRankError: If another rank ended, or did not answer within `parallel.timeout_seconds`.
    """
    try:
        yield
    except process_group.RendezvousError:
        raise
    except RuntimeError as error:
        text = str(error).strip()
        is_network_error = isinstance(error, dist.DistNetworkError | dist.DistStoreError)
        is_from_backend = is_network_error or _BACKEND_NAME.search(text) is not None
        if process_group.world_size() == 1 or not (is_from_backend and _LOST_RANK.search(text)):
            raise
        problem, missing_ranks = text.splitlines()[0], watchdog.describe_missing_ranks()
        if missing_ranks:
            problem += f"; {missing_ranks}"
        raise LostRankError(
            f"{rank_and_host()}: another rank ended or did not answer within "
            f"{process_group.timeout_seconds():g} s (parallel.timeout_seconds) while "
            f"{watchdog.activity}: {problem}; look for the first error among the "
            "outputs of all ranks, fix it, and start all ranks again. The run resumes from its "
            "newest checkpoint"
        ) from error
