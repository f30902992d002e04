"""Compute convolutions in float32 where oneDNN's bfloat16 gradients are wrong.

In the backward pass of a bfloat16 convolution on a CPU, oneDNN leaves the gradients of some weights
uninitialized. These weights never meet a pixel, such as the corners of a 3 x 3 kernel with stride 2
on an image of 1 x 1 pixels. More weights are affected if the stride exceeds the image. Seen with
torch 2.13 on a CPU with AVX-512 BF16. Images that small only occur in the last layers of a network
for thumbnails, so float32 costs little.
"""

from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor, nn


def avoid_wrong_gradients(module: nn.Module) -> None:
    """Make all 2d convolutions in `module` use float32 where bfloat16 gradients may be wrong."""
    for child in module.modules():
        if isinstance(child, nn.Conv2d) and not isinstance(child.forward, partial):
            forward = partial(_forward_checked, child, child.forward)
            child.forward = forward  # type: ignore[method-assign]


def _forward_checked(
    convolution: nn.Conv2d, forward: Callable[[Tensor], Tensor], images: Tensor
) -> Tensor:
    """Run the original forward pass, without autocast if its gradients would be wrong."""
    axes = zip(
        images.shape[-2:],
        convolution.kernel_size,
        convolution.stride,
        _padding(convolution),
        convolution.dilation,
    )
    if not torch.is_autocast_enabled("cpu") or all(_is_correct(*axis) for axis in axes):
        return forward(images)
    with torch.autocast("cpu", enabled=False):
        return forward(images.to(convolution.weight.dtype)).to(images.dtype)


def _padding(convolution: nn.Conv2d) -> tuple[int, ...]:
    if isinstance(convolution.padding, str):  # `same` or `valid`
        is_padded = convolution.padding == "same"
        return tuple(size // 2 if is_padded else 0 for size in convolution.kernel_size)
    return convolution.padding


@lru_cache(maxsize=1024)
def _is_correct(size: int, kernel_size: int, stride: int, padding: int, dilation: int) -> bool:
    """Return True if every weight along an axis meets a pixel, and the stride is not too long."""
    num_outputs = (size + 2 * padding - dilation * (kernel_size - 1) - 1) // stride + 1
    starts = range(-padding, stride * num_outputs - padding, stride)
    meets_pixel = (
        any(0 <= start + weight * dilation < size for start in starts)
        for weight in range(kernel_size)
    )
    return stride <= size and all(meets_pixel)
