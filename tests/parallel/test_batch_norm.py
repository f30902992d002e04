"""Grouped batch norm against torch's own on the same images: values, gradients and running statistics, in float64."""

from __future__ import annotations

import pytest
import torch
from conftest import run_ranks
from timm.layers import BatchNormAct2d
from torch import nn

from ssl_pretrain.distributed import process_group
from ssl_pretrain.parallel import batch_norm

pytestmark = pytest.mark.promise

IMAGES, CHANNELS = 12, 3


def norm(kind=nn.BatchNorm2d):
    layer = kind(CHANNELS).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
        layer.bias.copy_(torch.tensor([0.1, -0.2, 0.3]))
    return nn.Sequential(layer)


def two_views():
    """(views, images, channels, 2, 2), with a mean that differs by image so that the split matters."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, IMAGES, CHANNELS, 2, 2, dtype=torch.float64, generator=generator)
    return x + torch.arange(IMAGES, dtype=torch.float64).view(1, -1, 1, 1, 1)


def slope(x):
    return (
        x.detach().sin() * torch.arange(1.0, x.numel() + 1, dtype=x.dtype).view_as(x)
    ).contiguous()


def expected(group_images, kind=nn.BatchNorm2d):
    """Torch's norm, group by group from the same start; running statistics are the mean over groups."""
    pieces, statistics = [], []
    x = two_views().requires_grad_()
    weight_gradient = 0
    weights = slope(x)
    for start in range(0, IMAGES, group_images):
        layer = norm(kind)
        piece = x[:, start : start + group_images]
        y = layer(piece.flatten(0, 1)).view_as(piece)
        (y * weights[:, start : start + group_images]).sum().backward()
        pieces.append(y.detach())
        statistics.append(torch.cat([layer[0].running_mean, layer[0].running_var]))
        weight_gradient = weight_gradient + layer[0].weight.grad
    return torch.cat(pieces, dim=1), x.grad, weight_gradient, torch.stack(statistics)


def grouped(group_images, kind=nn.BatchNorm2d):
    """This rank's slice through the converted norm."""
    rank, world = process_group.rank(), process_group.world_size()
    share = IMAGES // world
    layer = batch_norm.convert(norm(kind), share, group_images)
    x = two_views()
    weights = slope(x)[:, rank * share : (rank + 1) * share]
    x = x[:, rank * share : (rank + 1) * share].clone().requires_grad_()
    y = layer(x.flatten(0, 1)).view_as(x)
    (y * weights).sum().backward()
    return (
        y.detach(),
        x.grad,
        layer[0].weight.grad,
        torch.cat([layer[0].running_mean, layer[0].running_var]),
        sorted(layer.state_dict()),
    )


@pytest.mark.parametrize(
    ("world_size", "group_images"), [(2, 12), (3, 12), (4, 6), (2, 3), (1, 4), (1, 12), (3, 4)]
)
def test_equals_torch_on_every_group(world_size, group_images):
    y, x_gradient, weight_gradient, statistics = expected(group_images)
    results = run_ranks(grouped, group_images, world_size=world_size)
    torch.testing.assert_close(torch.cat([r[0] for r in results], dim=1), y, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        torch.cat([r[1] for r in results], dim=1), x_gradient, rtol=1e-8, atol=1e-10
    )
    torch.testing.assert_close(sum(r[2] for r in results), weight_gradient, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        torch.stack([r[3] for r in results]).mean(0), statistics.mean(0), rtol=1e-10, atol=1e-12
    )
    assert results[0][4] == sorted(norm().state_dict())


def test_timms_activation_comes_along():
    y, x_gradient, _, _ = expected(4, BatchNormAct2d)
    (got,) = run_ranks(grouped, 4, BatchNormAct2d, world_size=1)
    assert (y == 0).any()
    torch.testing.assert_close(got[0], y, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(got[1], x_gradient, rtol=1e-8, atol=1e-10)


def test_evaluation_uses_the_running_statistics():
    layer, plain = batch_norm.convert(norm(), IMAGES, 4), norm()
    x = two_views().flatten(0, 1)
    torch.testing.assert_close(layer.eval()(x), plain.eval()(x))


def test_one_process_one_group_keeps_torchs_own():
    assert type(batch_norm.convert(norm(), IMAGES, IMAGES)[0]) is nn.BatchNorm2d


def test_groups_that_cut_a_rank_unevenly_are_refused():
    with pytest.raises(ValueError) as refused:
        batch_norm.convert(norm(), 12, 8)
    assert str(refused.value) == (
        "parallel.bn_group_images: 8 neither divides nor is a multiple of the 12 images a rank feeds at once; "
        "choose a divisor or a multiple of 12, or another micro_batch_size"
    )
