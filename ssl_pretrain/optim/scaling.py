"""Scale many tensors, each by its own factor, in one kernel launch on CUDA.

`torch._foreach_mul_` with a list of factors on the device launches one kernel per tensor.
"""

from importlib.util import find_spec

import torch
from torch import Tensor


def scale(tensors: list[Tensor], factors: Tensor) -> None:
    """Multiply each tensor in place by its factor.

    Args:
        tensors: Tensors of one device.
        factors: One factor per tensor, shape (len(tensors),). The host does not wait for them.
    """
    if _has_kernel([tensors], factors):
        from ssl_pretrain.optim import scaling_triton

        scaling_triton.scale(tensors, factors)
    else:
        torch._foreach_mul_(tensors, list(factors.unbind()))


def add_and_scale(
    tensors: list[Tensor], others: list[Tensor], other_factors: Tensor, factors: Tensor
) -> None:
    """Set each tensor to (tensor + other_factor * other) * factor, in place.

    Args:
        tensors: Tensors of one device.
        others: As many tensors, with the same shapes and strides for the fast path.
        other_factors: One factor per tensor of `others`, shape (len(tensors),).
        factors: One factor per sum, shape (len(tensors),).
    """
    if _has_kernel([tensors, others], factors, other_factors):
        from ssl_pretrain.optim import scaling_triton

        scaling_triton.add_and_scale(tensors, others, other_factors, factors)
    else:
        torch._foreach_add_(tensors, torch._foreach_mul(others, list(other_factors.unbind())))
        torch._foreach_mul_(tensors, list(factors.unbind()))


def _has_kernel(lists: list[list[Tensor]], *factors: Tensor) -> bool:
    """Return True if the kernel supports the tensors: float32 on CUDA, in memory without gaps."""
    if not factors[0].is_cuda or find_spec("triton") is None:
        return False
    is_dense = all(
        tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)
        for tensor in lists[0]
    )
    orders = [[_element_order(tensor) for tensor in tensors] for tensors in lists]
    has_same_order = all(order == orders[0] for order in orders)
    tensors = [*factors, *(tensor for tensors in lists for tensor in tensors)]
    return is_dense and has_same_order and all(t.dtype == torch.float32 for t in tensors)


def _element_order(tensor: Tensor) -> list[tuple[int, int]]:
    """Return shape and strides, without the dimensions of size 1, whose strides have no effect."""
    return [(size, step) for size, step in zip(tensor.shape, tensor.stride()) if size > 1]
