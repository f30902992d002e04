"""Records of a computation's operations: what each computes, moves and keeps in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

MATMUL, CONVOLUTION, OTHER = range(3)


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor that a computation returned."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        """Return the shape, dtype and `requires_grad` of a tensor as a spec."""
        return cls(tuple(tensor.shape), tensor.dtype, tensor.requires_grad)

    def empty(self) -> Tensor:
        """Return an uninitialized tensor of this spec on the current default device."""
        return torch.empty(self.shape, dtype=self.dtype, requires_grad=self.requires_grad)


@dataclass
class Trace:
    """Operations of a computation in order, one entry of each array per operation."""

    flops: np.ndarray
    bytes_moved: np.ndarray  # bytes read and written
    bytes_held: np.ndarray  # memory in use after the operation, relative to the start
    kind: np.ndarray  # MATMUL, CONVOLUTION or OTHER
    wide: np.ndarray  # True for float32 and wider, which use no tensor cores
    collectives: list[tuple[str, int]]  # name, and bytes of all ranks together
    norms: dict[str, list[int]]  # channels of each batch norm run forward and backward
    phase_starts: dict[str, int] = field(default_factory=lambda: {"": 0})  # first operations

    def phase(self, name: str) -> Trace:
        """Return the operations of one phase."""
        ends = [*self.phase_starts.values(), len(self.flops)]
        span = slice(self.phase_starts[name], ends[list(self.phase_starts).index(name) + 1])
        return Trace(
            self.flops[span],
            self.bytes_moved[span],
            self.bytes_held[span],
            self.kind[span],
            self.wide[span],
            self.collectives,
            self.norms,
        )

    @property
    def peak(self) -> int:
        """Largest number of bytes in memory."""
        return int(self.bytes_held.max(initial=0))


@dataclass
class LinearTrace:
    """One computation for any number of images.

    Operations, bytes and shapes are linear in the number of images, so two traces are enough to
    know them for every number.
    """

    few: Trace
    more: Trace
    num_few: int
    num_more: int

    def __post_init__(self) -> None:
        assert np.array_equal(self.few.kind, self.more.kind), (
            "the operations must not depend on the number of images"
        )

    def at(self, images: int) -> Trace:
        """Return the trace for a number of images."""
        few, more, weight = self.few, self.more, self.weight(images)
        return replace(
            few,
            flops=few.flops + (more.flops - few.flops) * weight,
            bytes_moved=few.bytes_moved + (more.bytes_moved - few.bytes_moved) * weight,
            bytes_held=few.bytes_held + (more.bytes_held - few.bytes_held) * weight,
        )

    def weight(self, images: int) -> float:
        """Return the position of a number of images between the two traces, 0 at the first."""
        return (images - self.num_few) / (self.num_more - self.num_few)

    def shapes(
        self, few: Mapping[str, TensorSpec], more: Mapping[str, TensorSpec], images: int
    ) -> dict[str, TensorSpec]:
        """Return the shapes of results for a number of images, from those of the two traces."""
        weight = self.weight(images)
        return {
            name: replace(
                few[name],
                shape=tuple(
                    round(a + (b - a) * weight) for a, b in zip(few[name].shape, more[name].shape)
                ),
            )
            for name in few
        }
