"""Batch norm whose statistics span fixed slices of the global batch, on CPU too (torch's SyncBatchNorm is CUDA only)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from ssl_pretrain.distributed import collectives, process_group


class GroupBatchNorm(nn.Module):
    """The batch norm `source`, with statistics over groups of `group_images` consecutive images of the global batch.

    One forward may hold several views of the same images, stacked view by view: rows = views * images, and a group
    takes all views of its images. A group is either a part of this rank's rows or all rows of several ranks.

    Args:
        source: the module it replaces; parameters and buffers are shared and keep their names.
        images: images this rank feeds at once.
        group_images: images a group has; divides `images` or is a multiple of it.
        group: the ranks that share one group's statistics; None means all of them.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, source: _BatchNorm, images: int, group_images: int, group: Any):
        super().__init__()
        if source.momentum is None or source.running_mean is None:
            raise ValueError(
                "batch norm without running statistics or with a cumulative momentum cannot be grouped"
            )
        self.eps, self.momentum = source.eps, float(source.momentum)
        self.images, self.group = images, group
        self.chunks = max(1, images // group_images)  # groups within this rank
        self.ranks = max(1, group_images // images)  # ranks within a group
        self.weight, self.bias = source.weight, source.bias
        for name, buffer in source.named_buffers():
            self.register_buffer(name, buffer)
        self.drop = getattr(
            source, "drop", nn.Identity()
        )  # timm's BatchNormAct2d carries its activation
        self.act = getattr(source, "act", nn.Identity())
        self.train(source.training)

    def extra_repr(self) -> str:
        return f"{len(self.running_mean)}, groups within a rank={self.chunks}, ranks within a group={self.ranks}"

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            y = F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        elif self.ranks > 1:
            y = self._across_ranks(x)
        else:
            y = self._within_rank(x)
        return self.act(self.drop(y))

    def _across_ranks(self, x: Tensor) -> Tensor:
        y, mean, variance, count = _Synchronized.apply(
            x, self.weight, self.bias, self.eps, self.group
        )
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(
                (variance * count / (count - 1).clamp(min=1)).to(self.running_var.dtype),
                self.momentum,
            )
        return y

    def _within_rank(self, x: Tensor) -> Tensor:
        """Groups become channels, so that one native call normalizes each alone."""
        views, rows, channels, *space = (
            len(x) // self.images,
            self.images // self.chunks,
            *x.shape[1:],
        )
        grouped = (
            x.view(views, self.chunks, rows, channels, *space)
            .transpose(1, 2)
            .reshape(views * rows, self.chunks * channels, *space)
        )
        mean, variance = self.running_mean.repeat(self.chunks), self.running_var.repeat(self.chunks)
        weight = self.weight.repeat(self.chunks) if self.weight is not None else None
        bias = self.bias.repeat(self.chunks) if self.bias is not None else None
        y = F.batch_norm(grouped, mean, variance, weight, bias, True, self.momentum, self.eps)
        with torch.no_grad():  # the mean over groups of what each would leave
            self.num_batches_tracked += 1
            self.running_mean.copy_(mean.view(self.chunks, channels).mean(0))
            self.running_var.copy_(variance.view(self.chunks, channels).mean(0))
        return y.view(views, rows, self.chunks, channels, *space).transpose(1, 2).reshape(x.shape)


class _Synchronized(torch.autograd.Function):
    """Normalization over the rows of several ranks: (mean, M2, count) combined forward, two sums reduced backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: Any
    ) -> Any:
        wide = x if x.dtype == torch.float64 else x.float()
        own_mean, own_variance = torch.batch_norm_update_stats(
            wide, None, None, 0.0
        )  # native: one pass each for mean and M2
        count = own_mean.new_full((1,), wide.numel() / wide.shape[1])
        packed = collectives.gather(
            torch.cat([own_mean, own_variance * count, count])[None], group
        )  # (ranks, 2 * channels + 1)
        means, m2s, counts = (
            packed[:, : len(own_mean)],
            packed[:, len(own_mean) : -1],
            packed[:, -1:],
        )
        total = counts.sum()
        mean = (means * counts).sum(0) / total
        variance = (m2s.sum(0) + (counts * (means - mean).square()).sum(0)) / total
        y = F.batch_norm(wide, mean, variance, weight, bias, False, 0.0, eps)
        ctx.save_for_backward(x, mean, variance, weight, total)
        ctx.group, ctx.eps, ctx.has_bias = group, eps, bias is not None
        ctx.mark_non_differentiable(mean, variance, total)
        return y.to(x.dtype), mean, variance, total

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *unused: Tensor) -> Any:
        x, mean, variance, weight, total = ctx.saved_tensors
        wide, grad = x.to(mean.dtype), grad.to(mean.dtype)
        inverse = (variance + ctx.eps).rsqrt()
        # As if over this rank's rows alone, with the group's mean and deviation: the two sums, and no gradient by x.
        _, sum_product, sum_grad = torch.ops.aten.native_batch_norm_backward(
            grad, wide, weight, None, None, mean, inverse, True, ctx.eps, [False, True, True]
        )
        mean_grad, mean_product = (
            collectives.reduce_sum(torch.stack([sum_grad, sum_product]), ctx.group) / total
        ).unbind()
        # scale * (grad - mean_grad - normalized * mean_product), as one affine map of x and one of grad
        scale = inverse if weight is None else inverse * weight
        slope = -scale * inverse * mean_product
        offset = -scale * mean_grad - slope * mean
        channels = (1, -1, *[1] * (x.ndim - 2))
        own = torch.addcmul(offset.view(channels), wide, slope.view(channels))
        own = torch.addcmul(own, grad, scale.view(channels))
        # Weight and bias get this rank's sums: DDP averages them over ranks like every other gradient.
        return (
            own.to(x.dtype),
            sum_product if weight is not None else None,
            sum_grad if ctx.has_bias else None,
            None,
            None,
        )


def convert(module: nn.Module, images: int, group_images: int) -> nn.Module:
    """Gives every batch norm in `module` groups of `group_images` images; `images` is what a rank feeds at once.

    Where one process is one group, torch's own batch norm stays. CUDA ranks that share a group use torch's
    SyncBatchNorm.

    Raises:
        ValueError: the groups cut a rank's images unevenly.
    """
    world = process_group.world_size()
    if group_images % images and images % group_images:
        raise ValueError(
            f"parallel.bn_group_images: {group_images} neither divides nor is a multiple of the {images} images a rank feeds at once; "
            f"choose a divisor or a multiple of {images}, or another local_batch_size"
        )
    if group_images == images:
        return module
    ranks = group_images // images
    if ranks > 1 and world % ranks:
        raise ValueError(
            f"parallel.bn_group_images: {group_images} is {ranks} ranks of {images} images, which does not divide {world} ranks"
        )
    group = process_group.new_groups(ranks) if ranks > 1 else None
    for name, child in list(module.named_modules()):
        if isinstance(child, _BatchNorm):
            cuda = child.weight is not None and child.weight.is_cuda
            if ranks > 1 and cuda and not hasattr(child, "act"):
                replacement: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(child, group)
            else:
                replacement = GroupBatchNorm(child, images, group_images, group)
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, replacement)
    return module


def is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, (_BatchNorm, GroupBatchNorm))


def spans_ranks(module: nn.Module) -> bool:
    """Whether the module is a batch norm whose statistics come from several ranks."""
    return isinstance(module, nn.SyncBatchNorm) or (
        isinstance(module, GroupBatchNorm) and module.ranks > 1
    )


def statistics(module: nn.Module) -> list[Tensor]:
    """The running statistics of every batch norm in `module`, and its count of batches."""
    norms = (child for child in module.modules() if is_batch_norm(child))
    return [buffer for norm in norms for _, buffer in norm.named_buffers(recurse=False)]


@torch.no_grad()
def remembered(module: nn.Module) -> Tensor | None:
    """All running means and variances in one tensor; None where there are none."""
    buffers = [buffer for buffer in statistics(module) if buffer.is_floating_point()]
    return torch.cat([buffer.flatten() for buffer in buffers]) if buffers else None


@torch.no_grad()
def put_back(module: nn.Module, before: Tensor | None, where: Tensor) -> None:
    """Restores what `remembered` gave if `where`, a scalar on the device, is true: a broken batch leaves no trace."""
    buffers = [buffer for buffer in statistics(module) if buffer.is_floating_point()]
    if before is not None:
        kept = torch.where(where, before, torch.cat([buffer.flatten() for buffer in buffers]))
        parts = kept.split([buffer.numel() for buffer in buffers])
        torch._foreach_copy_(
            buffers, [part.view_as(buffer) for part, buffer in zip(parts, buffers)]
        )
