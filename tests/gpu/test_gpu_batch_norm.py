"""Batch norm over ranks on a GPU never blocks the host and equals torch's own."""

import batch_norm_kernels
import pytest
import torch
from on_cuda import NEEDS_CUDA, cuda, forbid_synchronization  # noqa: F401
from timm.layers import BatchNormAct2d
from torch import nn

from ssl_pretrain.parallel.batch_norm import GroupBatchNorm

pytestmark = NEEDS_CUDA

ROWS, CHANNELS, SIZE = 16, 24, 7
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}
FORMATS = [torch.channels_last, torch.contiguous_format]


def draw(device, dtype, memory_format):
    """Return rows and a gradient of their shape."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, ROWS, CHANNELS, SIZE, SIZE, generator=generator)
    values[0] += torch.arange(CHANNELS).view(-1, 1, 1)
    return [value.to(device, dtype).to(memory_format=memory_format) for value in values]


def build_norm(kind, device):
    torch.manual_seed(0)
    norm = kind(CHANNELS)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm.to(device)


def normalize(norm, x, grad):
    """Return the output, and the gradients of the input and of the parameters."""
    x = x.clone().requires_grad_()
    y = norm(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *norm.parameters()], grad)]


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, BatchNormAct2d])
def test_a_group_of_one_rank_equals_torchs_norm(
    kind, dtype, memory_format, cuda, forbid_synchronization
):
    x, grad = draw(cuda, dtype, memory_format)
    torch_norm, source = build_norm(kind, cuda), build_norm(kind, cuda)
    # As if two ranks shared the group. This process is the only rank, so the sums are its own.
    norm = GroupBatchNorm(source, ROWS, 2 * ROWS, None)
    normalize(norm, x, grad)  # the first call may block, because it allocates and loads kernels
    with forbid_synchronization():
        results = normalize(norm, x, grad)
    for _ in range(2):
        references = normalize(torch_norm, x, grad)
    for values in results[:2]:
        assert values.dtype == dtype and values.is_contiguous(memory_format=memory_format)
    for values, reference in zip(results, references, strict=True):
        scale, tolerance = reference.float().std(), TOLERANCES[dtype]
        torch.testing.assert_close(
            values / scale, reference / scale, rtol=tolerance, atol=tolerance
        )
    for values, reference in zip(norm.buffers(), torch_norm.buffers(), strict=True):
        torch.testing.assert_close(values, reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_the_kernels_equal_their_plain_algebra(dtype, memory_format, cuda):
    x, grad = draw(cuda, dtype, memory_format)
    # Three ranks with different statistics and counts, as slices of one gathered tensor.
    gathered = torch.rand(3, 2 * CHANNELS + 1, device=cuda) + 0.5
    gathered[:, -1] = torch.tensor([7.0, 20.0, 300.0])
    means, inverse_stds, counts = gathered.split([CHANNELS, CHANNELS, 1], dim=1)
    weight, bias, sum_grad, sum_product = torch.randn(4, CHANNELS, device=cuda)
    results = []
    for library in (torch, batch_norm_kernels):
        running_mean, running_var = torch.ones(2, CHANNELS, device=cuda)
        mean, inverse_std = library.batch_norm_gather_stats_with_counts(
            x, means, inverse_stds, running_mean, running_var, 0.1, 1e-5, counts.flatten()
        )
        normalization = mean, inverse_std, weight
        results.append(
            [
                *library.batch_norm_stats(x, 1e-5),
                *(mean, inverse_std, running_mean, running_var),
                library.batch_norm_elemt(x, weight, bias, mean, inverse_std, 1e-5),
                *library.batch_norm_backward_reduce(grad, x, *normalization, True, True, True),
                library.batch_norm_backward_elemt(
                    grad, x, *normalization, sum_grad, sum_product, counts.flatten().int()
                ),
            ]
        )
    for values, reference in zip(*results, strict=True):
        assert values.dtype == reference.dtype and values.stride() == reference.stride()
        scale = reference.float().abs().max()
        torch.testing.assert_close(
            values / scale, reference / scale, rtol=0, atol=TOLERANCES[dtype]
        )
