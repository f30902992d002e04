"""Empirical characteristic functions of projected embeddings, in tiles of bounded memory."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

NUM_POINTS = 17  # points t in [0, LAST_POINT]
LAST_POINT = 3.0
# Largest number of elements of a tile, 64 MiB in float32. Two to four tiles exist at a time.
TILE_NUMBERS = 1 << 24


def points(like: Tensor) -> Tensor:
    """Return the points t, shape (NUM_POINTS,), with the device and data type of a tensor."""
    return torch.linspace(0, LAST_POINT, NUM_POINTS, dtype=like.dtype, device=like.device)


def characteristic_sums(z: Tensor, slices: Tensor) -> Tensor:
    """Sum cos(t x) and sin(t x) over this rank's images, for each projection x = z @ slices.

    The products t * x, of shape (local_batch, views, num_slices, points), are only computed for a
    few slices at a time. The backward pass computes them again.

    Args:
        z: Embeddings, float32 or float64, shape (local_batch, views, dim).
        slices: Directions, of the same type, shape (dim, num_slices). They get no gradient.

    Returns:
        Shape (2, views, num_slices, points).
    """
    sums: Tensor = _CharacteristicSums.apply(z, slices)
    return sums


class _CharacteristicSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, slices: Tensor) -> Tensor:
        ctx.save_for_backward(z, slices)
        t = points(z)
        tiles = []
        for columns in _tiles(z, slices):
            angles = (z @ slices[:, columns])[..., None] * t
            tiles.append(torch.stack([angles.cos().sum(0), angles.sin_().sum(0)]))
        return torch.cat(tiles, dim=2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        z, slices = ctx.saved_tensors
        t = points(z)
        z_grad = torch.zeros_like(z)
        with torch.autocast(z.device.type, enabled=False):
            for columns in _tiles(z, slices):
                tile = slices[:, columns]
                angles = (z @ tile)[..., None] * t
                cosines_grad, sines_grad = grad[:, :, columns] * t
                derivatives = angles.cos().mul_(sines_grad)
                derivatives.sub_(angles.sin_().mul_(cosines_grad))
                z_grad += derivatives.sum(-1) @ tile.T
        return z_grad, None


def _tiles(z: Tensor, slices: Tensor) -> Iterator[slice]:
    """Yield ranges of slices whose tiles have at most `TILE_NUMBERS` elements, or one slice."""
    num_embeddings, num_slices = z.shape[0] * z.shape[1], slices.shape[1]
    width = max(1, TILE_NUMBERS // (num_embeddings * NUM_POINTS))
    for start in range(0, num_slices, width):
        yield slice(start, min(start + width, num_slices))
