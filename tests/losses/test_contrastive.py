"""NT-Xent: a slow reference from the equation, a closed form, and one process against several ranks."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import run_ranks
from torch.nn import functional as F

from ssl_pretrain import distributed
from ssl_pretrain.losses.contrastive import nt_xent


def views(rows: int = 12, dim: int = 5):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, rows, dim, dtype=torch.float64, generator=generator).unbind()


def slow_nt_xent(z_a, z_b, temperature):
    """Eq. 1 of SimCLR, anchor by anchor."""
    z = F.normalize(torch.cat([z_a, z_b]), dim=1)
    n, losses = len(z_a), []
    for i in range(2 * n):
        positive = (i + n) % (2 * n)
        candidates = [torch.exp(z[i] @ z[k] / temperature) for k in range(2 * n) if k != i]
        losses.append(-torch.log(torch.exp(z[i] @ z[positive] / temperature) / torch.stack(candidates).sum()))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_equals_the_equation_in_value_and_gradient(temperature):
    z_a, z_b = (z.clone().requires_grad_() for z in views())
    loss = nt_xent(z_a, z_b, temperature=temperature)
    expected = slow_nt_xent(z_a, z_b, temperature)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for got, want in zip(torch.autograd.grad(loss, [z_a, z_b]), torch.autograd.grad(expected, [z_a, z_b])):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)


def test_collapse_costs_the_log_of_the_candidates():
    same = torch.ones(8, 4)
    assert nt_xent(same, same, temperature=0.1).item() == pytest.approx(math.log(2 * 8 - 1))


def test_the_scale_and_the_order_of_images_do_not_matter():
    z_a, z_b = views()
    loss = nt_xent(z_a, z_b, temperature=0.2)
    shuffled = torch.randperm(len(z_a), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(nt_xent(3 * z_a[shuffled], 0.1 * z_b[shuffled], temperature=0.2), loss)


def _weights_gradient(z_a, z_b):
    """Loss and the gradient of a shared linear layer, averaged over ranks as DDP does."""
    rank, world = distributed.rank(), distributed.world_size()
    own = slice(rank * len(z_a) // world, (rank + 1) * len(z_a) // world)
    weight = torch.eye(5, 4, dtype=torch.float64).add(0.1).requires_grad_()
    loss = nt_xent(z_a[own] @ weight, z_b[own] @ weight, temperature=0.2)
    loss.backward()
    assert weight.grad is not None
    return loss.item(), distributed.reduce_sum(weight.grad) / world


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_agree_with_one_process(world_size):
    loss, gradient = _weights_gradient(*views())
    ranks = run_ranks(_weights_gradient, *views(), world_size=world_size)
    assert sum(value for value, _ in ranks) / world_size == pytest.approx(loss, rel=1e-12)
    for _, got in ranks:
        torch.testing.assert_close(got, gradient, rtol=1e-10, atol=1e-14)


def test_bad_arguments_are_named():
    z = torch.ones(4, 3)
    with pytest.raises(ValueError, match=r"^nt_xent: z_a and z_b must share one \(local_batch, dim\) shape, got \(4, 3\) and \(2, 3\)$"):
        nt_xent(z, z[:2], temperature=0.1)
    with pytest.raises(ValueError, match=r"^nt_xent: temperature must be > 0, got 0$"):
        nt_xent(z, z, temperature=0)
