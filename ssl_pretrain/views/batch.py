"""The batch of views, masks and texts that a method takes, and copies of tensors to a device."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class MaskSet:
    """Masks of one view of each image: sets of patches that a method names, such as "visible".

    A patch is numbered row by row. The configuration fixes the number of indices per mask, so that
    compiled code sees a single shape. A smaller mask is filled up with padding.

    Attributes:
        name: What the method calls the patches: "visible", "masked", "context" or "targets".
        view: Index of the view in `Batch.views`.
        indices: Numbers of the patches, int64 (B, masks per image, patches per mask).
        valid: False for padding, whose index is 0, bool of the same shape.
    """

    name: str
    view: int
    indices: Tensor
    valid: Tensor

    def as_grid(self, num_patches: int, k: int = 0) -> Tensor:
        """Return True for the patches of mask `k`, bool (B, num_patches).

        Args:
            num_patches: Patches of the view.
            k: Index of the mask, for views with several masks per image.
        """
        indices, valid = self.indices[:, k], self.valid[:, k]
        # Padding is written to one more column, which is then dropped.
        columns = torch.where(valid, indices, num_patches)
        grid = torch.zeros(len(indices), num_patches + 1, dtype=torch.bool, device=indices.device)
        return grid.scatter_(1, columns, valid)[:, :num_patches]

    def map(self, function: Callable[[Tensor], Tensor]) -> MaskSet:
        """Return the masks with a function applied to both tensors."""
        return replace(self, indices=function(self.indices), valid=function(self.valid))

    def upload(self, device: torch.device | str) -> MaskSet:
        """Return the masks on a device, without waiting for the copies."""
        return self.map(lambda tensor: upload(tensor, device))


@dataclass(frozen=True)
class TextSet:
    """One text of each item, such as the caption of an image or a sentence of a pair, as tokens.

    The configuration fixes the number of tokens. Longer texts are cut and shorter ones are padded.

    Attributes:
        ids: Numbers of the tokens in the tokenizer's vocabulary, int64 (B, T).
        valid: False for padding, bool (B, T).
    """

    ids: Tensor
    valid: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> TextSet:
        """Return the texts with a function applied to both tensors."""
        return TextSet(function(self.ids), function(self.valid))

    def upload(self, device: torch.device | str) -> TextSet:
        """Return the texts on a device, without waiting for the copies."""
        return self.map(lambda tensor: upload(tensor, device))


@dataclass(frozen=True)
class Batch:
    """One rank's items of one step, on the device. An item is an image, a text, or both.

    Attributes:
        views: One tensor per view, global views first, each (B, C, height, width) and normalized.
            They are float32, or bfloat16 if the GPU computes in bfloat16.
        labels: int64 (B,), -1 for an image without a label.
        indices: int64 (B,), indices of the images in the source. An unreadable image keeps its
            index, but has the pixels and the label of its replacement.
        masks: The masks of all views whose crop has `mask.kind`, in the order of the views.
        texts: The texts of the items, such as one caption per image, or the two or three sentences
            of a pair.
    """

    views: list[Tensor]
    labels: Tensor
    indices: Tensor
    masks: tuple[MaskSet, ...] = ()
    texts: tuple[TextSet, ...] = ()

    def __len__(self) -> int:
        return len(self.indices)

    def masks_named(self, name: str) -> list[MaskSet]:
        """Return the masks with this name, one set per view that has them."""
        return [masks for masks in self.masks if masks.name == name]

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on a device."""
        return self._map(lambda tensor: tensor.to(device))

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
        return self.rows(builtins.slice(index * size, (index + 1) * size))

    def rows(self, rows: builtins.slice) -> Batch:
        """Return some of the items, with their masks and texts."""
        return self._map(lambda tensor: tensor[rows])

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """Return the batch with a function applied to every tensor."""
        return Batch(
            [function(view) for view in self.views],
            function(self.labels),
            function(self.indices),
            tuple(masks.map(function) for masks in self.masks),
            tuple(texts.map(function) for texts in self.texts),
        )


def concatenate(batches: Sequence[Batch]) -> Batch:
    """Return one batch of the items of all batches, which have the same views, masks and texts."""
    return Batch(
        [torch.cat(views) for views in zip(*(batch.views for batch in batches))],
        torch.cat([batch.labels for batch in batches]),
        torch.cat([batch.indices for batch in batches]),
        tuple(
            replace(
                sets[0],
                indices=torch.cat([masks.indices for masks in sets]),
                valid=torch.cat([masks.valid for masks in sets]),
            )
            for sets in zip(*(batch.masks for batch in batches))
        ),
        tuple(
            TextSet(
                torch.cat([texts.ids for texts in sets]), torch.cat([texts.valid for texts in sets])
            )
            for sets in zip(*(batch.texts for batch in batches))
        ),
    )


def blank_texts(
    lengths: Sequence[int], num_items: int, device: torch.device | str
) -> tuple[TextSet, ...]:
    """Return texts of zeros in the shapes of a run, one per length in tokens."""
    return tuple(
        TextSet(
            torch.zeros(num_items, length, dtype=torch.int64, device=device),
            torch.ones(num_items, length, dtype=torch.bool, device=device),
        )
        for length in lengths
    )


def upload(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return the tensor on a device, without waiting for the copy.

    A copy to a GPU goes through pinned memory, which torch keeps until the copy is done. A copy
    from other memory would block the host.
    """
    device = torch.device(device)
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
