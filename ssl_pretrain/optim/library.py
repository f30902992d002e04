"""Optimizers of timm and torch with the masked step of this project.

An optimizer is supported if its whole state is in tensors, whose values before the first step are
known. A masked step can then be undone on the device. Other optimizers count their steps in Python
(timm's lamb, adan, mars, madgrad), copy a count to the device (timm's nadamw), decide on the host
which step is the first (adopt), or compute the loss or gradients a second time (adahessian, lbfgs).
"""

import inspect
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from ssl_pretrain.optim.masked import Chunk, MaskedOptimizer
from ssl_pretrain.optim.optimizer_list import ENTRIES

# Arguments that follow from other settings, or that the masked step does not support.
RESERVED_ARGUMENTS = {
    "lr": "the learning rate is optim.base_lr",
    "weight_decay": "set optim.weight_decay",
    "capturable": "it follows from the device",
    "corrected_weight_decay": "it needs the peak learning rate, which depends on the batch size",
    **dict.fromkeys(
        ("maximize", "differentiable", "fused", "adamw_lr", "verbose"), "it is not supported"
    ),
}


class LibraryOptimizer(MaskedOptimizer):
    """An optimizer of timm or torch whose steps can be masked.

    Args:
        params: Parameters, or groups of them.
        name: A name in `ENTRIES`.
        args: Arguments of its constructor.
    """

    def __init__(self, params: Iterable[Any], name: str, args: Mapping[str, Any]):
        self._name, entry = name, ENTRIES[name]
        super().__init__(params, entry.initial_values, adapt=True)
        device = self.param_groups[0]["params"][0].device
        # On a GPU, capturable keeps the step counts there, so that a masked step can be undone.
        # foreach updates many tensors per kernel launch, which is timm's default.
        on_gpu = ("capturable", "foreach") if name.startswith("torch:") else ("capturable",)
        known = argument_names(name) if device.type == "cuda" else set()
        arguments = {key: True for key in on_gpu if key in known} | dict(args)
        placeholder = nn.Parameter(torch.zeros((), device=device))
        self._optimizer = entry.optimizer_class([placeholder], **arguments)

    def update(self, group: dict[str, Any], chunk: Chunk) -> None:
        """Update copies of weights and states in place, with the optimizer of the library."""
        parameters = [nn.Parameter(weight) for weight in chunk.weights]
        for parameter, gradient in zip(parameters, chunk.gradients):
            parameter.grad = gradient
        options = {key: group[key] for key in ("lr", "weight_decay")}
        if self._name == "timm:muon" and not group["adapt"]:
            options["use_fallback"] = True
        options["params"] = parameters
        self._optimizer.param_groups = [self._optimizer.defaults | options]
        self._optimizer.state.clear()
        self._optimizer.state.update(zip(parameters, chunk.states))
        self._optimizer.step()
        for state in chunk.states:
            for key in [key for key, value in state.items() if not isinstance(value, Tensor)]:
                del state[key]  # Muon's choice of algorithm, made again in every step
        self._optimizer.state.clear()


def argument_names(name: str) -> set[str]:
    """Return the names of the arguments of an optimizer's constructor."""
    names = set(inspect.signature(ENTRIES[name].optimizer_class.__init__).parameters)
    return names - {"self", "params"}


def can_be_traced(name: str) -> bool:
    """Return True if a step runs on meta tensors, because it never reads a value on the host."""
    return name not in ENTRIES or "capturable" not in argument_names(name)


def check_args(name: str, args: Mapping[str, Any]) -> None:
    """Check the arguments of an optimizer of timm or torch.

    Raises:
        ValueError: If an argument is unknown, follows from another setting, or is refused by the
            library.
    """
    allowed = sorted(argument_names(name) - RESERVED_ARGUMENTS.keys())
    for key in args:
        if key in RESERVED_ARGUMENTS and key in argument_names(name):
            raise ValueError(
                f"optim.args.{key}: {args[key]!r} cannot be given, because "
                f"{RESERVED_ARGUMENTS[key]}; leave it out"
            )
        if key not in allowed:
            similar = get_close_matches(key, allowed, n=1)
            remedy = f"did you mean {similar[0]!r}?" if similar else f"give {', '.join(allowed)}"
            raise ValueError(f"optim.args.{key}: {name} has no such argument; {remedy}")
    try:
        ENTRIES[name].optimizer_class([nn.Parameter(torch.zeros(()))], **args)
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(
            f"optim.args: {name} refuses {dict(args)}: {error}; change optim.args"
        ) from None
