"""Compare grouped batch norm with torch's own on the same images, in float64.

Values, gradients and running statistics are compared.
"""

from functools import partial

import pytest
import torch
from conftest import run_ranks
from timm.layers import BatchNormAct2d
from torch import nn

from ssl_pretrain.distributed import process_group
from ssl_pretrain.parallel import batch_norm

pytestmark = pytest.mark.promise

IMAGES, CHANNELS = 12, 3


def build_norm(kind=nn.BatchNorm2d):
    layer = kind(CHANNELS).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
        layer.bias.copy_(torch.tensor([0.1, -0.2, 0.3]))
    return nn.Sequential(layer)


def draw_two_views():
    """Return (views, images, channels, 2, 2). Means differ between images, so groups matter."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, IMAGES, CHANNELS, 2, 2, dtype=torch.float64, generator=generator)
    return x + torch.arange(IMAGES, dtype=torch.float64).view(1, -1, 1, 1, 1)


def build_output_gradient(x):
    """Return the gradient of a test loss. It differs for every element of the output."""
    numbers = torch.arange(1.0, x.numel() + 1, dtype=x.dtype).view_as(x)
    return (x.detach().sin() * numbers).contiguous()


def apply_torch_norm(group_images, kind=nn.BatchNorm2d):
    """Apply torch's norm to one group at a time, each with the same initial statistics."""
    outputs, statistics = [], []
    x = draw_two_views().requires_grad_()
    weight_gradient = 0
    weights = build_output_gradient(x)
    for start in range(0, IMAGES, group_images):
        layer = build_norm(kind)
        group = x[:, start : start + group_images]
        y = layer(group.flatten(0, 1)).view_as(group)
        (y * weights[:, start : start + group_images]).sum().backward()
        outputs.append(y.detach())
        statistics.append(torch.cat([layer[0].running_mean, layer[0].running_var]))
        weight_gradient = weight_gradient + layer[0].weight.grad
    return torch.cat(outputs, dim=1), x.grad, weight_gradient, torch.stack(statistics)


def apply_grouped_norm(group_images, kind=nn.BatchNorm2d):
    """Apply the converted norm to this rank's images."""
    rank, world = process_group.rank(), process_group.world_size()
    images_per_rank = IMAGES // world
    layer = batch_norm.convert(build_norm(kind), images_per_rank, group_images)
    x = draw_two_views()
    weights = build_output_gradient(x)[:, rank * images_per_rank : (rank + 1) * images_per_rank]
    x = x[:, rank * images_per_rank : (rank + 1) * images_per_rank].clone().requires_grad_()
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
    ("world_size", "group_images"),
    [
        (1, 4),
        (1, 12),
        (2, 3),
        (3, 4),
        pytest.param(2, 12, marks=pytest.mark.full),
        pytest.param(3, 12, marks=pytest.mark.full),
        (4, 6),
    ],
)
def test_grouped_norm_equals_torchs_norm_on_every_group(world_size, group_images):
    results = run_ranks(apply_grouped_norm, group_images, world_size=world_size)
    y, x_gradient, weight_gradient, statistics, names = zip(*results)
    expected_y, expected_x, expected_weight, expected_statistics = apply_torch_norm(group_images)
    assert_close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)
    assert_close(torch.cat(y, dim=1), expected_y)
    assert_close(torch.cat(x_gradient, dim=1), expected_x, rtol=1e-8, atol=1e-10)
    assert_close(sum(weight_gradient), expected_weight, atol=1e-10)
    assert_close(torch.stack(statistics).mean(0), expected_statistics.mean(0))
    assert names[0] == sorted(build_norm().state_dict())


def test_timms_activation_is_kept():
    y, x_gradient, _, _ = apply_torch_norm(4, BatchNormAct2d)
    (result,) = run_ranks(apply_grouped_norm, 4, BatchNormAct2d, world_size=1)
    assert (y == 0).any()
    torch.testing.assert_close(result[0], y, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(result[1], x_gradient, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("num_views", [1, 2])
def test_groups_within_a_rank_keep_channels_last(num_views):
    layer = batch_norm.convert(build_norm(), IMAGES, 4)
    x = draw_two_views()[:num_views].flatten(0, 1).to(memory_format=torch.channels_last)
    x.requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    for values in (y, x.grad):
        assert values.is_contiguous(memory_format=torch.channels_last)
        assert not values.is_contiguous()


def test_evaluation_uses_the_running_statistics():
    layer, torch_norm = batch_norm.convert(build_norm(), IMAGES, 4), build_norm()
    x = draw_two_views().flatten(0, 1)
    torch.testing.assert_close(layer.eval()(x), torch_norm.eval()(x))


def test_one_group_on_one_process_keeps_torchs_norm():
    assert type(batch_norm.convert(build_norm(), IMAGES, IMAGES)[0]) is nn.BatchNorm2d


def test_groups_that_split_a_rank_unevenly_are_refused():
    with pytest.raises(ValueError) as error:
        batch_norm.convert(build_norm(), 12, 8)
    assert str(error.value) == (
        "parallel.bn_group_images: 8 neither divides nor is a multiple of the 12 images in a "
        "rank's forward pass; choose a divisor or a multiple of 12, or another micro_batch_size"
    )
