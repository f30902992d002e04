"""Correlation and covariance over ranks against a plain float64 form, summed or gathered."""

import pytest
import torch
from conftest import run_ranks

from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.losses.second_moments import cross_correlation, global_covariance

pytestmark = pytest.mark.promise

ROWS = 12


def random_embeddings(dim):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, ROWS, dim, dtype=torch.float64, generator=generator).unbind()


def weights(dim):
    """Return a matrix of different numbers, so that a swap of two entries changes the loss."""
    return torch.arange(1.0, 1 + dim * dim, dtype=torch.float64).view(dim, dim).sin()


def penalty(block, weight):
    columns = slice(block.first_column, block.first_column + block.columns.shape[1])
    off_diagonal = (weight[:, columns] * block.off_diagonal()).square().sum()
    diagonal = (weight.diagonal()[columns] * (block.diagonal() - 1)).sum()
    return block.sum(off_diagonal + diagonal)


def _compute_penalty(kind, dim):
    """Return this rank's value and the gradient of a shared weight, averaged as DDP does."""
    rank, world = process_group.rank(), process_group.world_size()
    local = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    shared_weight = torch.eye(dim, dtype=torch.float64).add(0.1).requires_grad_()
    z_a, z_b = (z[local] @ shared_weight for z in random_embeddings(dim))
    block = cross_correlation(z_a, z_b) if kind == "correlation" else global_covariance(z_a)
    loss = penalty(block, weights(dim))
    loss.backward()
    return loss.item(), collectives.reduce_sum(shared_weight.grad) / world, block.columns.shape


def plain_penalty(kind, dim):
    shared_weight = torch.eye(dim, dtype=torch.float64).add(0.1).requires_grad_()
    centered = [z @ shared_weight - sum(z @ shared_weight) / ROWS for z in random_embeddings(dim)]
    first, second = centered if kind == "correlation" else (centered[0], centered[0])
    loss = torch.zeros((), dtype=torch.float64)
    for i in range(dim):
        for j in range(dim):
            a, b, weight = first[:, i], second[:, j], weights(dim)[i, j]
            entry = sum(x * y for x, y in zip(a, b)) / (ROWS if kind == "correlation" else ROWS - 1)
            if kind == "correlation":
                entry = entry / ((a.square().mean() + 1e-5) * (b.square().mean() + 1e-5)).sqrt()
            loss = loss + (weight * (entry - 1) if i == j else (weight * entry) ** 2)
    loss.backward()
    return loss.item(), shared_weight.grad


# With more columns than images the embeddings are gathered: 14 columns, 12 images.
@pytest.mark.parametrize("kind", ["correlation", "covariance"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("dim", [5, 14])
def test_the_penalty_equals_its_equation_in_value_and_gradient(kind, world_size, dim):
    expected_loss, expected_gradient = plain_penalty(kind, dim)
    if world_size == 1:
        ranks = [_compute_penalty(kind, dim)]
    else:
        ranks = run_ranks(_compute_penalty, kind, dim, world_size=world_size)
    assert sum(loss for loss, _, _ in ranks) / world_size == pytest.approx(expected_loss, rel=1e-11)
    for _, gradient, shape in ranks:
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-12)
        assert shape[0] == dim
        assert (shape[1] == dim) == (world_size == 1 or dim == 5)


def test_a_constant_shift_of_any_size_changes_nothing():
    z_a, z_b = (z.float() for z in random_embeddings(4))
    shifted, expected = cross_correlation(z_a + 1000, z_b - 1000), cross_correlation(z_a, z_b)
    torch.testing.assert_close(shifted.columns, expected.columns, rtol=1e-3, atol=1e-3)
