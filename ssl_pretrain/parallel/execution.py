"""Device, number formats and memory layout of a run, resolved once from its configuration."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ssl_pretrain.parallel.parallel_config import ParallelConfig


@dataclass(frozen=True)
class Execution:
    """Device and number formats of the forward pass and the loss on one rank."""

    device: torch.device
    dtype: torch.dtype  # for weights, statistics and losses: float32, or float64 in tests
    memory_format: torch.memory_format  # for views, and for weights that are not sharded
    autocast: bool  # run the forward pass under bfloat16 autocast

    @classmethod
    def resolve(cls, config: ParallelConfig, device: torch.device) -> Execution:
        """Return the execution that a configuration asks for on this kind of device."""
        precision = config.precision
        if precision == "auto":
            precision = "bfloat16" if device.type == "cuda" else "float32"
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
        """Return the context of the forward pass: bfloat16 autocast if it is on.

        Weights, batch norm statistics and losses stay float32.
        """
        if not self.autocast:
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def place_views(self, views: list[Tensor]) -> list[Tensor]:
        """Convert views to the model's memory format and to a dtype that it takes.

        Views in the loader's bfloat16 keep it. Evaluations run without autocast and pass float32,
        which stays float32, or becomes float64 if the model is in float64.
        """
        return [view.to(self._dtype_of(view), memory_format=self.memory_format) for view in views]

    def _dtype_of(self, view: Tensor) -> torch.dtype:
        if self.dtype == torch.float64 or view.dtype != self.view_dtype:
            return self.dtype
        return view.dtype

    def place_module(self, module: nn.Module, sharded: bool = False) -> nn.Module:
        """Move a module to the device, in its dtype and memory format.

        Sharded weights keep the plain layout, because a shard is a range of rows of it.
        """
        module = module.to(device=self.device, dtype=self.dtype)
        if self.memory_format == torch.channels_last and not sharded:
            module = module.to(memory_format=self.memory_format)  # type: ignore[call-overload]
        return module
