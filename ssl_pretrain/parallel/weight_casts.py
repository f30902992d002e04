"""Cast a teacher's weights to bfloat16 once per step.

Autocast casts the weights of a matrix product each time the product is computed, with one kernel
per weight. It only keeps the results for weights that are trained. A teacher's weights would be
cast again for every view and every micro-batch.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, cast

import torch
from torch import Tensor, nn

from ssl_pretrain.models.components import Backbone, Teacher

# Autocast rounds weights and biases of these modules to bfloat16. Subclasses may compute their
# weights in float32, as weight standardization does.
CAST_MODULES = (nn.Linear, nn.Conv2d)


def cast_once_per_step(module: nn.Module) -> None:
    """Make every teacher in a module cast its weights once per step. Results do not change.

    Outside of their forward passes, teachers have their float32 weights. Sharded weights are not
    supported. FSDP casts them itself.
    """
    for teacher in module.modules():
        if isinstance(teacher, Teacher):
            _wrap_forward(teacher)


def count_copy_bytes(module: nn.Module) -> int:
    """Return the bytes of the bfloat16 copies that the teachers in a module keep."""
    return sum(
        torch.bfloat16.itemsize * owner.get_parameter(name).numel()
        for teacher in module.modules()
        if isinstance(teacher, Teacher)
        for owner, name in castable_weights(teacher)
    )


def castable_weights(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return the owners and names of the float32 parameters that only autocast would read.

    Networks that are not timm's are left out. They may turn autocast off for some of their layers.
    """
    if isinstance(module, Backbone) and not type(module.model).__module__.startswith("timm."):
        return []
    weights: list[tuple[nn.Module, str]] = []
    if type(module) in CAST_MODULES:
        for name, parameter in module.named_parameters(recurse=False):
            if name in ("weight", "bias") and parameter.dtype == torch.float32:
                weights.append((module, name))
    for child in module.children():
        weights += castable_weights(child)
    return weights


def _wrap_forward(teacher: Teacher) -> None:
    """Make `forward` of the teacher and `tokens` of its backbones use copies of the weights."""
    copies = _Copies(teacher)

    def with_copies(function: Callable[..., Any]) -> Any:
        @wraps(function)
        def call(views: Tensor, *arguments: Any, **options: Any) -> Any:
            device_type = views.device.type
            uses_bfloat16 = (
                torch.is_autocast_enabled(device_type)
                and torch.get_autocast_dtype(device_type) == torch.bfloat16
            )
            if not uses_bfloat16:
                return function(views, *arguments, **options)
            copies.update()
            with copies.in_place_of_weights():
                return function(views, *arguments, **options)

        return call

    teacher.forward = with_copies(teacher.forward)  # type: ignore[method-assign]
    for backbone in teacher.children():
        if isinstance(backbone, Backbone):
            backbone.tokens = with_copies(backbone.tokens)  # type: ignore[method-assign]


class _Copies:
    """bfloat16 copies of the weights of a module that autocast rounds."""

    def __init__(self, module: nn.Module):
        self.owners_and_names = castable_weights(module)
        self.weights = [
            cast(nn.Parameter, owner._parameters[name]) for owner, name in self.owners_and_names
        ]
        self.copies: list[nn.Parameter] = []
        self.versions: list[int] = []

    @torch.no_grad()
    def update(self) -> None:
        """Copy the weights if they have changed. On CUDA the copies take a few launches."""
        # Every operation that changes a tensor in place increases its version.
        versions = [weight._version for weight in self.weights]
        if versions == self.versions:
            return
        if not self.copies:
            self.copies = [
                nn.Parameter(torch.empty_like(weight, dtype=torch.bfloat16), requires_grad=False)
                for weight in self.weights
            ]
        torch._foreach_copy_([*self.copies], [*self.weights])
        self.versions = versions

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """Let the modules use the copies inside the context."""
        self._assign(self.copies)
        try:
            yield
        finally:
            self._assign(self.weights)

    def _assign(self, parameters: list[nn.Parameter]) -> None:
        for (owner, name), parameter in zip(self.owners_and_names, parameters):
            owner._parameters[name] = parameter
