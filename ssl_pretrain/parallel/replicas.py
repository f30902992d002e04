"""Keep the ranks' copies of a model equal, and check that they are."""

import math

import torch
from torch import nn

from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.parallel import batch_norm
from ssl_pretrain.parallel.parallel_config import ParallelConfig, bn_group_images
from ssl_pretrain.parallel.wrap import unwrap


class ReplicaError(RuntimeError):
    """The ranks' copies of the model differ."""


@torch.no_grad()
def check_replicas(model: nn.Module, tolerance: float = 1e-4) -> None:
    """Check every tensor of the model on all ranks, teachers and statistics included.

    It is called before a checkpoint, because only rank 0's copy is saved. Equal gradients and equal
    updates keep DDP's copies equal. A memory error or a missing reduction does not. Shards are
    only checked for finite values. What stays whole beside them is compared as well.

    Raises:
        ReplicaError: On every rank, if a tensor's norm differs by more than the relative tolerance.
            Names the ranks and the tensor.
        FloatingPointError: On every rank, if a value is not finite. Names the tensor.
    """
    tensors = {
        name: value
        for name, value in unwrap(model).state_dict().items()
        if value.is_floating_point() and value.numel()
    }
    replicated = torch.tensor([not collectives.is_sharded(value) for value in tensors.values()])
    local = collectives.shards(tensors.values())
    local = [value if value.numel() else value.new_zeros(1) for value in local]  # empty shards
    local_norms = [
        torch.linalg.vector_norm(value, order, dtype=torch.float64)
        for order in (math.inf, 2)
        for value in local
    ]
    gathered = collectives.gather(torch.stack(local_norms))
    largest, norms = gathered.view(process_group.world_size(), 2, -1).unbind(1)
    if not (finite := largest.isfinite().all(0)).all():
        first = list(tensors)[int((~finite).nonzero()[0])]
        raise FloatingPointError(
            f"{first} is not finite; nothing was saved: resume from the checkpoint before, with a "
            "lower optim.base_lr"
        )
    differs = (norms - norms[0]).abs() > tolerance * norms[0] + 1e-12
    differs &= replicated.to(norms.device)
    if differs.any():
        ranks = ", ".join(str(rank) for rank in differs.any(1).nonzero().flatten().tolist())
        first = list(tensors)[int(differs.any(0).nonzero()[0])]
        raise ReplicaError(
            f"rank {ranks}: the weights are no longer those of rank 0, first in {first}; nothing "
            "was saved, resume"
        )


@torch.no_grad()
def average_statistics(model: nn.Module, config: ParallelConfig, global_batch_size: int) -> None:
    """Average batch norm's running statistics over ranks, unless one group is the global batch."""
    world_size = process_group.world_size()
    buffers = batch_norm.statistics(model)
    one_group = bn_group_images(config, global_batch_size) == global_batch_size
    if world_size == 1 or one_group or not buffers:
        return
    total = collectives.reduce_sum(torch.cat([buffer.flatten() for buffer in buffers]))
    batch_norm.copy_flat(total / world_size, buffers)
