"""Sharded weights: FSDP2 over blocks, backbones and the rest of a method."""

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from ssl_pretrain.distributed import process_group
from ssl_pretrain.models import backbones
from ssl_pretrain.parallel import batch_norm
from ssl_pretrain.parallel.execution import Execution
from ssl_pretrain.parallel.parallel_config import ParallelConfig


def shard(method: nn.Module, config: ParallelConfig, execution: Execution) -> None:
    """Shard each block, then each backbone, which evaluations call alone, then the rest.

    A teacher has the same units as the student and thus the same shards, so that its moving average
    needs no collective. Buffers (statistics, queues, centers) stay whole.
    """
    for tensor in [*method.parameters(), *method.buffers()]:  # rank 0's values, as in DDP
        dist.broadcast(tensor.detach(), src=0)
    mesh = _mesh(config, execution.device)
    networks = [module for module in method.modules() if isinstance(module, backbones.Backbone)]
    for unit in [*(block for _, block in backbones.blocks(method)), *networks, method]:
        sharded: Any = fully_shard(
            unit,
            mesh=mesh,
            # The backward pass of the root begins as soon as its forward pass has ended.
            reshard_after_forward=config.reshard_after_forward and unit is not method,
            mp_policy=_mixed_precision(unit, config, execution),
        )
        # gloo has no mean reduction.
        sharded.set_force_sum_reduction_for_comms(execution.device.type == "cpu")
    # By default the root's backward pass prefetches the weights of the module that ran last. That
    # is the teacher, which has no backward pass.
    sharded.set_modules_to_backward_prefetch([networks[0]])
    register_fsdp_forward_method(method, "targets")
    # Views of a forward's output are unsafe only if they are changed in place. `loss` is pure.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def _mesh(config: ParallelConfig, device: torch.device) -> DeviceMesh:
    world, node = process_group.world_size(), process_group.local_world_size()
    if config.strategy == "hybrid" and 1 < node < world:
        names = ("replicate", "shard")
        return init_device_mesh(device.type, (world // node, node), mesh_dim_names=names)
    return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))


def _mixed_precision(
    unit: nn.Module, config: ParallelConfig, execution: Execution
) -> MixedPrecisionPolicy:
    """Return the formats in which a unit's weights and gradients travel between ranks.

    Under autocast the weights travel in bfloat16, in which matrix products take them anyway. Units
    with batch norm are exempt, since its weights are as precise as its statistics. Inputs keep
    their dtype, so that the residual stream of a ViT stays float32.
    """
    if execution.dtype == torch.float64:
        return MixedPrecisionPolicy(cast_forward_inputs=False)
    low = execution.autocast and not batch_norm.statistics(unit)
    return MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if low else None,
        reduce_dtype=torch.bfloat16 if config.gradients == "bfloat16" else torch.float32,
        cast_forward_inputs=False,
    )
