"""Traces of a computation, with the cost, memory traffic and memory use of each operation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

MATMUL, CONVOLUTION, OTHER = range(3)


@dataclass(frozen=True)
class TensorSpec:
    """Shape, dtype and `requires_grad` of a tensor that a computation returned."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    @classmethod
    def from_tensor(cls, tensor: Tensor) -> TensorSpec:
        """Return the spec of a tensor."""
        return cls(tuple(tensor.shape), tensor.dtype, tensor.requires_grad)

    def empty(self) -> Tensor:
        """Return an uninitialized tensor with this spec on the current default device."""
        return torch.empty(self.shape, dtype=self.dtype, requires_grad=self.requires_grad)


@dataclass
class Trace:
    """Operations of a computation in their order. Each array has one entry per operation."""

    flops: np.ndarray
    bytes_moved: np.ndarray  # bytes read and written
    bytes_held: np.ndarray  # memory in use after the operation, relative to the start
    kinds: np.ndarray  # MATMUL, CONVOLUTION or OTHER
    without_tensor_cores: np.ndarray  # True for operations in float32 and float64
    collectives: list[tuple[str, int]]  # name, and bytes of all ranks together
    # Number of channels of each batch norm, by pass ("forward" or "backward").
    batch_norm_channels: dict[str, list[int]]
    # Index of each phase's first operation.
    phase_starts: dict[str, int] = field(default_factory=lambda: {"": 0})

    def phase(self, name: str) -> Trace:
        """Return the operations of one phase."""
        ends = [*self.phase_starts.values(), len(self.flops)]
        span = slice(self.phase_starts[name], ends[list(self.phase_starts).index(name) + 1])
        return Trace(
            self.flops[span],
            self.bytes_moved[span],
            self.bytes_held[span],
            self.kinds[span],
            self.without_tensor_cores[span],
            self.collectives,
            self.batch_norm_channels,
        )

    @property
    def peak_bytes(self) -> int:
        """Largest number of bytes in use after any operation, relative to the start."""
        return int(self.bytes_held.max(initial=0))


@dataclass
class LinearTrace:
    """Trace of a computation for any number of images, interpolated from two traces.

    Two traces are enough, because operations, bytes and shapes are linear in the number of images.
    """

    small: Trace
    large: Trace
    num_small_images: int
    num_large_images: int

    def __post_init__(self) -> None:
        assert np.array_equal(self.small.kinds, self.large.kinds), (
            "the operations must not depend on the number of images"
        )

    def trace_for(self, num_images: int) -> Trace:
        """Return the trace for a number of images."""
        small, large, weight = self.small, self.large, self.weight(num_images)
        return replace(
            small,
            flops=small.flops + (large.flops - small.flops) * weight,
            bytes_moved=small.bytes_moved + (large.bytes_moved - small.bytes_moved) * weight,
            bytes_held=small.bytes_held + (large.bytes_held - small.bytes_held) * weight,
        )

    def weight(self, num_images: int) -> float:
        """Return the weight of the large trace in the interpolation for a number of images."""
        small, large = self.num_small_images, self.num_large_images
        return (num_images - small) / (large - small)

    def specs_for(
        self, small: Mapping[str, TensorSpec], large: Mapping[str, TensorSpec], num_images: int
    ) -> dict[str, TensorSpec]:
        """Return the specs of results for a number of images, given the specs of both traces."""
        weight = self.weight(num_images)
        return {
            name: replace(
                small[name],
                shape=tuple(
                    round(a + (b - a) * weight)
                    for a, b in zip(small[name].shape, large[name].shape)
                ),
            )
            for name in small
        }
