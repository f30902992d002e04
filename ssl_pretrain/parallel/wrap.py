"""How one method runs on many ranks: DDP or FSDP, batch norm in groups, precision, memory format, work done block by block."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
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
from ssl_pretrain.models import backbones
from ssl_pretrain.parallel import batch_norm, compile_and_checkpoint
from ssl_pretrain.parallel.parallel_config import ParallelConfig, bn_group_images, check

# Ranks keep their own buffers in a forward; torch 2.13 renamed the argument.
_BUFFERS_STAY: dict[str, Any] = {
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    else "broadcast_buffers": False
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def precision(config: ParallelConfig, device: torch.device) -> torch.dtype:
    if config.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[config.precision]


def autocast(config: ParallelConfig, device: torch.device) -> AbstractContextManager[object]:
    """bfloat16 for what tolerates it; weights, batch norm statistics and losses stay float32."""
    return (
        torch.autocast(device.type, torch.bfloat16)
        if precision(config, device) == torch.bfloat16
        else nullcontext()
    )


def view_dtype(config: ParallelConfig, device: torch.device) -> torch.dtype:
    """Return the dtype of the views that leave the loader. Autocast would round them to bfloat16 in the first layer anyway."""
    return (
        torch.bfloat16
        if device.type == "cuda" and precision(config, device) == torch.bfloat16
        else torch.float32
    )


def place(views: list[Tensor], config: ParallelConfig, device: torch.device) -> list[Tensor]:
    """Return the views in the memory format of the wrapped model and in a dtype that it takes.

    Views that the loader made in bfloat16 stay so. Others are float32, or float64 where the model is: evaluations run
    without autocast and hand over float32.
    """
    layout = torch.channels_last if config.channels_last else torch.contiguous_format

    def dtype(view: Tensor) -> torch.dtype:
        if precision(config, device) == torch.float64:
            return torch.float64
        return view.dtype if view.dtype == view_dtype(config, device) else torch.float32

    return [view.to(dtype=dtype(view), memory_format=layout) for view in views]


def wrap(
    method: nn.Module,
    config: ParallelConfig,
    *,
    images: int,
    global_batch_size: int,
    device: torch.device,
    example: object,
) -> nn.Module:
    """The method on `device`, its batch norms grouped, its blocks as `config` says, under DDP or FSDP where there are several ranks.

    FSDP replaces the parameters by shards: build the optimizer afterwards.

    Args:
        images: images a rank feeds at once.
        example: a batch of the run's shapes, for a forward and backward that is thrown away: DDP rebuilds its
            buckets after the first, or the second of a static graph, which changes the order of its sums, so a
            resumed run would differ from one that never stopped.

    Raises:
        ValueError: settings that do not go together.
    """
    check(config)
    method = to_device(method, config, device)
    batch_norm.convert(method, images, bn_group_images(config, global_batch_size))
    repeated = [block for _, block in backbones.blocks(method)]
    if config.compile:
        compile_and_checkpoint.compile_each(
            repeated, compile_and_checkpoint.drops(method), config.cuda_graphs
        )
    recompute(method, config)
    if process_group.world_size() == 1:
        return method
    one_part = images * process_group.world_size() == global_batch_size
    whole = config.strategy == "ddp"
    model = (
        _replicated(method, config, static_graph=one_part)
        if whole
        else _sharded(method, config, device)
    )
    for _ in range(2 if whole and one_part else 1):
        rehearse(model, config, device, example)
    return model


def recompute(method: nn.Module, config: ParallelConfig) -> list[nn.Module]:
    """Has the blocks compute their activations again as `config.activation_checkpointing` says; those that now do."""
    chosen = (
        [block for _, block in backbones.blocks(method)]
        if config.activation_checkpointing != "none"
        else []
    )
    chosen = [
        block
        for block in chosen
        if any(parameter.requires_grad for parameter in block.parameters())
    ]  # a teacher's have no backward
    for block in chosen:
        compile_and_checkpoint.recompute(block, config.activation_checkpointing == "selective")
    return chosen


def _replicated(
    method: nn.Module, config: ParallelConfig, static_graph: bool
) -> DistributedDataParallel:
    model = DistributedDataParallel(method, static_graph=static_graph, **_BUFFERS_STAY)
    if config.gradients == "bfloat16":
        model.register_comm_hook(None, bf16_compress_hook)
    return model


def _sharded(method: nn.Module, config: ParallelConfig, device: torch.device) -> nn.Module:
    """FSDP2 over each block, then each backbone, which evaluations call alone, then the rest. A teacher has the student's
    units and so its shards: a moving average needs no collective. Buffers (statistics, queues, centres) stay whole."""
    for tensor in [*method.parameters(), *method.buffers()]:  # rank 0's, as DDP does
        dist.broadcast(tensor.detach(), src=0)
    mesh = _mesh(config, device)
    networks = [module for module in method.modules() if isinstance(module, backbones.Backbone)]
    for unit in [*(block for _, block in backbones.blocks(method)), *networks, method]:
        again = (
            config.reshard_after_forward and unit is not method
        )  # the root's backward comes next
        sharded: Any = fully_shard(
            unit, mesh=mesh, reshard_after_forward=again, mp_policy=_dtypes(unit, config, device)
        )
        sharded.set_force_sum_reduction_for_comms(device.type == "cpu")  # gloo has no mean
    # By default the root's backward gathers ahead what ran last: the teacher, which has no backward.
    sharded.set_modules_to_backward_prefetch([networks[0]])
    register_fsdp_forward_method(method, "targets")
    # A view is unsafe only where it is changed in place: `loss` is pure, so chunks of a forward's output are not.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    return method


def _mesh(config: ParallelConfig, device: torch.device) -> DeviceMesh:
    world, node = process_group.world_size(), process_group.local_world_size()
    if config.strategy == "hybrid" and 1 < node < world:
        return init_device_mesh(
            device.type, (world // node, node), mesh_dim_names=("replicate", "shard")
        )
    return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))


def _dtypes(unit: nn.Module, config: ParallelConfig, device: torch.device) -> MixedPrecisionPolicy:
    """Under autocast a unit's weights travel in bfloat16, in which its products take them anyway, unless it has batch norm,
    whose weights are as wide as its statistics. Inputs keep their type: a ViT's sum over blocks stays float32."""
    if precision(config, device) == torch.float64:
        return MixedPrecisionPolicy(cast_forward_inputs=False)
    low = precision(config, device) == torch.bfloat16 and not batch_norm.statistics(unit)
    reduce_dtype = torch.bfloat16 if config.gradients == "bfloat16" else torch.float32
    return MixedPrecisionPolicy(
        torch.bfloat16 if low else None, reduce_dtype, cast_forward_inputs=False
    )


def to_device(method: nn.Module, config: ParallelConfig, device: torch.device) -> nn.Module:
    """The method there, in its precision and memory format."""
    dtype = torch.float64 if precision(config, device) == torch.float64 else torch.float32
    method = method.to(device=device, dtype=dtype)
    sharded = (
        config.strategy != "ddp" and process_group.world_size() > 1
    )  # shards are rows of the plain layout
    if config.channels_last and not sharded:
        method = method.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return method


def begin_step(config: ParallelConfig) -> None:
    """What the step before left in the CUDA graphs' memory may be written over from here on."""
    if config.cuda_graphs:
        torch.compiler.cudagraph_mark_step_begin()


def unwrap(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def without_sync(model: nn.Module) -> AbstractContextManager[object]:
    """No gradient travels between ranks inside: for all but the last part of a step."""
    if isinstance(model, FSDPModule):
        return _kept_whole(model)
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


@contextmanager
def _kept_whole(model: FSDPModule) -> Iterator[None]:
    """Gradients of whole weights add up on each rank, to be reduced after the context."""
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def rehearse(
    model: nn.Module, config: ParallelConfig, device: torch.device, example: object
) -> None:
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
def check_copies(model: nn.Module, tolerance: float = 1e-4) -> None:
    """Looks at every tensor of the model, teachers and statistics included, on all ranks: for before a checkpoint.

    Equal gradients and equal steps keep DDP's copies equal. A memory error or a forgotten reduction does not, and only rank 0's is
    saved. Shards are not copies: they are finite or not, and what stays whole beside them is compared.

    Raises (on every rank):
        ReplicaError: a tensor's norm differs by more than `tolerance` of it; names the ranks and the tensor.
        FloatingPointError: something is not finite; names the tensor.
    """
    tensors = {
        name: value
        for name, value in unwrap(model).state_dict().items()
        if value.is_floating_point() and value.numel()
    }
    copies = torch.tensor([not collectives.is_sharded(value) for value in tensors.values()])
    own = [
        value if value.numel() else value.new_zeros(1)
        for value in collectives.shards(tensors.values())
    ]  # a shard may be empty
    norms = [
        torch.linalg.vector_norm(value, order, dtype=torch.float64)
        for order in (math.inf, 2)
        for value in own
    ]
    largest, of_ranks = (
        collectives.gather(torch.stack(norms)).view(process_group.world_size(), 2, -1).unbind(1)
    )
    if not (finite := largest.isfinite().all(0)).all():
        first = list(tensors)[int((~finite).nonzero()[0])]
        raise FloatingPointError(
            f"{first} is not finite; nothing was saved: resume from the checkpoint before, with a lower optim.base_lr"
        )
    apart = ((of_ranks - of_ranks[0]).abs() > tolerance * of_ranks[0] + 1e-12) & copies.to(
        of_ranks.device
    )
    if apart.any():
        ranks = ", ".join(str(rank) for rank in apart.any(1).nonzero().flatten().tolist())
        first = list(tensors)[int(apart.any(0).nonzero()[0])]
        raise ReplicaError(
            f"rank {ranks}: the weights are no longer those of rank 0, first in {first}; nothing was saved, resume"
        )


@torch.no_grad()
def average_statistics(model: nn.Module, config: ParallelConfig, global_batch_size: int) -> None:
    """Leaves the mean over ranks of batch norm's running statistics, where groups are smaller than the global batch."""
    if (
        process_group.world_size() == 1
        or bn_group_images(config, global_batch_size) == global_batch_size
    ):
        return
    buffers = batch_norm.statistics(model)
    if buffers:
        mean = (
            collectives.reduce_sum(torch.cat([buffer.flatten() for buffer in buffers]))
            / process_group.world_size()
        )
        for buffer, part in zip(buffers, mean.split([buffer.numel() for buffer in buffers])):
            buffer.copy_(part.view_as(buffer))
