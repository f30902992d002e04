"""The five CUDA operators of synchronized batch norm in plain tensor algebra.

torch has them for CUDA only. Registered for the CPU, they let gloo ranks check the order and the
scale of the reductions. Registered for meta tensors, they let fake CUDA tensors be traced.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def registered(*dispatch_keys: str) -> Iterator[None]:
    """Make torch use the functions below for the given dispatch keys, "CPU" or "Meta"."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        for key in dispatch_keys:
            for function in FUNCTIONS:
                library.impl(function.__name__, function, key)
        yield


def batch_norm_stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    values = widen(x)
    variance = values.var(reduced_dims(x), correction=0)
    return values.mean(reduced_dims(x)), (variance + eps).rsqrt()


def batch_norm_gather_stats_with_counts(
    x: Tensor,
    means: Tensor,
    inverse_stds: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
    counts: Tensor,
) -> tuple[Tensor, Tensor]:
    assert counts.dtype == running_mean.dtype, "the kernel reads the counts in that dtype"
    counts = counts[:, None]
    total = counts.sum()
    mean = (means * counts).sum(0) / total
    squares = (inverse_stds**-2 - eps + (means - mean) ** 2) * counts
    variance = squares.sum(0) / total
    running_mean.mul_(1 - momentum).add_(momentum * mean)
    running_var.mul_(1 - momentum).add_(momentum * squares.sum(0) / (total - 1))
    return mean, (variance + eps).rsqrt()


def batch_norm_elemt(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, inverse_std: Tensor, eps
) -> Tensor:
    y = (widen(x) - per_channel(mean, x)) * per_channel(inverse_std, x)
    y = y if weight is None else y * per_channel(weight, x)
    y = y if bias is None else y + per_channel(bias, x)
    return torch.empty_like(x).copy_(y)


def batch_norm_backward_reduce(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    weight: Tensor | None,
    input_g: bool,
    weight_g: bool,
    bias_g: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    assert grad.stride() == x.stride(), "other strides take a slow kernel"
    sum_grad = widen(grad).sum(reduced_dims(x))
    sum_product = (widen(grad) * (widen(x) - per_channel(mean, x))).sum(reduced_dims(x))
    # A result that was not requested is an undefined tensor, None in Python.
    weight_grad = sum_product * inverse_std if weight_g else None
    return sum_grad, sum_product, weight_grad, sum_grad.clone() if bias_g else None


def batch_norm_backward_elemt(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    weight: Tensor | None,
    sum_grad: Tensor,
    sum_product: Tensor,
    counts: Tensor,
) -> Tensor:
    assert counts.dtype == torch.int32 and counts.is_contiguous(), "the kernel reads int32 by row"
    centered = widen(x) - per_channel(mean, x)
    total = counts.sum()
    slope = inverse_std**2 * sum_product / total
    x_grad = widen(grad) - per_channel(sum_grad / total, x) - centered * per_channel(slope, x)
    scale = inverse_std if weight is None else inverse_std * weight
    return torch.empty_like(x).copy_(x_grad * per_channel(scale, x))


FUNCTIONS = (
    batch_norm_stats,
    batch_norm_gather_stats_with_counts,
    batch_norm_elemt,
    batch_norm_backward_reduce,
    batch_norm_backward_elemt,
)


def widen(x: Tensor) -> Tensor:
    """Return `x` in the dtype of the statistics: float32, or float64 if `x` is."""
    return x if x.dtype == torch.float64 else x.float()


def reduced_dims(x: Tensor) -> list[int]:
    return [dim for dim in range(x.ndim) if dim != 1]


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (x.ndim - 2))
