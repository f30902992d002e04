"""Every collective in the package. With no process group, each function is the one-process identity.

Gradient rule. DDP *averages* gradients over ranks. So a method returns, on rank r, a loss L_r with
mean_r(L_r) = L(global batch), and every collective below has the true (summed) backward. Then DDP's
average is exactly dL/dparams of one process on the whole batch.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ssl_pretrain.distributed import process_group

# torch 2.13 renamed both; 2.11 has the old names only
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.shape, ctx.group = x.shape, group
        out = x.new_empty(process_group.group_size(group) * x.shape[0], *x.shape[1:])
        _all_gather(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        own = grad.new_empty(ctx.shape)  # autograd owns grad: never reduce it in place
        _reduce_scatter(
            own, grad.contiguous(), group=ctx.group
        )  # other ranks' losses use this rank's rows too
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
    return _Gather.apply(x, group) if process_group.group_size(group) > 1 else x


def reduce_sum(x: Tensor, group: Any = None) -> Tensor:
    """Sum of every rank's `x`, same shape on all ranks. Differentiable."""
    return _ReduceSum.apply(x, group) if process_group.group_size(group) > 1 else x


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
    if process_group.world_size() == 1:
        return [value]
    values: list[Any] = [None] * process_group.world_size()
    dist.all_gather_object(values, value, group=group or process_group.cpu_group())
    return values


def broadcast_object(value: Any, group: Any = None) -> Any:
    """Rank 0's `value`, on every rank."""
    if process_group.world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group or process_group.cpu_group())
    return box[0]


def barrier() -> None:
    if process_group.world_size() > 1:
        dist.barrier(group=process_group.cpu_group())


def straggler(step: int, every_steps: int) -> dict[str, float]:
    """Which rank the others wait for where a step begins, and how long, by the hosts' clocks: its images, its processor, its logging.

    Measured every `every_steps`, on the CPU group. Time within a step is shared: there, all wait for each other in every collective.
    """
    if process_group.world_size() == 1 or step % every_steps:
        return {}
    began = time.monotonic()
    barrier()
    waited = gather_objects(time.monotonic() - began)
    return {"straggler": waited.index(min(waited)), "straggler_seconds": max(waited) - min(waited)}
