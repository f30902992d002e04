"""Backward passes on fake CUDA tensors, by a walk through autograd's graph in Python.

PyTorch's engine refuses CUDA tensors on a machine without a driver. The nodes of its graph can be
called one by one, though, so this walk runs the same backward formulas in the same order. Gradients
of a tensor that is used several times are added up, converted to the tensor's dtype and shape, and
accumulated in `grad` by autograd's own node.
"""

import heapq
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from fused_optimizers import strides
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

Edge = tuple[Any, int]  # a node of the graph, and the index of one of its outputs
_num_walks = 0
callbacks: list[Callable[[], None]] = []  # called after `backward`, as DDP's hooks are


@contextmanager
def replace_engine() -> Iterator[None]:
    """Use this walk in `Tensor.backward`, `autograd.backward` and `autograd.grad`."""
    with ExitStack() as stack:
        for target, name, function in (
            (torch.Tensor, "backward", lambda loss, gradient=None: backward([loss], [gradient])),
            (torch.autograd, "backward", backward),
            (torch.autograd, "grad", grad),
            # Activation checkpointing recomputes a block once per backward pass, by its number.
            (torch._C, "_current_graph_task_id", lambda: _num_walks),
        ):
            stack.enter_context(mock.patch.object(target, name, function))
        yield


def backward(tensors: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Accumulate gradients in the leaves, like `torch.autograd.backward`."""
    _walk(tensors, gradients, [])
    for callback in callbacks:
        callback()


def grad(
    outputs: Tensor, inputs: Sequence[Tensor], *, allow_unused: bool = False
) -> tuple[Tensor | None, ...]:
    """Return the gradients with respect to `inputs`, like `torch.autograd.grad`."""
    edges = [_edge(x) for x in ([inputs] if isinstance(inputs, Tensor) else inputs)]
    captured = _walk([outputs], [None], edges)
    gradients = tuple(captured.get(edge) for edge in edges)
    assert allow_unused or None not in gradients, "an input is not used by the outputs"
    return gradients


@torch.no_grad()
def _walk(
    tensors: Sequence[Tensor], gradients: Sequence[Tensor | None], captured_edges: list[Edge]
) -> dict[Edge, Tensor]:
    """Visit every node after all nodes that use its outputs.

    Args:
        tensors: Roots of the graph.
        gradients: Their gradients. None is 1.
        captured_edges: Edges whose gradients are returned. Without any, gradients are accumulated
            in the leaves.
    """
    global _num_walks
    _num_walks += 1
    pending: dict[Any, dict[int, Tensor]] = defaultdict(dict)
    roots = [_edge(tensor) for tensor in tensors]
    for (node, output), tensor, gradient in zip(roots, tensors, gradients):
        _add(pending[node], output, torch.ones_like(tensor) if gradient is None else gradient)
    num_users = _count_users([node for node, _ in roots])
    order, captured = itertools.count(), dict[Edge, Tensor]()
    ready = [
        (-node._sequence_nr(), next(order), node)
        for node in dict.fromkeys(node for node, _ in roots)
        if not num_users[node]
    ]
    heapq.heapify(ready)
    while ready:
        _, _, node = heapq.heappop(ready)
        values = pending.pop(node, {})
        captured |= {edge: values[edge[1]] for edge in captured_edges if edge[0] is node and values}
        is_skipped = captured_edges and hasattr(node, "variable")
        results = _apply(node, values) if values and not is_skipped else ()
        for position, (target, output) in enumerate(node.next_functions):
            if target is None:
                continue
            if position < len(results) and results[position] is not None:
                _add(pending[target], output, _fit(results[position], target, output))
            num_users[target] -= 1
            if not num_users[target]:
                heapq.heappush(ready, (-target._sequence_nr(), next(order), target))
    return captured


def _edge(tensor: Tensor) -> Edge:
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def _count_users(roots: Sequence[Any]) -> dict[Any, int]:
    """Return how many edges lead to each node."""
    num_users: dict[Any, int] = defaultdict(int)
    seen = set(roots)
    stack = list(seen)
    while stack:
        for target, _ in stack.pop().next_functions:
            if target is not None:
                num_users[target] += 1
                if target not in seen:
                    seen.add(target)
                    stack.append(target)
    return num_users


def _apply(node: Any, values: dict[int, Tensor]) -> Sequence[Tensor | None]:
    """Return the gradients of a node's inputs, in the order of `next_functions`."""
    metadata = node._input_metadata
    gradients = [values.get(output) for output in range(len(metadata))]
    if hasattr(node, "variable"):
        _accumulate(node, gradients[0])
        return ()
    if not isinstance(node, torch.autograd.function.BackwardCFunction):
        results = node(*gradients)
        return results if isinstance(results, tuple) else (results,)
    if getattr(node, "materialize_grads", True):
        gradients = [
            torch.zeros(data.shape, dtype=data.dtype, device=data.device)
            if gradient is None
            else gradient
            for gradient, data in zip(gradients, metadata)
        ]
    results = node.apply(*gradients)
    results = results if isinstance(results, tuple) else (results,)
    # A Function returns one gradient per argument. Only tensors that need one have a target.
    input_gradients = (r for r, needs_grad in zip(results, node.needs_input_grad) if needs_grad)
    return [None if target is None else next(input_gradients) for target, _ in node.next_functions]


def _accumulate(node: Any, gradient: Any) -> None:
    """Add a gradient to that of a leaf.

    The engine does not copy the first gradient if it has the strides of the leaf. The node cannot
    tell that, because this walk holds the gradient too.
    """
    leaf = node.variable
    if leaf.grad is None and strides(gradient) == strides(leaf):
        leaf.grad = gradient.detach()
    else:
        node(gradient)


def _fit(gradient: Tensor, target: Any, output: int) -> Tensor:
    """Convert a gradient to the shape and the dtype of its tensor, as the engine does."""
    metadata = target._input_metadata[output]
    if gradient.shape != metadata.shape:
        gradient = gradient.sum_to_size(metadata.shape)
    return gradient.to(metadata.dtype)


def _add(values: dict[int, Tensor], output: int, gradient: Tensor) -> None:
    values[output] = values[output] + gradient if output in values else gradient
