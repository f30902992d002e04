"""Correlation and covariance of embeddings over the global batch, without a rank ever seeing less or another gradient.

A dim x dim matrix is either summed over ranks in one collective, every rank then holding all of it, or, where it is larger
than the gathered embeddings, made from them by columns, every rank holding its share. A loss that sums over entries is
`block.share *` the sum over the block's entries: its mean over ranks is the sum over the matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ssl_pretrain.distributed import collectives, process_group


@dataclass(frozen=True)
class Block:
    """Columns `start` to `start + values.shape[1]` of a (dim, dim) matrix."""

    values: Tensor  # (dim, columns)
    start: int
    share: float  # 1 where every rank has all columns, the number of ranks where each has its own

    def diagonal(self) -> Tensor:
        """The matrix's diagonal entries in these columns, (columns,)."""
        return self.values.diagonal(-self.start)

    def off_diagonal(self) -> Tensor:
        """These columns without the diagonal's entries: zero there, (dim, columns)."""
        return self.values - torch.diagonal_scatter(
            torch.zeros_like(self.values), self.diagonal(), -self.start
        )


def centred(z: Tensor) -> tuple[Tensor, int]:
    """`z` (local_batch, dim) minus its mean over the global batch, in float32 or wider, and that batch's size."""
    z = z if z.dtype == torch.float64 else z.float()
    count = len(z) * process_group.world_size()
    return z - collectives.reduce_sum(z.sum(0)) / count, count


def cross_correlation(z_a: Tensor, z_b: Tensor, *, eps: float = 1e-5) -> Block:
    """Correlation of each dimension of `z_a` with each of `z_b`: eq. 2 of Barlow Twins (arXiv:2103.03230).

    `eps` is added to the variances, as its authors' batch norm does.
    """
    with torch.autocast(z_a.device.type, enabled=False):
        z_a, count = centred(z_a)
        z_b, _ = centred(z_b)
        variances = (
            collectives.reduce_sum(torch.stack([z_a.square().sum(0), z_b.square().sum(0)])) / count
        )
        z_a, z_b = (z * (variance + eps).rsqrt() for z, variance in zip((z_a, z_b), variances))
        return _product(z_a, z_b, count)


def covariance(z: Tensor) -> Block:
    """Covariance of the dimensions of `z`, over N - 1: eq. 3 of VICReg (arXiv:2105.04906)."""
    with torch.autocast(z.device.type, enabled=False):
        z, count = centred(z)
        return _product(z, z, count, count - 1)


def _product(z_a: Tensor, z_b: Tensor, count: int, divisor: int | None = None) -> Block:
    """z_a.T @ z_b over all ranks' rows, divided by `divisor` (the count)."""
    dim, world = z_a.shape[1], process_group.world_size()
    if world == 1 or dim <= count:
        return Block(collectives.reduce_sum(z_a.T @ z_b) / (divisor or count), 0, 1.0)
    start, end = (dim * rank // world for rank in (process_group.rank(), process_group.rank() + 1))
    all_a = collectives.gather(z_a)
    all_b = all_a if z_b is z_a else collectives.gather(z_b)
    return Block(all_a.T @ all_b[:, start:end] / (divisor or count), start, float(world))
