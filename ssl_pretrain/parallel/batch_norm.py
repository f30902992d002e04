"""Batch norm over fixed groups of the global batch, on any device."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from ssl_pretrain.distributed import process_group
from ssl_pretrain.parallel.synchronized_batch_norm import (
    CUDASynchronizedNorm,
    PortableSynchronizedNorm,
)


class GroupBatchNorm(nn.Module):
    """Batch norm over groups of `group_images` consecutive images of the global batch.

    A forward pass may contain several views of the same images, stacked view by view. It then has
    views * images rows, and a group contains all views of its images. A group is either a slice of
    this rank's images or all images of several ranks.

    Args:
        source: The batch norm to replace. Parameters and buffers are shared and keep their names.
        micro_batch_size: Images per forward pass on this rank.
        group_images: Images per group, a divisor or a multiple of `micro_batch_size`.
        group: Process group of the ranks that share statistics. None means all ranks.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, source: _BatchNorm, micro_batch_size: int, group_images: int, group: Any):
        super().__init__()
        if source.momentum is None or source.running_mean is None:
            raise ValueError(
                f"parallel.bn_group_images: {group_images} does not support a batch norm without "
                "running statistics or with a cumulative average of them; set it to "
                f"{micro_batch_size}, the images per forward pass"
            )
        self.eps, self.momentum = source.eps, float(source.momentum)
        self.micro_batch_size, self.group = micro_batch_size, group
        self.groups_per_rank = max(1, micro_batch_size // group_images)
        self.ranks_per_group = max(1, group_images // micro_batch_size)
        self.weight, self.bias = source.weight, source.bias
        for name, buffer in source.named_buffers():
            self.register_buffer(name, buffer)
        # timm's BatchNormAct2d includes an activation.
        self.drop = getattr(source, "drop", nn.Identity())
        self.act = getattr(source, "act", nn.Identity())
        self.train(source.training)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (rows, channels, ...). Evaluation mode uses the running statistics."""
        if self.training:
            spans_ranks = self.ranks_per_group > 1
            y = self._normalize_across_ranks(x) if spans_ranks else self._normalize_within_rank(x)
        else:
            statistics = self.running_mean, self.running_var
            y = F.batch_norm(x, *statistics, self.weight, self.bias, False, 0.0, self.eps)
        return self.act(self.drop(y))

    def _normalize_across_ranks(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            return self._normalize_with_cuda_kernels(x)
        y, mean, variance, count = PortableSynchronizedNorm.apply(
            x, self.weight, self.bias, self.eps, self.group
        )
        unbiased = variance * count / (count - 1).clamp(min=1)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        return y

    def _normalize_with_cuda_kernels(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.num_batches_tracked += 1
        statistics = self.running_mean, self.running_var
        return CUDASynchronizedNorm.apply(
            x, self.weight, self.bias, *statistics, self.momentum, self.eps, self.group
        )

    def _normalize_within_rank(self, x: Tensor) -> Tensor:
        """Normalize each group separately. Slices of rows keep the memory format of `x`."""
        num_groups = self.groups_per_rank
        rows = self.micro_batch_size // num_groups
        slices = x.split(rows)  # view v of group g is slice v * num_groups + g
        means, variances = (
            statistic.repeat(num_groups, 1) for statistic in (self.running_mean, self.running_var)
        )
        outputs = []
        for index in range(num_groups):
            views = slices[index::num_groups]
            y = F.batch_norm(
                views[0] if len(views) == 1 else torch.cat(views),
                means[index],
                variances[index],
                self.weight,
                self.bias,
                training=True,
                momentum=self.momentum,
                eps=self.eps,
            )
            outputs.append(y.split(rows))
        with torch.no_grad():  # each group has updated its own copy of the running statistics
            self.num_batches_tracked += 1
            self.running_mean.copy_(means.mean(0))
            self.running_var.copy_(variances.mean(0))
        return torch.cat([y for groups_of_view in zip(*outputs) for y in groups_of_view])


def convert(module: nn.Module, micro_batch_size: int, group_images: int) -> nn.Module:
    """Make every batch norm in `module` normalize over groups of `group_images` images, in place.

    torch's own batch norm is kept if each forward pass is exactly one group.

    Args:
        module: The network.
        micro_batch_size: Images per forward pass on this rank.
        group_images: Images per group.

    Raises:
        ValueError: If the groups do not divide the images or the ranks evenly.
    """
    world_size, ranks = process_group.world_size(), group_images // micro_batch_size
    if group_images % micro_batch_size and micro_batch_size % group_images:
        raise ValueError(
            f"parallel.bn_group_images: {group_images} neither divides nor is a multiple of the "
            f"{micro_batch_size} images in a rank's forward pass; choose a divisor or a multiple "
            f"of {micro_batch_size}, or another micro_batch_size"
        )
    if ranks == 1:
        return module
    if ranks > 1 and world_size % ranks:
        raise ValueError(
            f"parallel.bn_group_images: {group_images} images span {ranks} ranks of "
            f"{micro_batch_size} images, and {ranks} does not divide the {world_size} ranks; "
            f"choose {micro_batch_size} times a divisor of {world_size}"
        )
    group = process_group.new_subgroup(ranks) if ranks > 1 else None
    for name, child in list(module.named_modules()):
        if isinstance(child, _BatchNorm):
            grouped = GroupBatchNorm(child, micro_batch_size, group_images, group)
            module.set_submodule(name, grouped)
    return module


def is_batch_norm(module: nn.Module) -> bool:
    """Return True for a batch norm of torch or timm, and for a `GroupBatchNorm`."""
    return isinstance(module, (_BatchNorm, GroupBatchNorm))


def spans_ranks(module: nn.Module) -> bool:
    """Return True if the module is a batch norm with statistics over several ranks."""
    return isinstance(module, GroupBatchNorm) and module.ranks_per_group > 1


def statistics(module: nn.Module) -> list[Tensor]:
    """Return the running statistics and batch counters of every batch norm in `module`."""
    norms = (child for child in module.modules() if is_batch_norm(child))
    return [buffer for norm in norms for _, buffer in norm.named_buffers(recurse=False)]


def clone_statistics(modules: Iterable[nn.Module]) -> list[tuple[Tensor, Tensor]]:
    """Return the statistics and counters of the modules' batch norms, each with a copy."""
    return [(buffer, buffer.clone()) for module in modules for buffer in statistics(module)]


@torch.no_grad()
def restore_clones(clones: list[tuple[Tensor, Tensor]]) -> None:
    """Restore what `clone_statistics` has returned."""
    for buffer, value in clones:
        buffer.copy_(value)


def _means_and_variances(module: nn.Module) -> list[Tensor]:
    return [buffer for buffer in statistics(module) if buffer.is_floating_point()]


@torch.no_grad()
def snapshot_statistics(module: nn.Module) -> Tensor | None:
    """Return a copy of all running means and variances as a vector, or None if there are none."""
    buffers = _means_and_variances(module)
    return torch.cat([buffer.flatten() for buffer in buffers]) if buffers else None


@torch.no_grad()
def restore_statistics(module: nn.Module, snapshot: Tensor | None, condition: Tensor) -> None:
    """Restore a snapshot if the condition, a boolean scalar on the device, is true.

    This removes the batch of a skipped step from the statistics, without waiting for the device.
    """
    if snapshot is not None:
        buffers = _means_and_variances(module)
        current = torch.cat([buffer.flatten() for buffer in buffers])
        copy_to_buffers(torch.where(condition, snapshot, current), buffers)


def copy_to_buffers(vector: Tensor, buffers: list[Tensor]) -> None:
    """Copy consecutive slices of a vector to the buffers."""
    slices = vector.split([buffer.numel() for buffer in buffers])
    sources = [values.view_as(buffer) for values, buffer in zip(slices, buffers)]
    torch._foreach_copy_(buffers, sources)
