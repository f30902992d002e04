"""Base of optimizers whose step can be undone on the device."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssl_pretrain.distributed import collectives

CHUNK_ELEMENTS = 2**25  # elements that are updated at a time, 128 MiB in float32

State = dict[str, Tensor]


class Chunk(NamedTuple):
    """Parameters that are updated together, and copies of what the update changes."""

    params: list[Tensor]  # the parameters, which may be sharded and must not be changed
    weights: list[Tensor]  # copies of the parameters, or of this rank's shards
    gradients: list[Tensor]  # gradients of the weights
    states: list[State]  # copies of the states, empty before the first step


class MaskedOptimizer(torch.optim.Optimizer):
    """An optimizer whose steps change nothing if `found_inf` is 1, by the protocol of `SGD`.

    Subclasses update copies of the weights and of the state. The copies replace the originals
    unless the step is masked, so the host does not wait for `found_inf`. A few parameters are
    updated at a time, which bounds the memory for the copies.

    Each rank updates its own shards of sharded parameters.

    Args:
        params: Parameters, or groups of them.
        initial_values: Initial values of the state by key, if they are not 0.
        defaults: Options of the groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        initial_values: Mapping[str, float] | None = None,
        **defaults: Any,
    ):
        self.found_inf: Tensor | None = None
        self.grad_scale: Tensor | None = None
        self._initial_values = initial_values or {}
        super().__init__(params, {"lr": 0.0, "weight_decay": 0.0} | defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, unless `found_inf` is 1."""
        for group in self.param_groups:
            for params in _chunks([p for p in group["params"] if p.grad is not None]):
                self._step_chunk(group, params)

    def update(self, group: dict[str, Any], chunk: Chunk) -> None:
        """Update copies of weights and states in place.

        Args:
            group: Options of the parameters' group.
            chunk: The parameters and the copies.
        """
        raise NotImplementedError

    def _step_chunk(self, group: dict[str, Any], params: list[Tensor]) -> None:
        originals = collectives.local_tensors(params)
        weights = _copy(originals)
        gradients = collectives.local_tensors(p.grad for p in params if p.grad is not None)
        states = self._copy_states(params)
        self.update(group, Chunk(params, weights, gradients, states))
        values = list(weights)
        for p, weight, state in zip(params, weights, states):
            originals += [self._original_state(p, weight, *entry) for entry in state.items()]
            values += state.values()
        self._replace(originals, values)

    def _copy_states(self, params: list[Tensor]) -> list[State]:
        entries = [(p, key) for p in params for key in self.state[p]]
        copies = _copy(collectives.local_tensors(self.state[p][key] for p, key in entries))
        states: dict[Tensor, State] = {p: {} for p in params}
        for (p, key), value in zip(entries, copies):
            states[p][key] = value
        return list(states.values())

    def _original_state(self, parameter: Tensor, weight: Tensor, key: str, value: Tensor) -> Tensor:
        """Return this rank's shard of an entry of the state, and add the entry if it is missing."""
        if key not in self.state[parameter]:
            like = parameter.detach() if value.shape == weight.shape else value
            initial_value = self._initial_values.get(key, 0.0)
            self.state[parameter][key] = torch.full_like(like, initial_value, dtype=value.dtype)
        (original,) = collectives.local_tensors([self.state[parameter][key]])
        return original

    def _replace(self, originals: list[Tensor], values: list[Tensor]) -> None:
        """Copy the values to the originals, unless the step is masked."""
        if self.found_inf is None:
            torch._foreach_copy_(originals, values)
            return
        is_masked, scalars = self.found_inf > 0, []
        for original, value in zip(originals, values):
            if value.ndim:
                torch.where(is_masked, original, value, out=original)
            else:
                scalars.append((original, value))
        for dtype in {original.dtype for original, _ in scalars}:  # one kernel for all step counts
            pairs = [(old, new) for old, new in scalars if old.dtype == dtype]
            old, new = (torch.stack(tensors) for tensors in zip(*pairs))
            results = torch.where(is_masked, old, new).unbind()
            torch._foreach_copy_([original for original, _ in pairs], list(results))


def _copy(tensors: list[Tensor]) -> list[Tensor]:
    """Copy tensors, all in one kernel. Multiplication by 1 preserves every bit of a number."""
    return list(torch._foreach_mul(tensors, 1)) if tensors else []


def _chunks(params: list[Tensor]) -> Iterator[list[Tensor]]:
    """Divide parameters into lists of limited size. The division is the same on every rank."""
    chunk: list[Tensor] = []
    size = 0
    for parameter in params:
        if chunk and size + parameter.numel() > CHUNK_ELEMENTS:
            yield chunk
            chunk, size = [], 0
        chunk.append(parameter)
        size += parameter.numel()
    if chunk:
        yield chunk
