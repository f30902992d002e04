"""Batch normalization with statistics over several ranks, as differentiable functions.

torch's SyncBatchNorm runs on CUDA only, and its forward pass waits for the GPU three times.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_pretrain.distributed import collectives


class PortableSynchronizedNorm(torch.autograd.Function):
    """Batch normalization over the rows of several ranks, on any device.

    The forward pass combines the ranks' means, sums of squared deviations and counts. The backward
    pass reduces two sums over ranks.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: Any
    ) -> Any:
        """Return the output, and the group's mean, biased variance and number of values."""
        x_float = x if x.dtype == torch.float64 else x.float()
        local_mean, local_variance = torch.batch_norm_update_stats(x_float, None, None, 0.0)
        count = local_mean.new_full((1,), x_float.numel() / x_float.shape[1])
        channels = len(local_mean)
        # Sums of squared deviations, m2 = variance * count. Shape (ranks, 2 * channels + 1).
        packed = torch.cat([local_mean, local_variance * count, count])[None]
        means, m2s, counts = collectives.gather(packed, group).split([channels, channels, 1], dim=1)
        total = counts.sum()
        mean = (means * counts).sum(0) / total
        variance = (m2s.sum(0) + (counts * (means - mean).square()).sum(0)) / total
        y = F.batch_norm(x_float, mean, variance, weight, bias, False, 0.0, eps)
        ctx.save_for_backward(x, mean, variance, weight, total)
        ctx.group, ctx.eps, ctx.has_bias = group, eps, bias is not None
        ctx.mark_non_differentiable(mean, variance, total)
        return y.to(x.dtype), mean, variance, total

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> Any:
        """Return the gradients of `x`, `weight` and `bias`."""
        x, mean, variance, weight, total = ctx.saved_tensors
        x_float, grad = x.to(mean.dtype), grad.to(mean.dtype)
        inverse_std = (variance + ctx.eps).rsqrt()
        # Two sums over this rank's rows, with the mean and standard deviation of the group.
        _, sum_product, sum_grad = torch.ops.aten.native_batch_norm_backward(
            grad, x_float, weight, None, None, mean, inverse_std, True, ctx.eps, [False, True, True]
        )
        local_sums = torch.stack([sum_grad, sum_product])
        mean_grad, mean_product = (collectives.reduce_sum(local_sums, ctx.group) / total).unbind()
        # scale * (grad - mean_grad - normalized * mean_product) is affine in x and in grad.
        scale = inverse_std if weight is None else inverse_std * weight
        slope = -scale * inverse_std * mean_product
        offset = -scale * mean_grad - slope * mean
        channel_shape = (1, -1, *[1] * (x.ndim - 2))
        x_grad = torch.addcmul(offset.view(channel_shape), x_float, slope.view(channel_shape))
        x_grad = torch.addcmul(x_grad, grad, scale.view(channel_shape)).to(x.dtype)
        # The gradients of weight and bias are this rank's sums. DDP averages them over ranks.
        weight_grad = sum_product if weight is not None else None
        return x_grad, weight_grad, sum_grad if ctx.has_bias else None, None, None


class CUDASynchronizedNorm(torch.autograd.Function):
    """Batch normalization over the rows of several ranks, with the kernels of CUDA.

    The kernels read and write half precision and channels_last directly, and compute float32
    statistics. The host never waits for them. The forward pass updates the running statistics.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
        eps: float,
        group: Any,
    ) -> Tensor:
        """Return the output, and update the running statistics."""
        x = x.contiguous(memory_format=_kernel_format(x))
        local_mean, local_inverse_std = torch.batch_norm_stats(x, eps)
        count = local_mean.new_full((1,), x.numel() / x.shape[1])
        packed = torch.cat([local_mean, local_inverse_std, count])[None]
        # Shape (ranks, 2 * channels + 1), as on other devices.
        gathered = collectives.gather(packed, group)
        means, inverse_stds, counts = gathered.split([x.shape[1], x.shape[1], 1], dim=1)
        mean, inverse_std = torch.batch_norm_gather_stats_with_counts(
            x, means, inverse_stds, running_mean, running_var, momentum, eps, counts.flatten()
        )
        # The backward kernel reads the counts of the ranks as consecutive 32-bit integers.
        ctx.save_for_backward(x, weight, mean, inverse_std, counts.flatten().int())
        ctx.group, ctx.has_bias = group, bias is not None
        return torch.batch_norm_elemt(x, weight, bias, mean, inverse_std, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Return the gradients of `x`, `weight` and `bias`."""
        x, weight, mean, inverse_std, counts = ctx.saved_tensors
        grad = grad.contiguous(memory_format=_kernel_format(x))
        # The gradients of weight and bias are this rank's sums. DDP averages them over ranks.
        sum_grad, sum_product, weight_grad, bias_grad = torch.batch_norm_backward_reduce(
            grad, x, mean, inverse_std, weight, True, weight is not None, ctx.has_bias
        )
        local_sums = torch.stack([sum_grad, sum_product])
        sum_grad, sum_product = collectives.reduce_sum(local_sums, ctx.group).unbind()
        x_grad = torch.batch_norm_backward_elemt(
            grad, x, mean, inverse_std, weight, sum_grad, sum_product, counts
        )
        # The kernel returns None for a gradient that was not requested.
        return x_grad, weight_grad, bias_grad, None, None, None, None, None


def _kernel_format(x: Tensor) -> torch.memory_format:
    """Return the memory format in which the kernels process `x`.

    Without it, an `x` that is neither contiguous nor channels_last would take a slow kernel.
    """
    is_channels_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_channels_last else torch.contiguous_format
