"""Distribute a method over the ranks with DDP or FSDP2, and check that its copies stay equal."""

import inspect
import math
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.nn.parallel import DistributedDataParallel

from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.methods.base import Method
from ssl_pretrain.models import backbones
from ssl_pretrain.parallel import activation_checkpointing, batch_norm, weight_casts
from ssl_pretrain.parallel.execution import Execution, ParallelConfig, bn_group_images, check

# DDP must not broadcast buffers before each forward pass. torch 2.13 renamed the argument.
_NO_BUFFER_SYNC: dict[str, Any] = {
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    else "broadcast_buffers": False
}


class ReplicaError(RuntimeError):
    """The ranks' copies of the model differ."""


def wrap(
    method: Method,
    config: ParallelConfig,
    execution: Execution,
    *,
    micro_batch_size: int,
    global_batch_size: int,
    example: object,
) -> nn.Module:
    """Move a method to its device, convert its batch norms, compile and distribute it.

    FSDP replaces the parameters with shards, so the optimizer has to be built afterwards.

    Args:
        method: The method, on the CPU.
        config: Strategy, batch norm groups, compilation and activation checkpointing.
        execution: Device, dtype and memory format.
        micro_batch_size: Images per forward pass on this rank.
        global_batch_size: Images per optimizer step over all ranks.
        example: A batch with the run's shapes, used to warm up. DDP rebuilds its buckets after the
            first backward pass, or after the second with a static graph, which changes the order
            of its sums. Without a warm-up, a resumed run would differ from an uninterrupted one.

    Returns:
        The method itself on one rank and under FSDP, else a DistributedDataParallel.

    Raises:
        ValueError: If settings conflict with each other or do not fit the batch.
    """
    check(config)
    world_size, is_sharded = process_group.world_size(), shards_weights(config)
    execution.place_module(method, is_sharded=is_sharded)
    batch_norm.convert(method, micro_batch_size, bn_group_images(config, global_batch_size))
    if config.compile:
        from ssl_pretrain.parallel import compilation  # loads the compiler, which takes seconds

        compilation.compile_network(method, execution.device, config.cuda_graphs)
    activation_checkpointing.recompute_activations(method, config.activation_checkpointing)
    if execution.autocast and not is_sharded:
        weight_casts.cast_once_per_step(method)
    if is_sharded:
        _shard(method, config, execution)
        warm_up(method, execution, example)
        return method
    if world_size == 1:
        return method
    static_graph = micro_batch_size * world_size == global_batch_size  # no gradient accumulation
    model = DistributedDataParallel(method, static_graph=static_graph, **_NO_BUFFER_SYNC)
    if config.gradients == "bfloat16":
        model.register_comm_hook(None, bf16_compress_hook)
    for _ in range(2 if static_graph else 1):
        warm_up(model, execution, example)
    return model


def shards_weights(config: ParallelConfig) -> bool:
    """Return True if this run shards its weights over ranks."""
    return config.strategy != "ddp" and process_group.world_size() > 1


def unwrap(model: nn.Module) -> Method:
    """Return the method inside a wrapped model."""
    return cast(Method, model.module if isinstance(model, DistributedDataParallel) else model)


def without_sync(model: nn.Module) -> AbstractContextManager[object]:
    """Return a context in which each rank accumulates gradients without reducing them over ranks.

    Use it for all but the last micro-batch of a step.
    """
    if isinstance(model, FSDPModule):
        return _fsdp_without_sync(model)
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


@contextmanager
def _fsdp_without_sync(model: FSDPModule) -> Iterator[None]:
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def warm_up(model: nn.Module, execution: Execution, example: object) -> None:
    """Run a forward and a backward pass, then clear the gradients and restore all buffers."""
    originals = [buffer.clone() for buffer in model.buffers()]
    with execution.forward_context():
        embeddings = model(example)
    torch.stack([z.float().sum() for z in embeddings.values()]).sum().backward()
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        for buffer, original in zip(model.buffers(), originals):
            buffer.copy_(original)


def _shard(method: nn.Module, config: ParallelConfig, execution: Execution) -> None:
    """Shard each block, then each network, which evaluations call by itself, then the rest.

    A teacher has the same units as the student and thus the same shards, so its moving average
    needs no collective. Buffers such as statistics, queues and centers are not sharded.
    """
    # Every rank starts with the tensors of rank 0, as in DDP.
    for tensor in [*method.parameters(), *method.buffers()]:
        dist.broadcast(tensor.detach(), src=0)
    mesh = _build_mesh(config, execution.device.type)
    networks = backbones.networks(method)
    towers = [*networks, *backbones.text_encoders(method)]
    for unit in [*(block for _, block in backbones.blocks(method)), *towers, method]:
        sharded: Any = fully_shard(
            unit,
            mesh=mesh,
            # The backward pass of the root begins as soon as its forward pass has ended.
            reshard_after_forward=config.reshard_after_forward and unit is not method,
            mp_policy=_mixed_precision(unit, config, execution),
        )
        # gloo cannot reduce to a mean.
        sharded.set_force_sum_reduction_for_comms(execution.device.type == "cpu")
    # By default the root's backward pass prefetches the weights of the module that ran last. That
    # would be the teacher, which has no backward pass.
    sharded.set_modules_to_backward_prefetch([towers[0]])
    for name in ("targets", "couple"):
        register_fsdp_forward_method(method, name)
    for network in networks:
        register_fsdp_forward_method(network, "tokens")
    # A view of a forward output is unsafe only if it is changed in place, and `loss` is pure.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def _build_mesh(config: ParallelConfig, device_type: str) -> DeviceMesh:
    num_ranks, ranks_per_node = process_group.world_size(), process_group.local_world_size()
    if config.strategy == "hybrid" and 1 < ranks_per_node < num_ranks:
        names = ("replicate", "shard")
        shape = (num_ranks // ranks_per_node, ranks_per_node)
        return init_device_mesh(device_type, shape, mesh_dim_names=names)
    return init_device_mesh(device_type, (num_ranks,), mesh_dim_names=("shard",))


def _mixed_precision(
    unit: nn.Module, config: ParallelConfig, execution: Execution
) -> MixedPrecisionPolicy:
    """Return the dtypes in which a unit's weights and gradients are sent between ranks.

    Under autocast weights are sent in bfloat16, to which matrix products convert them anyway.
    Units with batch norm are exempt, since its weights must be as precise as its statistics.
    Inputs are not converted, so the residual stream of a ViT stays float32.
    """
    if execution.dtype == torch.float64:
        return MixedPrecisionPolicy(cast_forward_inputs=False)
    in_bfloat16 = execution.autocast and not batch_norm.statistics(unit)
    return MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if in_bfloat16 else None,
        reduce_dtype=torch.bfloat16 if config.gradients == "bfloat16" else torch.float32,
        cast_forward_inputs=False,
    )


@torch.no_grad()
def check_replicas(model: nn.Module, tolerance: float = 1e-4) -> None:
    """Compare every tensor of the model over all ranks, teachers and statistics included.

    Call it before saving a checkpoint, which stores only rank 0's copy. Equal gradients and updates
    keep DDP's copies equal, unless memory is faulty or a reduction is missing. Sharded tensors are
    only checked for finite values.

    Raises:
        ReplicaError: On every rank, if a tensor's norm differs by more than the relative tolerance.
            The message names the ranks and the tensor.
        FloatingPointError: On every rank, if a value is not finite. The message names the tensor.
    """
    tensors = {
        name: value
        for name, value in unwrap(model).state_dict().items()
        if value.is_floating_point() and value.numel()
    }
    shards = collectives.local_tensors(tensors.values())
    # An empty shard has no largest value, so a zero takes its place.
    shards = [value if value.numel() else value.new_zeros(1) for value in shards]
    local_norms = [
        torch.linalg.vector_norm(value, order, dtype=torch.float64)
        for order in (math.inf, 2)
        for value in shards
    ]
    all_norms = collectives.gather(torch.stack(local_norms))
    largest, norms = all_norms.view(process_group.world_size(), 2, -1).unbind(1)
    if not (finite := largest.isfinite().all(0)).all():
        name = list(tensors)[int((~finite).nonzero()[0])]
        raise FloatingPointError(
            f"{name} is not finite. Nothing was saved; resume from the previous checkpoint with a "
            "lower optim.base_lr"
        )
    is_replicated = torch.tensor([not collectives.is_sharded(value) for value in tensors.values()])
    differs = (norms - norms[0]).abs() > tolerance * norms[0] + 1e-12
    differs &= is_replicated.to(norms.device)
    if differs.any():
        ranks = ", ".join(str(rank) for rank in differs.any(1).nonzero().flatten().tolist())
        name = list(tensors)[int(differs.any(0).nonzero()[0])]
        raise ReplicaError(
            f"rank {ranks}: the weights differ from those of rank 0, first in {name}. Nothing was "
            "saved; start the run again to resume from the newest checkpoint"
        )


@torch.no_grad()
def average_statistics(model: nn.Module, config: ParallelConfig, global_batch_size: int) -> None:
    """Average batch norm's running statistics over ranks, unless each group is the global batch."""
    world_size, buffers = process_group.world_size(), batch_norm.statistics(model)
    has_one_group = bn_group_images(config, global_batch_size) == global_batch_size
    if world_size > 1 and not has_one_group and buffers:
        total = collectives.reduce_sum(torch.cat([buffer.flatten() for buffer in buffers]))
        batch_norm.copy_to_buffers(total / world_size, buffers)
