"""Drop path for compiled blocks, whose rate does not become part of the compiled code.

timm's DropPath holds its rate as a float. The compiler generates code for one value of it, so the
blocks of a ViT, whose rates rise from block to block, would all be compiled separately.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ssl_pretrain.models.timm_networks import timm


class DropPath(nn.Module):
    """Stochastic depth with its rate in a tensor, with the random numbers of timm's DropPath.

    On a CPU these are the same numbers, bit for bit. CUDA draws from the same distribution. A rate
    of 0 draws no numbers on a CPU.

    Args:
        drop_prob: Probability with which an image skips the layers before this one.
        scale_by_keep: Divide the outputs of the other images by the probability of being kept.
        device: Device of the images.
    """

    def __init__(self, drop_prob: float, scale_by_keep: bool, device: torch.device):
        super().__init__()
        self.scale_by_keep = scale_by_keep
        # Neither a parameter nor a buffer, so that state dicts do not change.
        self.keep_prob = torch.tensor(1.0 - drop_prob, dtype=torch.float64, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply `x`, shape (batch, ...), by 0 for each dropped image, in training mode."""
        if not self.training:
            return x
        shape = [x.shape[0]] + [1] * (x.ndim - 1)
        factors = draw_factors(self.keep_prob, shape, x.dtype, self.scale_by_keep)
        return x * factors


@torch.library.custom_op(
    "ssl_pretrain::drop_path_factors",
    mutates_args=(),
    tags=(torch.Tag.nondeterministic_seeded,),
)
def draw_factors(
    keep_prob: Tensor, shape: Sequence[int], dtype: torch.dtype, scale_by_keep: bool
) -> Tensor:
    """Return 0 for each dropped image, else 1, or 1 / keep_prob with `scale_by_keep`.

    The compiler calls this operation as it is. On a CPU, the probability has to be a number to draw
    what timm draws. On CUDA, reading the number would block the host.
    """
    if keep_prob.is_cuda:
        return _draw_on_device(keep_prob, shape, dtype, scale_by_keep)
    factors, probability = torch.empty(shape, dtype=dtype), keep_prob.item()
    if probability == 1.0:
        return factors.fill_(1.0)
    factors.bernoulli_(probability)
    return factors.div_(probability) if scale_by_keep else factors


def _draw_on_device(
    keep_prob: Tensor, shape: Sequence[int], dtype: torch.dtype, scale_by_keep: bool
) -> Tensor:
    """Draw with two kernels and without reading the probability. 1 / keep_prob is rounded once."""
    precise_dtype = torch.promote_types(dtype, torch.float32)
    mask = torch.empty(shape, dtype=precise_dtype, device=keep_prob.device).bernoulli_(keep_prob)
    divisor = keep_prob if scale_by_keep else torch.ones_like(keep_prob)
    return torch.div(mask, divisor, out=torch.empty(shape, dtype=dtype, device=keep_prob.device))


@draw_factors.register_fake
def _(keep_prob: Tensor, shape: Sequence[int], dtype: torch.dtype, scale_by_keep: bool) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=keep_prob.device)


def share_code(blocks: Sequence[nn.Module], device: torch.device) -> None:
    """Replace the drop paths of blocks, so that blocks of one shape can share compiled code.

    timm has an identity instead of a drop path where the rate is 0, as in a ViT's first block. It
    becomes a drop path with a rate of 0 if other blocks of the stack have a drop path there. A drop
    path that a teacher has turned off becomes an identity.

    Args:
        blocks: The blocks of one network.
        device: Device of the images.
    """
    modules_by_name: dict[str, list[nn.Module]] = {}
    for block in blocks:
        for name, child in block.named_modules():
            modules_by_name.setdefault(name, []).append(child)
    for name, modules in modules_by_name.items():
        if not any(isinstance(module, timm.layers.DropPath) for module in modules):
            continue
        is_used = any(getattr(module, "drop_prob", 0.0) for module in modules)
        for block in blocks:
            if name in dict(block.named_modules()):
                _replace(block, name, device, is_used)


def _replace(block: nn.Module, name: str, device: torch.device, is_used: bool) -> None:
    """Replace one drop path or identity of a block. Other layers stay as they are."""
    module: Any = block.get_submodule(name)
    if not isinstance(module, timm.layers.DropPath | nn.Identity):
        return
    replacement: nn.Module = nn.Identity()
    if is_used:
        rate = getattr(module, "drop_prob", 0.0) or 0.0
        replacement = DropPath(rate, getattr(module, "scale_by_keep", True), device)
    block.set_submodule(name, replacement.train(module.training))
