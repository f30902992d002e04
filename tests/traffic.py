"""Count the bytes that a rank sends in the collectives of a step, and predict them by formula."""

import sys
from collections import Counter
from fractions import Fraction
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_pretrain.distributed import process_group
from ssl_pretrain.models import backbones, components
from ssl_pretrain.parallel.batch_norm import GroupBatchNorm

# The first of these functions that is on the stack tells what a collective is for. None is on the
# stack of DDP's reducer, which is C++.
KINDS = {
    "PortableSynchronizedNorm.forward": "batch norm forward",
    "PortableSynchronizedNorm.backward": "batch norm backward",
    "CUDASynchronizedNorm.forward": "batch norm forward",
    "CUDASynchronizedNorm.backward": "batch norm backward",
    "foreach_all_gather": "weights",
    "foreach_reduce": "gradients",
    "tensor_norms": "norms",
    "_SymmetricLogSumExp.backward": "loss backward",
    "_TwoWayLogSumExp.backward": "loss backward",
    "shift_around_ring": "gather",
    "reduce_max": "sum",
    "_Gather.backward": "loss backward",
    "_GatherUnit.backward": "loss backward",
    "_Gather.forward": "gather",
    "_ReduceSum.forward": "sum",
    "_ReduceSum.backward": "sum",
}


class Traffic(TorchDispatchMode):
    """Count the collectives, and the bytes that each rank of a ring sends, by kind.

    With W ranks in its group, a gather or a reduce-scatter sends W - 1 shards and an all-reduce
    twice as many. A shard is what one rank contributes to a gather, or receives from a reduction. A
    rank sends a whole tensor to its neighbor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        # Exact fractions, since a shard of an all-reduce need not be a whole number of bytes.
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function.namespace == "c10d":
            name = function.overloadpacket.__name__
            if name == "recv_":  # the other end of a `send`
                return function(*args, **(kwargs or {}))
            first = args[0][0] if isinstance(args[0], list) else args[0]
            second = args[1][0] if isinstance(args[1], list) else args[1]
            world = _group_size(function, args)
            tensor = {
                "_allgather_base_": second,
                "_reduce_scatter_base_": first,
                "allreduce_": first,
                "send": first,
            }[name]
            size = tensor.numel() * tensor.element_size()
            kind = _find_collective_kind()
            self.calls[kind] += 1
            shards = {"allreduce_": Fraction(2 * (world - 1), world), "send": 1}
            self.sent[kind] += shards.get(name, world - 1) * size
        return function(*args, **(kwargs or {}))


def _group_size(function: Any, args: Any) -> int:
    """Return the number of ranks that take part in a collective."""
    names = [argument.name for argument in function._schema.arguments]
    size: int = dist.ProcessGroup.unbox(args[names.index("process_group")]).size()
    return size


def _find_collective_kind() -> str:
    frame: Any = sys._getframe()
    functions = []
    while frame is not None:
        functions.append(frame.f_code.co_qualname)
        frame = frame.f_back
    kinds = [kind for name, kind in KINDS.items() if name in functions]
    return kinds[0] if kinds else "gradients"


def predict_bytes(
    method: Any,
    strategy: str,
    *,
    dim: int,
    rows: int,
    calls: int,
    itemsize: int = 8,
    embedding_itemsize: int = 8,
) -> dict[str, Fraction | int]:
    """Return the bytes by kind, as in the table of docs/scaling.md.

    Args:
        method: The method.
        strategy: ddp or fsdp.
        dim: Dimension of an embedding.
        rows: Images of this rank, in two views each.
        calls: Forward passes per step: 1 if the views are concatenated, 2 if not.
        itemsize: Bytes per number. 8 is float64.
        embedding_itemsize: Bytes per number of an embedding, 2 under autocast.
    """
    world, size, views = process_group.world_size(), itemsize, 2
    num_others, all_reduced = world - 1, Fraction(2 * (world - 1), world)
    teacher = getattr(method, "teacher", nn.Module())
    norms, teacher_norms = _count_norm_channels(method), _count_norm_channels(teacher)
    trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
    sent = {
        "gather": num_others * views * rows * dim * embedding_itemsize,
        # Keys of a teacher carry no gradient.
        "loss backward": 0 if teacher_norms else num_others * views * rows * 3 * size,
        "batch norm forward": calls * num_others * sum(2 * c + 1 for c in norms) * size,
        "batch norm backward": calls * all_reduced * 2 * (sum(norms) - sum(teacher_norms)) * size,
    }
    if strategy == "ddp":
        return sent | {
            "gradients": all_reduced * sum(parameter.numel() for parameter in trained) * size
        }
    gathered, rest = 0, _numel_per_rank(method.parameters())
    for network in (
        method.backbone,
        *(child for child in teacher.children() if isinstance(child, components.Backbone)),
    ):
        in_blocks = sum(_numel_per_rank(unit.parameters()) for _, unit in backbones.blocks(network))
        outside_blocks = _numel_per_rank(network.parameters()) - in_blocks
        gathered += calls * (in_blocks + outside_blocks)
        if network is method.backbone:  # the backward pass gathers again
            gathered += calls * in_blocks + outside_blocks
        rest -= in_blocks + outside_blocks
    # LARS adapts the weights of more than one dimension.
    num_adapted = sum(parameter.ndim > 1 for parameter in trained) if not teacher_norms else 0
    return sent | {
        "weights": num_others * (gathered + rest) * size,
        "gradients": num_others
        * _numel_per_rank(trained)
        * size,  # once, after the backward pass of the last call
        "norms": all_reduced * (len(trained) + 2 * num_adapted) * size,
    }


def _count_norm_channels(module: nn.Module) -> list[int]:
    return [len(norm.running_mean) for norm in module.modules() if isinstance(norm, GroupBatchNorm)]


def _numel_per_rank(parameters: Any) -> int:
    """Return how many elements of these parameters a rank holds if their rows are sharded."""
    world = process_group.world_size()
    return sum(-(-len(p) // world) * (p.numel() // len(p)) for p in parameters)
