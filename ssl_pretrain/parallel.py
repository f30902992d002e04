"""How one method runs on many ranks: DDP, batch norm in groups, precision and memory format."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ssl_pretrain import batch_norm, distributed

# Ranks keep their own buffers in a forward; torch 2.13 renamed the argument.
_BUFFERS_STAY: dict[str, Any] = {
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    else "broadcast_buffers": False
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass
class ParallelConfig:
    """How the ranks compute. Only `bn_group_images` changes what is computed; the rest is speed and memory."""

    bn_group_images: int | str = "global"  # images that share batch norm's statistics; part of the recipe
    precision: Literal["auto", "float32", "bfloat16", "float64"] = "auto"  # auto: bfloat16 autocast on GPUs, float32 on CPU
    channels_last: bool = True  # measured 1.3 to 1.5 times faster for ResNets on GPUs
    threads: int = 0  # CPU threads a rank; 0 shares the cores among the ranks of a machine
    accumulation: Literal["auto", "one_pass", "two_passes"] = "auto"  # auto: two passes where a loss couples the batch's images
    deterministic: bool = False  # bit-for-bit runs on a GPU, slower
    timeout_seconds: float = 600.0  # a collective that waits longer ends the run


def group_images(config: ParallelConfig, global_batch_size: int) -> int:
    """Images in one batch norm group. Raises ValueError for anything but `global` or a positive divisor of the global batch."""
    if config.bn_group_images == "global":
        return global_batch_size
    group = int(config.bn_group_images) if str(config.bn_group_images).isdecimal() else 0
    if group < 1 or global_batch_size % group:
        raise ValueError(
            f"parallel.bn_group_images: {config.bn_group_images!r}; choose global or a divisor of global_batch_size {global_batch_size}"
        )
    return group


def precision(config: ParallelConfig, device: torch.device) -> torch.dtype:
    if config.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[config.precision]


def autocast(config: ParallelConfig, device: torch.device) -> AbstractContextManager[object]:
    """bfloat16 for what tolerates it; weights, batch norm statistics and losses stay float32."""
    return torch.autocast(device.type, torch.bfloat16) if precision(config, device) == torch.bfloat16 else nullcontext()


def place(views: list[Tensor], config: ParallelConfig, device: torch.device) -> list[Tensor]:
    """The views as the wrapped model wants them: precision and memory format."""
    dtype = torch.float64 if precision(config, device) == torch.float64 else torch.float32
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    return [view.to(dtype=dtype, memory_format=layout) for view in views]


def wrap(
    method: nn.Module, config: ParallelConfig, *, images: int, global_batch_size: int, device: torch.device, example: object
) -> nn.Module:
    """The method on `device`, its batch norms grouped, under DDP where there are several ranks.

    Args:
        images: images a rank feeds at once.
        example: a batch of the run's shapes, for one forward and backward that is thrown away: DDP rebuilds its
            buckets after the first, which changes the order of its sums, so a resumed run would differ from one
            that never stopped.
    """
    method = to_device(method, config, device)
    batch_norm.convert(method, images, group_images(config, global_batch_size))
    if distributed.world_size() == 1:
        return method
    model = DistributedDataParallel(method, **_BUFFERS_STAY)
    rehearse(model, config, device, example)
    return model


def to_device(method: nn.Module, config: ParallelConfig, device: torch.device) -> nn.Module:
    """The method there, in its precision and memory format."""
    dtype = torch.float64 if precision(config, device) == torch.float64 else torch.float32
    method = method.to(device=device, dtype=dtype)
    return method.to(memory_format=torch.channels_last) if config.channels_last else method  # type: ignore[call-overload]


def unwrap(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def without_sync(model: nn.Module) -> AbstractContextManager[object]:
    """No gradient travels between ranks inside: for all but the last part of a step."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def rehearse(model: nn.Module, config: ParallelConfig, device: torch.device, example: object) -> None:
    """One forward and backward that leave no trace: no gradient, no statistics."""
    buffers = [buffer.clone() for buffer in model.buffers()]
    with autocast(config, device):
        embeddings = model(example)
    torch.stack([z.float().sum() for z in embeddings.values()]).sum().backward()
    for parameter in model.parameters():
        parameter.grad = None
    with torch.no_grad():
        for buffer, before in zip(model.buffers(), buffers):
            buffer.copy_(before)


class ReplicaError(RuntimeError):
    """The ranks' copies of the model are no longer the same."""


@torch.no_grad()
def check_replicas(model: nn.Module, tolerance: float = 1e-4) -> None:
    """Compares the norm of every tensor of the model, teachers and statistics included, over the ranks: for before a checkpoint.

    Equal gradients and equal steps keep DDP's copies equal. A memory error or a forgotten reduction does not, and only rank 0's is saved.

    Raises:
        ReplicaError: a norm differs by more than `tolerance` of it; names the ranks and the tensor, on every rank.
    """
    if not isinstance(model, DistributedDataParallel):
        return
    tensors = {name: value for name, value in model.module.state_dict().items() if value.is_floating_point()}
    norms = torch.stack([torch.linalg.vector_norm(value, dtype=torch.float64) for value in tensors.values()])
    of_ranks = distributed.gather(norms).view(distributed.world_size(), -1)
    apart = ~((of_ranks - of_ranks[0]).abs() <= tolerance * of_ranks[0] + 1e-12)  # a NaN is apart, too
    if apart.any():
        ranks = ", ".join(str(rank) for rank in apart.any(1).nonzero().flatten().tolist())
        first = list(tensors)[int(apart.any(0).nonzero()[0])]
        raise ReplicaError(f"rank {ranks}: the weights are no longer those of rank 0, first in {first}; nothing was saved, resume")


@torch.no_grad()
def average_statistics(model: nn.Module, config: ParallelConfig, global_batch_size: int) -> None:
    """Leaves the mean over ranks of batch norm's running statistics, where groups are smaller than the global batch."""
    if distributed.world_size() == 1 or group_images(config, global_batch_size) == global_batch_size:
        return
    buffers = batch_norm.statistics(model)
    if buffers:
        mean = distributed.reduce_sum(torch.cat([buffer.flatten() for buffer in buffers])) / distributed.world_size()
        for buffer, part in zip(buffers, mean.split([buffer.numel() for buffer in buffers])):
            buffer.copy_(part.view_as(buffer))
