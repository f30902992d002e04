"""Chunks of crops, which the loader gets from processes, threads or the device cache."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from ssl_pretrain.data.replacement import Replacement


class ChunkRequest(NamedTuple):
    """The images of one chunk.

    Attributes:
        epoch: Number of passes over the data before this one.
        indices: Numbers of the images.
        step: The step to whose batch they belong.
        first_row: Row of the first of them in this rank's batch.
    """

    epoch: int
    indices: np.ndarray
    step: int = 0
    first_row: int = 0


@dataclass(frozen=True)
class Chunk:
    """The crops of a few images.

    Attributes:
        pixels: uint8, flat: view 0 of all images, then view 1 and so on. One tensor takes one piece
            of shared memory and one copy to the device.
        shapes: Shape of each view.
        labels: int64 (n,).
        replacements: The images that could not be read.
        seconds: Time to make the chunk.
        error: Why there are no pixels. The trainer raises it, so that a user reads its message and
            not a worker's traceback.
    """

    pixels: Tensor
    shapes: list[torch.Size]
    labels: np.ndarray
    replacements: list[Replacement]
    seconds: float = 0.0
    error: Exception | None = None

    def pin_memory(self) -> Self:
        """Copy the pixels to pinned memory. torch's DataLoader calls this."""
        return replace(self, pixels=self.pixels.pin_memory())

    def to(self, device: torch.device) -> Self:
        """Copy the pixels to a device without waiting for the copy."""
        return replace(self, pixels=self.pixels.to(device, non_blocking=True))

    def views(self) -> list[Tensor]:
        """Return each view, uint8 (n, 3, size, size). They share the memory of `pixels`."""
        n = len(self.labels)
        blocks = self.pixels.split([n * shape.numel() for shape in self.shapes])
        return [block.view(n, *shape) for block, shape in zip(blocks, self.shapes)]


class ChunkPool(Protocol):
    """Makes the chunks of requests: worker processes, compiled threads or the device itself."""

    def take(self, requests: Iterable[ChunkRequest]) -> Iterator[Chunk]:
        """Return the chunks in the order of their requests. A new call ends the one before."""
        ...

    def close(self) -> None:
        """Release processes, threads, files and memory. Idempotent."""
        ...
