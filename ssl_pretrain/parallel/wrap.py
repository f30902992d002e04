"""Distribute a method over the ranks and prepare it for training."""

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from ssl_pretrain.distributed import process_group
from ssl_pretrain.methods.base import Method
from ssl_pretrain.parallel import batch_norm, compile_and_checkpoint, sharding
from ssl_pretrain.parallel.execution import Execution
from ssl_pretrain.parallel.parallel_config import ParallelConfig, bn_group_images, check

# DDP must not broadcast buffers before each forward pass. torch 2.13 renamed the argument.
_NO_BUFFER_SYNC: dict[str, Any] = {
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    else "broadcast_buffers": False
}


def wrap(
    method: Method,
    config: ParallelConfig,
    execution: Execution,
    *,
    micro_batch_size: int,
    global_batch_size: int,
    example: object,
) -> nn.Module:
    """Move a method to its device, convert its batch norms, compile its blocks and distribute it.

    FSDP replaces the parameters by shards, so the optimizer has to be built afterwards.

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
        ValueError: If settings exclude each other or do not fit the batch.
    """
    check(config)
    world_size = process_group.world_size()
    sharded = is_sharded(config)
    execution.place_module(method, sharded=sharded)
    batch_norm.convert(method, micro_batch_size, bn_group_images(config, global_batch_size))
    if config.compile:
        compile_and_checkpoint.compile_blocks(method, config.cuda_graphs)
    compile_and_checkpoint.recompute_activations(method, config.activation_checkpointing)
    if sharded:
        sharding.shard(method, config, execution)
        warm_up(method, execution, example)
        return method
    if world_size == 1:
        return method
    static_graph = micro_batch_size * world_size == global_batch_size  # no accumulation
    model = DistributedDataParallel(method, static_graph=static_graph, **_NO_BUFFER_SYNC)
    if config.gradients == "bfloat16":
        model.register_comm_hook(None, bf16_compress_hook)
    for _ in range(2 if static_graph else 1):
        warm_up(model, execution, example)
    return model


def is_sharded(config: ParallelConfig) -> bool:
    """Return True if this run shards its weights over ranks."""
    return config.strategy != "ddp" and process_group.world_size() > 1


def unwrap(model: nn.Module) -> Method:
    """Return the method inside a wrapped model."""
    return cast(Method, model.module if isinstance(model, DistributedDataParallel) else model)


def without_sync(model: nn.Module) -> AbstractContextManager[object]:
    """Return a context in which gradients add up on each rank instead of being reduced over ranks.

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
    """Run one forward and backward pass that leaves no gradient and no statistics behind."""
    originals = [buffer.clone() for buffer in model.buffers()]
    with execution.forward_context():
        embeddings = model(example)
    torch.stack([z.float().sum() for z in embeddings.values()]).sum().backward()
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        for buffer, original in zip(model.buffers(), originals):
            buffer.copy_(original)
