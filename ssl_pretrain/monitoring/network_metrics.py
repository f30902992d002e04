"""Metrics of a method's weights: gradients, updates, and the distance of the teacher."""

import torch
from torch import Tensor, nn

from ssl_pretrain.models.teacher import Teacher


class NetworkMonitor:
    """Monitor of the optimizer steps that it is told to observe.

    Attributes:
        metrics: Scalars on the device, of the step that was observed.
    """

    def __init__(self, method: nn.Module, optimizer: torch.optim.Optimizer):
        self.metrics: dict[str, Tensor] = {}
        self._method = method
        self._observing = False
        self._modules: dict[str, list[nn.Parameter]] = {}  # backbone, projector, ...
        for name, parameter in method.named_parameters():
            if parameter.requires_grad:
                self._modules.setdefault(name.partition(".")[0], []).append(parameter)
        self._before: dict[str, list[Tensor]] = {}
        optimizer.register_step_pre_hook(lambda *_: self._before_step())
        optimizer.register_step_post_hook(lambda *_: self._after_step())

    def observe(self, observing: bool) -> None:
        """Set whether the next step is measured, and forget the last one."""
        self._observing, self.metrics = observing, {}

    @torch.no_grad()
    def _before_step(self) -> None:
        if not self._observing:
            return
        for module, parameters in self._modules.items():
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            if gradients:
                self.metrics[f"gradient_norm_{module}"] = norm(gradients)
            self._before[module] = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def _after_step(self) -> None:
        for module, before in self._before.items():
            after = [parameter.detach() for parameter in self._modules[module]]
            self.metrics[f"update_ratio_{module}"] = relative_distance(after, before)
        teacher = getattr(self._method, "teacher", None)
        if self._before and isinstance(teacher, Teacher):
            student = [
                parameter.detach()
                for name, _ in teacher.named_children()
                for parameter in self._method.get_submodule(name).parameters()
            ]
            weights = [parameter.detach() for parameter in teacher.parameters()]
            self.metrics["teacher_distance"] = relative_distance(weights, student)
        self._before = {}


def relative_distance(tensors: list[Tensor], reference: list[Tensor]) -> Tensor:
    """Return the norm of the difference divided by the norm of the reference."""
    difference = norm(list(torch._foreach_sub(tensors, reference)))
    return difference / norm(reference).clamp(min=1e-12)


def norm(tensors: list[Tensor]) -> Tensor:
    """Return the Euclidean norm of all tensors together. Shards count as their whole tensors."""
    total = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))
    return total.full_tensor() if hasattr(total, "full_tensor") else total
