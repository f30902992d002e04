"""The batch of views that a method takes, and copies of tensors to a device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One rank's images of one step, on the device.

    Attributes:
        views: One tensor per view, global views first, each (B, 3, height, width) and normalized.
            They are float32, or bfloat16 if the GPU computes in bfloat16.
        labels: int64 (B,), -1 for an image without a label.
        indices: int64 (B,), indices of the images in the source. An unreadable image keeps its
            index, but has the pixels and the label of its replacement.
    """

    views: list[Tensor]
    labels: Tensor
    indices: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on a device."""
        return Batch(
            [view.to(device) for view in self.views],
            self.labels.to(device),
            self.indices.to(device),
        )

    def slice(self, index: int, num_slices: int) -> Batch:
        """Return slice `index` of `num_slices` slices of equal length, counted from 0.

        Raises:
            ValueError: If the images do not divide evenly.
        """
        if len(self) % num_slices:
            raise ValueError(
                f"a batch of {len(self)} images does not divide into {num_slices} equal slices"
            )
        size = len(self) // num_slices
        rows = slice(index * size, (index + 1) * size)
        return Batch([view[rows] for view in self.views], self.labels[rows], self.indices[rows])


def upload(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return the tensor on a device, without waiting for the copy.

    A copy to a GPU goes through pinned memory, which torch keeps until the copy is done. A copy
    from other memory would block the host.
    """
    device = torch.device(device)
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
