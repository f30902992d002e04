"""What follows the student: a teacher that is its moving average, a queue of past embeddings. Both are the same on all ranks."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_pretrain import distributed, schedules
from ssl_pretrain.timm_alone import timm


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
            own = distributed.shards(parameter.detach() for parameter in part.parameters())
            student_own = distributed.shards(parameter.detach() for parameter in student.get_submodule(name).parameters())
            way = list(torch._foreach_sub(student_own, own))
            torch._foreach_mul_(way, (1.0 - momentum) * torch.as_tensor(stepped, dtype=own[0].dtype, device=own[0].device))
            torch._foreach_add_(own, way)

    @torch.no_grad()
    def redraw(self) -> None:
        """Other starting weights than the student's, from the same distributions: each weight's numbers in another order."""
        for parameter in self.parameters():
            if parameter.ndim > 1:
                shuffled = torch.randperm(parameter.numel(), device=parameter.device)
                parameter.copy_(parameter.flatten()[shuffled].view_as(parameter))


class Queue(nn.Module):
    """The last `size` rows of shape `shape` that all ranks pushed, oldest overwritten first, in the global batch's order.

    Args:
        random: start with random unit rows (MoCo, NNCLR); else with zeros (SwAV).
    """

    rows: Tensor
    position: Tensor
    filled: Tensor

    def __init__(self, size: int, *shape: int, random: bool = True):
        super().__init__()
        self.register_buffer("rows", F.normalize(torch.randn(size, *shape), dim=-1) if random else torch.zeros(size, *shape))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))  # rows that came from images

    @torch.no_grad()
    def push(self, rows: Tensor, stepped: Tensor | float) -> None:
        """Takes every rank's `rows` (local_batch, *shape), or nothing where `stepped` is 0: decided where the queue is."""
        new = distributed.gather(rows.detach().to(self.rows.dtype))
        check_queue(len(self.rows), len(new))
        place = torch.arange(len(new), device=new.device) + self.position
        taken = torch.as_tensor(stepped, device=new.device) > 0
        self.rows.index_copy_(0, place, torch.where(taken, new, self.rows.index_select(0, place)))
        self.position.copy_((self.position + len(new) * taken) % len(self.rows))
        self.filled.copy_((self.filled + len(new) * taken).clamp(max=len(self.rows)))


def check_queue(queue_size: int, global_batch_size: int) -> None:
    """Raises ValueError for a queue that whole global batches do not fill exactly."""
    if queue_size < 1 or queue_size % global_batch_size:
        below = queue_size // global_batch_size * global_batch_size
        near = f"the nearest that are {below} and {below + global_batch_size}" if below else f"the smallest is {global_batch_size}"
        raise ValueError(f"method.queue_size: {queue_size} is not a multiple of global_batch_size {global_batch_size}; {near}")
