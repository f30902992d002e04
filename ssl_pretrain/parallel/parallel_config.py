"""Configuration of the parallel execution, and a check that its settings go together."""

from dataclasses import dataclass
from typing import Literal

import torch

from ssl_pretrain.schema import setting


@dataclass
class ParallelConfig:
    """Settings of the computation on several ranks.

    Only `bn_group_images`, `gradients`, `precision` and `accumulation` can change results beyond
    rounding. The other settings are about speed and memory.
    """

    strategy: Literal["ddp", "fsdp", "hybrid"] = setting(
        "ddp",
        "ddp: every rank holds all weights. fsdp: weights are sharded over all ranks. "
        "hybrid: weights are sharded within each node.",
        on_resume="free",
    )
    reshard_after_forward: bool = setting(
        True,
        "fsdp and hybrid: free a block's gathered weights after its forward and gather them again "
        "for its backward. false: keep them, which is faster and takes more memory.",
        on_resume="free",
    )
    gradients: Literal["float32", "bfloat16"] = setting(
        "float32", "Data type of gradients sent between ranks."
    )
    activation_checkpointing: Literal["none", "blocks", "selective"] = setting(
        "none",
        "Activations recomputed during backward. blocks: all of each block. "
        "selective: all but the matrix products.",
        on_resume="free",
    )
    compile: bool = setting(False, "Compile each block with torch.compile.", on_resume="free")
    cuda_graphs: bool = setting(
        False,
        "With compile, on CUDA: launch a block's kernels as one graph, "
        "for blocks too small to keep a GPU busy.",
        on_resume="free",
    )
    bn_group_images: int | str = setting(
        "global",
        "Images that share batch norm's statistics, which is part of the recipe. "
        "global: the whole global batch.",
    )
    precision: Literal["auto", "float32", "bfloat16", "float64"] = setting(
        "auto", "Data type of the computation. auto: bfloat16 autocast on GPUs, float32 on CPU."
    )
    channels_last: bool = setting(
        True,
        "Store images and weights channels last, which makes ResNets 1.3 to 1.5 times faster "
        "on GPUs.",
        on_resume="free",
    )
    threads: int = setting(
        0,
        "CPU threads per rank. 0: the ranks of a machine share its cores equally.",
        on_resume="free",
    )
    accumulation: Literal["auto", "one_pass", "two_passes"] = setting(
        "auto",
        "How micro-batches are accumulated. auto: two passes if the loss compares images of the "
        "batch with each other, else one.",
    )
    deterministic: bool = setting(
        False, "Make runs on a GPU reproducible bit for bit, which is slower.", on_resume="free"
    )
    timeout_seconds: float = setting(
        600.0,
        "Seconds a collective may wait before the run ends.",
        on_resume="free",
        above=0,
        maximum=1e9,
    )


def check(config: ParallelConfig) -> None:
    """Refuse settings that exclude each other.

    Raises:
        ValueError: If there are any. The message names the keys, their values and a remedy.
    """
    if config.compile and config.activation_checkpointing == "selective":
        raise ValueError(
            "parallel.activation_checkpointing: selective cannot be combined with "
            "parallel.compile, because the compiler chooses what to recompute; choose none or "
            "blocks"
        )
    if config.cuda_graphs and not (config.compile and torch.cuda.is_available()):
        missing = "a CUDA device" if config.compile else "parallel.compile"
        raise ValueError(
            f"parallel.cuda_graphs: true needs {missing}; set parallel.cuda_graphs=false"
        )
    if config.cuda_graphs and config.strategy != "ddp":
        raise ValueError(
            "parallel.cuda_graphs: true cannot be combined with parallel.strategy "
            f"{config.strategy}, because each call gathers the weights into new memory and a "
            "graph reads from fixed addresses; choose one of the two"
        )


def bn_group_images(config: ParallelConfig, global_batch_size: int) -> int:
    """Return the number of images in one batch norm group.

    Raises:
        ValueError: If the key is neither `global` nor a divisor of the global batch size.
    """
    if config.bn_group_images == "global":
        return global_batch_size
    group = int(config.bn_group_images) if str(config.bn_group_images).isdecimal() else 0
    if group < 1 or global_batch_size % group:
        raise ValueError(
            f"parallel.bn_group_images: {config.bn_group_images!r}; choose global or a divisor of "
            f"global_batch_size {global_batch_size}"
        )
    return group
