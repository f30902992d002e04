"""Correlation and covariance of embeddings over the global batch, with their exact gradient.

A (dim, dim) matrix is summed over ranks in one collective, and every rank gets all of it. If the
matrix is larger than the embeddings of all ranks, the embeddings are gathered instead, and each
rank computes only its own columns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.losses.similarity import upcast


@dataclass(frozen=True)
class GlobalMatrix:
    """A (dim, dim) matrix over the global batch, or this rank's columns of it.

    Attributes:
        columns: Shape (dim, columns).
        first_column: Index of the first of these columns in the matrix.
        num_shards: Number of ranks if each has its own columns, 1 if every rank has all of them.
    """

    columns: Tensor
    first_column: int
    num_shards: int

    def diagonal(self) -> Tensor:
        """Return the matrix's diagonal in these columns, shape (columns,)."""
        return self.columns.diagonal(-self.first_column)

    def off_diagonal(self) -> Tensor:
        """Return these columns with zeros on the matrix's diagonal, shape (dim, columns)."""
        zeros = torch.zeros_like(self.columns)
        return self.columns - torch.diagonal_scatter(zeros, self.diagonal(), -self.first_column)

    def sum(self, entries: Tensor) -> Tensor:
        """Return a scalar whose mean over ranks is the sum over the whole matrix.

        Args:
            entries: Values computed from `diagonal` or `off_diagonal`.
        """
        return self.num_shards * entries.sum()


def variance_hinge(covariance: GlobalMatrix) -> Tensor:
    """Return the mean of max(0, 1 - standard deviation), equation 1 of VICReg."""
    deviation = (covariance.diagonal() + 1e-4).sqrt()
    return covariance.sum(F.relu(1 - deviation)) / len(covariance.columns)


def diagonal_error(correlation: GlobalMatrix) -> Tensor:
    """Return the sum of squared differences between the diagonal and 1."""
    return correlation.sum((correlation.diagonal() - 1).square())


def off_diagonal_energy(matrix: GlobalMatrix) -> Tensor:
    """Return the sum of squares off the diagonal."""
    return matrix.sum(matrix.off_diagonal().square())


def cross_correlation(z_a: Tensor, z_b: Tensor, *, eps: float = 1e-5) -> GlobalMatrix:
    """Return the correlation of each dimension of `z_a` with each of `z_b` over the global batch.

    Implements equation 2 of Zbontar et al., ICML 2021 (arXiv:2103.03230). In a single process::

        z_a, z_b = ((z - z.mean(0)) / (z.var(0, correction=0) + eps).sqrt() for z in (z_a, z_b))
        correlation = z_a.T @ z_b / len(z_a)

    Args:
        z_a: Embeddings of the first view, shape (local_batch, dim).
        z_b: Embeddings of the second view, same shape.
        eps: Constant added to the variances, as in the batch norm of the authors' code.
    """
    with torch.autocast(z_a.device.type, enabled=False):
        z_a, count = _center(z_a)
        z_b, _ = _center(z_b)
        sums = torch.stack([z_a.square().sum(0), z_b.square().sum(0)])
        variances = collectives.reduce_sum(sums) / count
        z_a, z_b = (z * (variance + eps).rsqrt() for z, variance in zip((z_a, z_b), variances))
        return _product(z_a, z_b, count, divisor=count)


def global_covariance(z: Tensor) -> GlobalMatrix:
    """Return the covariance of the dimensions of `z` over the global batch of N images.

    Implements equation 3 of Bardes et al., ICLR 2022 (arXiv:2105.04906). In a single process::

        centered = z - z.mean(0)
        covariance = centered.T @ centered / (len(z) - 1)

    Args:
        z: Embeddings, shape (local_batch, dim).
    """
    with torch.autocast(z.device.type, enabled=False):
        z, count = _center(z)
        return _product(z, z, count, divisor=max(1, count - 1))


def _center(z: Tensor) -> tuple[Tensor, int]:
    """Return `z` minus its mean over the global batch, and the size of that batch."""
    z = upcast(z)
    count = len(z) * process_group.world_size()
    return z - collectives.reduce_sum(z.sum(0)) / count, count


def _product(z_a: Tensor, z_b: Tensor, count: int, divisor: int) -> GlobalMatrix:
    """Return z_a.T @ z_b / divisor over the `count` rows of all ranks."""
    dim, world_size = z_a.shape[1], process_group.world_size()
    if world_size == 1 or dim <= count:
        return GlobalMatrix(collectives.reduce_sum(z_a.T @ z_b) / divisor, 0, 1)
    rank = process_group.rank()
    start, end = dim * rank // world_size, dim * (rank + 1) // world_size
    all_a = collectives.gather(z_a)
    all_b = all_a if z_b is z_a else collectives.gather(z_b)
    return GlobalMatrix(all_a.T @ all_b[:, start:end] / divisor, start, world_size)
