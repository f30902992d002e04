"""A batch of views: what the loader yields and a method takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One rank's images of one step, on the device.

    Attributes:
        views: One tensor per view, global views first, each (B, 3, height, width) and normalized.
            They are float32, or bfloat16 on a GPU that computes in it.
        labels: int64 (B,), -1 for an image without a label.
        indices: int64 (B,), numbers of the images in the source. An unreadable image keeps its
            number. Its pixels and label are those of the image that replaces it.
    """

    views: list[Tensor]
    labels: Tensor
    indices: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on a device."""
        views = [view.to(device) for view in self.views]
        return Batch(views, self.labels.to(device), self.indices.to(device))

    def slice(self, number: int, num_slices: int) -> Batch:
        """Return one of `num_slices` slices of equal length.

        Raises:
            ValueError: The images do not divide evenly.
        """
        if len(self) % num_slices:
            raise ValueError(
                f"a batch of {len(self)} images does not divide into {num_slices} equal slices"
            )
        size = len(self) // num_slices
        rows = slice(number * size, (number + 1) * size)
        return Batch([view[rows] for view in self.views], self.labels[rows], self.indices[rows])
