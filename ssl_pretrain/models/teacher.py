"""A teacher, the exponential moving average of a student."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ssl_pretrain.distributed import collectives
from ssl_pretrain.models.timm_import import timm
from ssl_pretrain.optim import schedules


def to_one(progress: float, start: float) -> float:
    """The momentum at `progress`: half a cosine from `start` to 1 (BYOL, arXiv:2006.07733, section 3.3; DINO and MoCo v3 alike)."""
    return schedules.cosine(progress, start=start, final=1.0)


class Teacher(nn.Module):
    """Copies of some of a student's parts, one after the other, that no gradient moves.

    Parameters are a moving average. Buffers are the teacher's own: the authors of BYOL, DINO and MoCo run its batch norm
    in training mode on the teacher's own features. The teacher drops nothing, whatever the student drops.
    """

    def __init__(self, **parts: nn.Module):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, copy.deepcopy(part).requires_grad_(False))
        for module in self.modules():
            if isinstance(module, timm.layers.DropPath):
                module.drop_prob = 0.0
            elif isinstance(module, nn.Dropout):
                module.p = 0.0

    @torch.no_grad()
    def forward(self, views: Tensor) -> Tensor:
        for part in self.children():
            views = part(views)
        return views

    @torch.no_grad()
    def move(self, student: nn.Module, momentum: float, stepped: Tensor | float) -> None:
        """teacher = momentum * teacher + (1 - momentum) * student, or nothing where `stepped` is 0.

        Both are sharded alike, or not at all: each rank moves what it holds.
        """
        for name, part in self.named_children():
            own = collectives.shards(parameter.detach() for parameter in part.parameters())
            student_own = collectives.shards(
                parameter.detach() for parameter in student.get_submodule(name).parameters()
            )
            way = list(torch._foreach_sub(student_own, own))
            torch._foreach_mul_(
                way,
                (1.0 - momentum)
                * torch.as_tensor(stepped, dtype=own[0].dtype, device=own[0].device),
            )
            torch._foreach_add_(own, way)

    @torch.no_grad()
    def redraw(self) -> None:
        """Other starting weights than the student's, from the same distributions: each weight's numbers in another order."""
        for parameter in self.parameters():
            if parameter.ndim > 1:
                shuffled = torch.randperm(parameter.numel(), device=parameter.device)
                parameter.copy_(parameter.flatten()[shuffled].view_as(parameter))
