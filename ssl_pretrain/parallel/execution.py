"""Parallel settings of a run, and the device and number formats that follow from them."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor, nn

from ssl_pretrain.parallel import cpu_convolutions
from ssl_pretrain.schema import setting


@dataclass
class ParallelConfig:
    """Settings of the computation on several ranks.

    Only `bn_group_images`, `gradients`, `precision` and `accumulation` can change results by more
    than rounding. The other settings affect speed and memory.
    """

    strategy: Literal["ddp", "fsdp", "hybrid"] = setting(
        "ddp",
        "ddp: every rank has all weights. fsdp: weights are sharded over all ranks. "
        "hybrid: weights are sharded within each node.",
        on_resume="free",
    )
    reshard_after_forward: bool = setting(
        True,
        "fsdp and hybrid: free a block's gathered weights after its forward pass and gather them "
        "again for its backward pass. false: keep them, which is faster and takes more memory.",
        on_resume="free",
    )
    gradients: Literal["float32", "bfloat16"] = setting(
        "float32", "Data type of gradients sent between ranks."
    )
    activation_checkpointing: Literal["none", "blocks", "selective"] = setting(
        "none",
        "Activations to recompute in the backward pass. blocks: all activations of each block. "
        "selective: all except the outputs of matrix products.",
        on_resume="free",
    )
    compile: bool = setting(
        False,
        "Compile blocks, stem and heads with torch.compile. The first step then takes a minute or "
        "more, and less if TORCHINDUCTOR_CACHE_DIR holds the graphs of an earlier run.",
        on_resume="free",
    )
    cuda_graphs: bool = setting(
        False,
        "With compile, on CUDA: launch a block's kernels as one graph, "
        "for blocks too small to keep a GPU busy.",
        on_resume="free",
    )
    bn_group_images: int | str = setting(
        "global",
        "Number of images that share batch norm statistics, a part of the training recipe. "
        "global: the whole global batch.",
        unit="images",
    )
    precision: Literal["auto", "float32", "bfloat16", "float64"] = setting(
        "auto",
        "Data type of the computation. auto: bfloat16 autocast on GPUs, and on CPUs with bfloat16 "
        "instructions (AVX-512 BF16 or AMX). float32 on other CPUs.",
    )
    channels_last: bool = setting(
        True,
        "Store images and weights channels last, which makes ResNets 1.3 to 1.5 times faster "
        "on GPUs.",
        on_resume="free",
    )
    threads: int = setting(
        0,
        "CPU threads per rank. If 0, the ranks of a machine share its cores equally.",
        on_resume="free",
    )
    accumulation: Literal["auto", "one_pass", "two_passes"] = setting(
        "auto",
        "How micro-batches are accumulated. auto: two passes if the loss compares images of the "
        "batch with each other, else one. If the loss combines the targets of the whole batch, "
        "all targets are computed before that pass.",
    )
    deterministic: bool = setting(
        False, "Make runs on a GPU reproducible bit for bit, which is slower.", on_resume="free"
    )
    timeout_seconds: float = setting(
        600.0,
        "How long a collective operation may wait before the run ends.",
        on_resume="free",
        above=0,
        maximum=1e9,
    )


@dataclass(frozen=True)
class Execution:
    """Device and number formats of the forward pass and the loss on one rank."""

    device: torch.device
    dtype: torch.dtype  # for weights, statistics and losses: float32, or float64 in tests
    memory_format: torch.memory_format  # for views, and for weights that are not sharded
    autocast: bool  # True to run the forward pass under bfloat16 autocast

    @classmethod
    def resolve(cls, config: ParallelConfig, device: torch.device) -> Self:
        """Return the execution that a configuration asks for on this device."""
        precision = resolve_precision(config, device)
        return cls(
            device,
            torch.float64 if precision == "float64" else torch.float32,
            torch.channels_last if config.channels_last else torch.contiguous_format,
            autocast=precision == "bfloat16",
        )

    @property
    def view_dtype(self) -> torch.dtype:
        """Dtype of the views that leave the loader.

        Autocast would round float32 views to bfloat16 in the first layer anyway.
        """
        return torch.bfloat16 if self.device.type == "cuda" and self.autocast else torch.float32

    def forward_context(self) -> AbstractContextManager[object]:
        """Return a context for the forward pass, with bfloat16 autocast if that is enabled.

        Weights, batch norm statistics and losses stay float32.
        """
        return torch.autocast(self.device.type, torch.bfloat16) if self.autocast else nullcontext()

    def place_views(self, views: list[Tensor]) -> list[Tensor]:
        """Convert views to a dtype and a memory format that the model accepts.

        bfloat16 views from the loader stay bfloat16. Evaluations pass float32 views, which stay
        float32. For a float64 model all views become float64.
        """
        keeps_dtype = self.dtype != torch.float64
        return [
            view.to(
                view.dtype if keeps_dtype and view.dtype == self.view_dtype else self.dtype,
                memory_format=self.memory_format,
            )
            for view in views
        ]

    def place_module(self, module: nn.Module, is_sharded: bool = False) -> nn.Module:
        """Move a module to the device and convert it to the dtype and the memory format.

        Sharded weights stay contiguous, because a shard is a range of rows.
        """
        module = module.to(device=self.device, dtype=self.dtype)
        if self.memory_format == torch.channels_last and not is_sharded:
            module = module.to(memory_format=self.memory_format)  # type: ignore[call-overload]
        self.correct_convolutions(module)
        return module

    def correct_convolutions(self, module: nn.Module) -> None:
        """Make convolutions use float32 on a CPU where their bfloat16 gradients would be wrong."""
        if self.autocast and self.device.type == "cpu":
            cpu_convolutions.avoid_wrong_gradients(module)


def resolve_precision(config: ParallelConfig, device: torch.device) -> str:
    """Return the precision that a configuration asks for on this device, with `auto` replaced."""
    if config.precision != "auto":
        return config.precision
    is_fast = device.type == "cuda" or (device.type == "cpu" and cpu_has_bfloat16())
    return "bfloat16" if is_fast else "float32"


def cpu_has_bfloat16() -> bool:
    """Return True if this CPU has instructions for bfloat16 products and torch uses them.

    The environment variable ATEN_CPU_CAPABILITY can limit torch to older instructions.
    """
    if not torch.backends.cpu.get_cpu_capability().startswith(("AVX512", "AMX")):
        return False
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)


def check(config: ParallelConfig) -> None:
    """Refuse settings that exclude each other.

    Raises:
        ValueError: If two settings exclude each other. The message names both and a remedy.
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
    num_images = int(config.bn_group_images) if str(config.bn_group_images).isdecimal() else 0
    if num_images < 1 or global_batch_size % num_images:
        raise ValueError(
            f"parallel.bn_group_images: {config.bn_group_images!r} is not valid; choose global "
            f"or a divisor of global_batch_size {global_batch_size}"
        )
    return num_images
