"""Count the kernels that a step launches on a GPU, in eager mode and without a GPU.

Every dispatched operation on the GPU counts as one launch, with these exceptions:

- Views, allocations and changes of metadata launch nothing.
- `_foreach_` operations and fused optimizers launch one kernel per group of tensors. The groups
  follow `multi_tensor_apply` (ATen/native/cuda/MultiTensorApply.cuh). Lists whose tensors differ in
  shape, dtype or strides take the slow path, one launch per tensor.
- The operations in `KERNELS` launch several kernels.
- Products, convolutions and batch norms of cuBLAS and cuDNN count as one kernel. The libraries may
  add kernels that convert formats or split a reduction.

Triton kernels are counted where Triton launches them. An operator that is not PyTorch's own is
refused, because its launches would be hidden.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from fused_optimizers import LISTS, strides
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ssl_pretrain.optim import optimizers
from ssl_pretrain.planning.recorder import ALLOCATIONS
from ssl_pretrain.step import Stepper

NAMESPACES = {"aten", "c10d", "prim", "profiler"}
NO_KERNELS = NAMESPACES - {"aten"}  # NCCL's kernels are counted as collectives
NO_LAUNCH = ALLOCATIONS | {"_unsafe_view", "lift_fresh", "_reshape_alias"}
KERNELS: dict[str, Callable[..., int]] = {
    # One kernel per requested gradient: of the input, the weight and the bias.
    "convolution_backward": lambda args: sum(args[-1]),
    # The input's gradient, and the gradients of weight and bias.
    "native_layer_norm_backward": lambda args: 2,
    # A dot product per row, the gradients, and a conversion of the queries' gradient.
    "_scaled_dot_product_flash_attention_backward": lambda args: 3,
    "cat": lambda args: -(-len(args[0]) // 128),
    "stack": lambda args: -(-len(args[0]) // 128),
}
# ATen/native/cuda/MultiTensorApply.cuh: tensors per launch by the number of lists, blocks per
# launch, and elements per block.
MAX_TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
MAX_BLOCKS, CHUNK = 320, 65_536


class CountLaunches(TorchDispatchMode):
    """Count launches by phase."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()  # launches by phase
        self.operations: Counter[str] = Counter()  # launches by phase and operation
        self.phase = "other"

    def add(self, operation: str, num_launches: int) -> None:
        """Add launches of an operation to the current phase."""
        if num_launches:
            self.counts[self.phase] += num_launches
            self.operations[f"{self.phase}: {operation}"] += num_launches

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        self.add(str(function), count_kernels(function, args, kwargs or {}, out))
        return out


def count_kernels(function: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Return the number of kernels that an operation launches on the GPU."""
    assert function.namespace in NAMESPACES, (
        f"{function} is not an operator of PyTorch, so its launches would be hidden"
    )
    name = function._overloadpacket.__name__
    tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
    if function.namespace in NO_KERNELS or not any(tensor.is_cuda for tensor in tensors):
        return 0
    if name in NO_LAUNCH or _is_view(function):
        return 0
    if name.startswith(("_foreach_", "_fused_")):
        return _count_list_launches(name, args, out)
    return KERNELS[name](args) if name in KERNELS else 1


def _is_view(function: Any) -> bool:
    """Return True if the results are views of an argument that is not written to."""
    schema = function._schema
    aliases = [result.alias_info for result in schema.returns]
    return not schema.is_mutable and any(aliases)


def _count_list_launches(name: str, args: Any, out: Any) -> int:
    """Return the launches of an operation on lists of tensors."""
    lists = [
        value
        for value in (*args, out)
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor)
    ]
    if name == "_foreach_norm":
        # Two more kernels zero the memory of the blocks' norms and reduce them to one per tensor.
        return _count_multi_tensor_launches(lists[0], 1) + 2
    if name in LISTS:
        lists = [tensors for tensors in args[: 1 + len(LISTS[name])] if tensors]
    elif not _can_take_fast_path(lists, may_convert=name == "_foreach_copy_"):
        return len(lists[0])
    return _count_multi_tensor_launches(lists[0], len(lists))


def _can_take_fast_path(lists: list[Any], may_convert: bool) -> bool:
    """Return True if one kernel can handle a group of tensors.

    Args:
        lists: The arguments and results of the operation.
        may_convert: True if each list may have a dtype of its own.
    """
    return all(
        tensor.shape == first.shape
        and strides(tensor) == strides(first)
        and tensor.dtype == (tensors if may_convert else lists[0])[0].dtype
        for tensors in lists
        for tensor, first in zip(tensors, lists[0])
    )


def _count_multi_tensor_launches(tensors: Any, num_lists: int) -> int:
    """Return the launches of `multi_tensor_apply`, which starts one when a limit is reached."""
    launches = num_tensors = num_blocks = 0
    for tensor in tensors:
        num_tensors += 1
        num_chunks = -(-tensor.numel() // CHUNK)
        for chunk in range(num_chunks):
            num_blocks += 1
            is_last = chunk == num_chunks - 1
            tensors_are_full = num_tensors == MAX_TENSORS[num_lists] and is_last
            if tensors_are_full or num_blocks == MAX_BLOCKS:
                launches += 1
                num_tensors, num_blocks = (0 if is_last else 1), 0
    return launches + (num_blocks > 0)


@contextmanager
def count_launches() -> Iterator[CountLaunches]:
    """Count all launches inside the context, by phase of the step. Compiled regions run eagerly."""
    counter = CountLaunches()
    with ExitStack() as stack:
        stack.callback(torch.compiler.set_stance, "default")
        torch.compiler.set_stance("force_eager")
        for target, name, phase in (
            (Stepper, "_embed", "forward"),
            (Stepper, "_targets", "targets"),
            (torch.Tensor, "backward", "backward"),
            (torch.autograd, "backward", "backward"),
            (torch.autograd, "grad", "backward"),
            (optimizers, "step_if_finite", "optimizer"),
        ):
            function = in_phase(counter, phase, getattr(target, name))
            stack.enter_context(mock.patch.object(target, name, function))
        stack.enter_context(_count_triton(counter))
        stack.enter_context(counter)
        yield counter


def in_phase(counter: CountLaunches, phase: str, function: Callable[..., Any]) -> Any:
    """Return the function, whose launches count for a phase."""

    def call(*args: Any, **kwargs: Any) -> Any:
        outer, counter.phase = counter.phase, phase
        try:
            return function(*args, **kwargs)
        finally:
            counter.phase = outer

    return call


@contextmanager
def _count_triton(counter: CountLaunches) -> Iterator[None]:
    try:
        from triton.runtime import JITFunction
    except ImportError:
        yield
        return

    def run(kernel: Any, *args: Any, **kwargs: Any) -> None:
        counter.add(f"triton {kernel.fn.__name__}", 1)

    with mock.patch.object(JITFunction, "run", run):
        yield
