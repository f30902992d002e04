"""Correlation and covariance over ranks against a plain float64 form, in value and gradient, summed or gathered."""

from __future__ import annotations

import pytest
import torch
from conftest import run_ranks

from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.losses.second_moments import cross_correlation, global_covariance

pytestmark = pytest.mark.promise

ROWS = 12


def views(dim):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, ROWS, dim, dtype=torch.float64, generator=generator).unbind()


def weights(dim):
    """Every entry of the matrix counts differently, and the diagonal's in another way."""
    return torch.arange(1.0, 1 + dim * dim, dtype=torch.float64).view(dim, dim).sin()


def penalty(block, weight):
    part = weight[:, block.start : block.start + block.columns.shape[1]]
    diagonal = weight.diagonal()[block.start : block.start + block.columns.shape[1]]
    return block.sum(
        (part * block.off_diagonal()).square().sum() + (diagonal * (block.diagonal() - 1)).sum()
    )


def _ours(kind, dim):
    """This rank's value and the gradient of a shared weight, averaged over ranks as DDP does."""
    rank, world = process_group.rank(), process_group.world_size()
    own = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    shared = torch.eye(dim, dtype=torch.float64).add(0.1).requires_grad_()
    z_a, z_b = (z[own] @ shared for z in views(dim))
    block = cross_correlation(z_a, z_b) if kind == "correlation" else global_covariance(z_a)
    loss = penalty(block, weights(dim))
    loss.backward()
    return loss.item(), collectives.reduce_sum(shared.grad) / world, block.columns.shape


def plain(kind, dim):
    shared = torch.eye(dim, dtype=torch.float64).add(0.1).requires_grad_()
    z = [z @ shared for z in views(dim)]
    means = [sum(one) / ROWS for one in z]
    loss = torch.zeros((), dtype=torch.float64)
    for i in range(dim):
        for j in range(dim):
            a, b = (
                z[0][:, i] - means[0][i],
                (z[1] - means[1] if kind == "correlation" else z[0] - means[0])[:, j],
            )
            entry = sum(x * y for x, y in zip(a, b)) / (ROWS if kind == "correlation" else ROWS - 1)
            if kind == "correlation":
                entry = entry / ((a.square().mean() + 1e-5) * (b.square().mean() + 1e-5)).sqrt()
            loss = loss + (
                weights(dim)[i, j] * (entry - 1) if i == j else (weights(dim)[i, j] * entry) ** 2
            )
    loss.backward()
    return loss.item(), shared.grad


@pytest.mark.parametrize("kind", ["correlation", "covariance"])
@pytest.mark.parametrize(
    ("world_size", "dim"), [(1, 5), (2, 5), (3, 5), (1, 14), (2, 14), (3, 14)]
)  # 14 > 12 images: gathered
def test_equals_the_equation_in_value_and_gradient(kind, world_size, dim):
    value, gradient = plain(kind, dim)
    ranks = (
        run_ranks(_ours, kind, dim, world_size=world_size) if world_size > 1 else [_ours(kind, dim)]
    )
    assert sum(got for got, _, _ in ranks) / world_size == pytest.approx(value, rel=1e-11)
    for _, got, shape in ranks:
        torch.testing.assert_close(got, gradient, rtol=1e-9, atol=1e-12)
        assert shape[0] == dim and (shape[1] == dim) == (world_size == 1 or dim == 5)


def test_a_constant_shift_of_any_size_changes_nothing():
    z_a, z_b = (z.float() for z in views(4))
    torch.testing.assert_close(
        cross_correlation(z_a + 1000, z_b - 1000).columns,
        cross_correlation(z_a, z_b).columns,
        rtol=1e-3,
        atol=1e-3,
    )
