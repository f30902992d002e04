"""A teacher, the exponential moving average of a student."""

import copy

import torch
from torch import Tensor, nn

from ssl_pretrain.distributed import collectives
from ssl_pretrain.models.timm_import import timm
from ssl_pretrain.optim import schedules
from ssl_pretrain.optim.schedules import Progress


def rising_momentum(progress: Progress, start: float) -> float:
    """Return a teacher's momentum, which rises from `start` to 1 by half a cosine.

    The schedule of BYOL (Grill et al., NeurIPS 2020, arXiv:2006.07733, section 3.3), DINO and MoCo
    v3.
    """
    return schedules.cosine(progress.fraction, start=start, final=1.0)


class Teacher(nn.Module):
    """Copies of modules of a student, applied one after the other, which no gradient moves.

    Parameters are a moving average of the student's. Buffers are the teacher's own, because the
    authors of BYOL, DINO and MoCo run its batch norm in training mode on its own features. Dropout
    and drop path are off, whatever the student does.

    Args:
        modules: The student's modules by their names, in the order in which they are applied.
    """

    def __init__(self, **modules: nn.Module):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, copy.deepcopy(module).requires_grad_(False))
        for module in self.modules():
            if isinstance(module, timm.layers.DropPath):
                module.drop_prob = 0.0
            elif isinstance(module, nn.Dropout):
                module.p = 0.0

    @torch.no_grad()
    def forward(self, views: Tensor) -> Tensor:
        """Apply the teacher's modules in order to views of shape (batch, 3, height, width)."""
        for module in self.children():
            views = module(views)
        return views

    @torch.no_grad()
    def move(self, student: nn.Module, momentum: float, stepped: Tensor | float) -> None:
        """Move the weights towards the student's.

        Both are sharded alike, or not at all, so each rank moves what it holds.

        Args:
            student: Module with the same submodules under the same names.
            momentum: Weight of the teacher in momentum * teacher + (1 - momentum) * student.
            stepped: 1 to move, 0 to stay. May be a tensor, which is not read by the host.
        """
        for name, module in self.named_children():
            weights = _shards(module)
            steps = list(torch._foreach_sub(_shards(student.get_submodule(name)), weights))
            rate = torch.as_tensor(stepped, dtype=weights[0].dtype, device=weights[0].device)
            torch._foreach_mul_(steps, (1.0 - momentum) * rate)
            torch._foreach_add_(weights, steps)

    @torch.no_grad()
    def reinitialize(self) -> None:
        """Give the teacher other starting weights than the student's, from the same distributions.

        The numbers of each weight tensor change places.
        """
        for parameter in self.parameters():
            if parameter.ndim > 1:
                order = torch.randperm(parameter.numel(), device=parameter.device)
                parameter.copy_(parameter.flatten()[order].view_as(parameter))


def _shards(module: nn.Module) -> list[Tensor]:
    return collectives.shards(parameter.detach() for parameter in module.parameters())
