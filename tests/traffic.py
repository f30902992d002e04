"""Bytes that a rank sends in a step, counted at the collectives, and by the formulas of docs/scaling.md."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_pretrain import backbones, distributed
from ssl_pretrain.batch_norm import GroupBatchNorm

# the innermost of these functions that is calling says what a collective is for; DDP's reducer is C++ and has none
KINDS = {
    "_Synchronized.forward": "batch norm forward",
    "_Synchronized.backward": "batch norm backward",
    "foreach_all_gather": "weights",
    "foreach_reduce": "gradients",
    "norms": "norms",
    "_Gather.forward": "gather",
    "_Gather.backward": "loss backward",
}


class Traffic(TorchDispatchMode):
    """Counts, by kind, what a ring sends from each rank: (W - 1) parts of a gather or a reduce-scatter, twice that of an all-reduce,
    a part being what one rank gives to a gather, or gets from a reduction."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            name = function.overloadpacket.__name__
            first = args[0][0] if isinstance(args[0], list) else args[0]
            second = args[1][0] if isinstance(args[1], list) else args[1]
            world = distributed.world_size()
            size = {"_allgather_base_": second, "_reduce_scatter_base_": first, "allreduce_": first}[name]
            size = size.numel() * size.element_size()
            self.sent[_kind()] += 2 * (world - 1) * size // world if name == "allreduce_" else (world - 1) * size
        return function(*args, **(kwargs or {}))


def _kind() -> str:
    frame: Any = sys._getframe()
    calling = []
    while frame is not None:
        calling.append(frame.f_code.co_qualname)
        frame = frame.f_back
    outer = [kind for name, kind in KINDS.items() if name in calling]
    return outer[0] if outer else "gradients"


def predicted(method: nn.Module, strategy: str, *, dim: int, rows: int, views: int) -> dict[str, int]:
    """The table of docs/scaling.md, for a student without a teacher whose backbone is called once a step.

    Args:
        dim: of an embedding.
        rows: images of this rank.
    """
    world, size = distributed.world_size(), 8  # bytes of a float64
    others = world - 1
    channels = [len(norm.running_mean) for norm in method.modules() if isinstance(norm, GroupBatchNorm)]
    sent = {
        "gather": others * views * rows * dim * size,
        "loss backward": others * views * rows * dim * size,
        "batch norm forward": sum(others * (2 * c + 1) * size for c in channels),
        "batch norm backward": sum(2 * others * 2 * c * size // world for c in channels),
    }
    if strategy == "ddp":
        numbers = sum(parameter.numel() for parameter in method.parameters())
        return sent | {"gradients": 2 * others * numbers * size // world}
    units = [block for _, block in backbones.blocks(method)]
    shares = [_share(unit.parameters()) for unit in units]
    backbone = _share(method.backbone.parameters()) - sum(shares)  # type: ignore[operator]
    rest = _share(method.parameters()) - sum(shares) - backbone
    again = sum(shares) + backbone  # gathered for the forward, and again for the backward
    tensors = list(method.parameters())
    adapted = sum(parameter.ndim > 1 for parameter in tensors)
    return sent | {
        "weights": others * (2 * again + rest) * size,
        "gradients": others * (again + rest) * size,
        "norms": 2 * others * len(tensors) * size // world + 2 * others * 2 * adapted * size // world,
    }


def _share(parameters: Any) -> int:
    """Numbers that each rank has of these parameters: of their first dimension an equal part, rounded up."""
    world = distributed.world_size()
    return sum(-(-len(p) // world) * (p.numel() // len(p)) for p in parameters)
