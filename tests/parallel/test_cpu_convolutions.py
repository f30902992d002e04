"""Gradients of bfloat16 convolutions on a CPU do not depend on what memory held before."""

import pytest
import torch
from torch import nn

from ssl_pretrain.parallel import cpu_convolutions
from ssl_pretrain.parallel.execution import Execution, ParallelConfig, cpu_has_bfloat16
from ssl_pretrain.system import allocator

# Kernel, stride, padding and image size. oneDNN's gradients of the first five were wrong.
CONVOLUTIONS = [
    (3, 2, 1, (1, 1)),
    (5, 1, 2, (1, 1)),
    (5, 4, 2, (3, 3)),
    (7, 1, 3, (2, 2)),
    (2, 16, 0, (4, 4)),
    (3, 1, 1, (1, 1)),
    (3, 1, 1, (2, 2)),
    (3, 2, "same", (1, 4)),
    (4, 4, 0, (8, 8)),
]

# Rounding errors relative to the largest entry. Without bfloat16 instructions, sums are bfloat16.
ROUNDING = 0.01 if cpu_has_bfloat16() else 0.05


def _fill_free_memory_with_nan():
    sizes = [100, 1000, 10_000, 100_000, 1_000_000] * 5
    del [torch.full((size,), float("nan")) for size in sizes][:]


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(("kernel", "stride", "padding", "size"), CONVOLUTIONS)
def test_gradients_equal_those_of_float32(kernel, stride, padding, size, memory_format):
    allocator.keep_freed_memory()  # as in a run
    torch.manual_seed(0)
    if padding == "same":
        stride = 1  # torch has no other
    convolution = nn.Conv2d(48, 64, kernel, stride, padding, bias=False)
    convolution = convolution.to(memory_format=memory_format)
    images = torch.randn(65, 48, *size).bfloat16().to(memory_format=memory_format)
    with torch.no_grad():
        convolution.weight.copy_(convolution.weight.bfloat16())
    expected = convolution(images.float())
    gradient = torch.randn(expected.shape).bfloat16()
    (expected_gradient,) = torch.autograd.grad(expected, convolution.weight, gradient.float())
    cpu_convolutions.avoid_wrong_gradients(convolution)
    for _ in range(3):
        _fill_free_memory_with_nan()
        with torch.autocast("cpu", torch.bfloat16):
            outputs = convolution(images)
        assert outputs.dtype == torch.bfloat16
        (weight_gradient,) = torch.autograd.grad(
            outputs, convolution.weight, gradient.to(memory_format=memory_format)
        )
        tolerance = ROUNDING * expected_gradient.abs().max().item()
        torch.testing.assert_close(weight_gradient, expected_gradient, rtol=0, atol=tolerance)


def test_only_convolutions_with_unused_weights_or_long_strides_are_avoided():
    is_correct = cpu_convolutions._is_correct
    assert is_correct(size=2, kernel_size=3, stride=1, padding=1, dilation=1)
    assert is_correct(size=7, kernel_size=7, stride=2, padding=3, dilation=1)
    assert is_correct(size=16, kernel_size=16, stride=16, padding=0, dilation=1)
    assert not is_correct(size=1, kernel_size=3, stride=2, padding=1, dilation=1)
    assert not is_correct(size=8, kernel_size=3, stride=8, padding=1, dilation=1)
    assert not is_correct(size=2, kernel_size=3, stride=1, padding=2, dilation=2)
    assert not is_correct(size=4, kernel_size=1, stride=16, padding=0, dilation=1)


def test_a_network_on_a_cpu_is_guarded_only_under_bfloat16():
    for precision, is_guarded in (("bfloat16", True), ("float32", False)):
        network = nn.Sequential(nn.Conv2d(3, 4, 3))
        execution = Execution.resolve(ParallelConfig(precision=precision), torch.device("cpu"))
        execution.place_module(network)
        assert ("forward" in vars(network[0])) == is_guarded
