"""Configuration of the parallel execution, and which settings go together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from ssl_pretrain.schema import above_zero


@dataclass
class ParallelConfig:
    """How the ranks compute. Only `bn_group_images` and `gradients` change what is computed; the rest is speed and memory."""

    strategy: Literal["ddp", "fsdp", "hybrid"] = (
        "ddp"  # whole weights on every rank | shards over all ranks | shards within each node
    )
    reshard_after_forward: bool = True  # fsdp, hybrid: gather a block's weights again for its backward; false: keep them, faster and larger
    gradients: Literal["float32", "bfloat16"] = "float32"  # as they travel between ranks
    activation_checkpointing: Literal["none", "blocks", "selective"] = (
        "none"  # run again in backward: blocks, or all but their products
    )
    compile: bool = False  # each block by torch.compile
    cuda_graphs: bool = False  # with compile, on CUDA: a block's kernels start as one, for blocks too small to keep a GPU busy
    bn_group_images: int | str = (
        "global"  # images that share batch norm's statistics; part of the recipe
    )
    precision: Literal["auto", "float32", "bfloat16", "float64"] = (
        "auto"  # auto: bfloat16 autocast on GPUs, float32 on CPU
    )
    channels_last: bool = True  # measured 1.3 to 1.5 times faster for ResNets on GPUs
    threads: int = 0  # CPU threads a rank; 0 shares the cores among the ranks of a machine
    accumulation: Literal["auto", "one_pass", "two_passes"] = (
        "auto"  # auto: two passes where a loss couples the batch's images
    )
    deterministic: bool = False  # bit-for-bit runs on a GPU, slower
    timeout_seconds: float = field(
        default=600.0, metadata=above_zero(1e9)
    )  # a collective that waits longer ends the run


def check(config: ParallelConfig) -> None:
    """Refuses settings that do not go together.

    Raises:
        ValueError: names them and what would do.
    """
    if config.compile and config.activation_checkpointing == "selective":
        raise ValueError(
            "parallel.activation_checkpointing: selective does not go with parallel.compile: the compiler chooses what it computes again; "
            "choose none or blocks"
        )
    if config.cuda_graphs and not (config.compile and torch.cuda.is_available()):
        missing = "a CUDA device" if config.compile else "parallel.compile"
        raise ValueError(
            f"parallel.cuda_graphs: true needs {missing}; set parallel.cuda_graphs=false"
        )
    if config.cuda_graphs and config.strategy != "ddp":
        raise ValueError(
            f"parallel.cuda_graphs: true does not go with parallel.strategy {config.strategy}: weights are gathered into another place at "
            "each call, and a graph reads fixed ones; choose one of the two"
        )


def bn_group_images(config: ParallelConfig, global_batch_size: int) -> int:
    """Images in one batch norm group. Raises ValueError for anything but `global` or a positive divisor of the global batch."""
    if config.bn_group_images == "global":
        return global_batch_size
    group = int(config.bn_group_images) if str(config.bn_group_images).isdecimal() else 0
    if group < 1 or global_batch_size % group:
        raise ValueError(
            f"parallel.bn_group_images: {config.bn_group_images!r}; choose global or a divisor of global_batch_size {global_batch_size}"
        )
    return group
