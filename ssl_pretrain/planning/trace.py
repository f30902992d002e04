"""Records of a computation's operations: what each computes, moves and keeps in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

MATMUL, CONVOLUTION, OTHER = range(3)


@dataclass(frozen=True)
class Shape:
    """Shape and type of a tensor that a computation returned."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    trained: bool

    @classmethod
    def of(cls, tensor: Tensor) -> Shape:
        return cls(tuple(tensor.shape), tensor.dtype, tensor.requires_grad)

    def empty(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, requires_grad=self.trained)


@dataclass
class Trace:
    """Operations of a computation in order, one entry of each array per operation."""

    flops: np.ndarray
    moved: np.ndarray  # bytes read and written
    held: np.ndarray  # bytes in memory after the operation, beyond those before the computation
    kind: np.ndarray  # MATMUL, CONVOLUTION or OTHER
    wide: np.ndarray  # True for float32 and wider, which use no tensor cores
    sent: list[tuple[str, int]]  # collectives, with the bytes of all ranks together
    norms: dict[str, list[int]]  # channels of each batch norm run forward and backward
    marks: dict[str, int] = field(default_factory=lambda: {"": 0})  # first operation of each phase

    def phase(self, name: str) -> Trace:
        """Return the operations of one phase."""
        ends = [*self.marks.values(), len(self.flops)]
        span = slice(self.marks[name], ends[list(self.marks).index(name) + 1])
        return Trace(
            self.flops[span],
            self.moved[span],
            self.held[span],
            self.kind[span],
            self.wide[span],
            self.sent,
            self.norms,
        )

    @property
    def peak(self) -> int:
        """Largest number of bytes in memory."""
        return int(self.held.max(initial=0))


@dataclass
class Line:
    """One computation for any number of images.

    Operations, bytes and shapes are linear in the number of images, so two traces give them all.
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
            moved=few.moved + (more.moved - few.moved) * weight,
            held=few.held + (more.held - few.held) * weight,
        )

    def weight(self, images: int) -> float:
        """Return the position of a number of images between the two traces, 0 at the first."""
        return (images - self.num_few) / (self.num_more - self.num_few)

    def shapes(
        self, few: Mapping[str, Shape], more: Mapping[str, Shape], images: int
    ) -> dict[str, Shape]:
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
