"""Trace computations on fake tensors, and count their floating-point operations.

The real program runs on fake tensors, which have a shape but no memory, so a step of any size
takes about a second. A multiplication and an addition count as two operations.
"""

import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    FlopCounterMode,
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from ssl_pretrain.config import RunConfig, build_method_on_meta, text_lengths
from ssl_pretrain.methods.base import Method
from ssl_pretrain.parallel import micro_batch
from ssl_pretrain.parallel.execution import Execution
from ssl_pretrain.planning.trace import CONVOLUTION, MATMUL, OTHER, Trace
from ssl_pretrain.views.batch import Batch

aten = torch.ops.aten
# Positions of the arguments that each operation reads twice. Batch norm reads its input for the
# statistics and again to normalize it. Backward passes of batch norm and convolutions read the
# gradient twice.
READ_TWICE = {
    "native_batch_norm": (0,),
    "native_batch_norm_backward": (0, 1),
    "convolution_backward": (0,),
}
BATCH_NORMS = {  # phase of each operation, and position of the argument that is True in training
    "native_batch_norm": ("forward", 5),
    "native_batch_norm_backward": ("backward", 7),
}
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}

Inputs = TypeVar("Inputs")
Results = TypeVar("Results")
BeginPhase = Callable[[str], None]


def record_trace(
    prepare: Callable[[], Inputs], function: Callable[[Inputs, BeginPhase], Results]
) -> tuple[Trace, Results]:
    """Trace `function` on fake tensors and return the trace with the function's results.

    Args:
        prepare: Function that makes the inputs before the trace begins.
        function: The computation. It takes the inputs and a function that begins a named phase.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        inputs = prepare()
        with Recorder() as recorder:
            results = function(inputs, recorder.begin_phase)
    return recorder.trace(), results


class Recorder(TorchDispatchMode):
    """Context manager that records every operation, on real and on fake tensors."""

    def __init__(self) -> None:
        super().__init__()
        # FLOPs, bytes moved, bytes held, kind, and whether it runs without tensor cores.
        self.operations: list[tuple[int, int, int, int, bool]] = []
        self.collectives: list[tuple[str, int]] = []
        self.batch_norm_channels: dict[str, list[int]] = {"forward": [], "backward": []}
        self.phase_starts: dict[str, int] = {}
        self._storage_bytes: dict[int, int] = {}  # by storage; freed storages are removed
        self._bytes_held = 0

    def begin_phase(self, name: str) -> None:
        """Begin a named phase with the next operation."""
        self.phase_starts[name] = len(self.operations)

    def trace(self) -> Trace:
        """Return the operations recorded so far."""
        rows = np.array(self.operations, dtype=np.int64).reshape(-1, 5)
        flops, bytes_moved, bytes_held, kinds, without_tensor_cores = rows.T
        return Trace(
            flops,
            bytes_moved,
            bytes_held,
            kinds,
            without_tensor_cores.astype(bool),
            self.collectives,
            self.batch_norm_channels,
            self.phase_starts or {"": 0},
        )

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        if function.namespace == "prim":
            return out
        name = function._overloadpacket.__name__
        inputs, outputs = _tensors((args, kwargs)), _tensors(out)
        for tensor in inputs:  # a view of a weight shares memory that was there before
            self._track(tensor.untyped_storage(), num_bytes=0)
        for tensor in outputs:
            storage = tensor.untyped_storage()
            self._track(storage, storage.nbytes())
        if name == "recv_":  # the other end of a `send`
            return out
        if function.namespace == "c10d":
            # The first argument of a reduce-scatter is its result, one rank's shard.
            tensors = [args[1]] if name == "_reduce_scatter_base_" else _tensors(args[0])
            size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            self.collectives.append((name.strip("_").removesuffix("_base"), size))
            return out
        phase, position = BATCH_NORMS.get(name, ("", 0))
        if phase and args[position]:
            self.batch_norm_channels[phase].append(inputs[0].shape[1])
        flops, kind = _count_flops(function._overloadpacket, args, kwargs, out)
        bytes_moved = _bytes_moved(function, name, args, inputs, outputs)
        without_tensor_cores = bool(outputs) and outputs[0].dtype in (torch.float32, torch.float64)
        self.operations.append((flops, bytes_moved, self._bytes_held, kind, without_tensor_cores))
        return out

    def _track(self, storage: torch.UntypedStorage, num_bytes: int) -> None:
        """Count a storage as `num_bytes` in `_bytes_held` until it is freed, if it is new."""
        key = storage._cdata
        if key not in self._storage_bytes:
            self._storage_bytes[key] = num_bytes
            self._bytes_held += num_bytes
            weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        self._bytes_held -= self._storage_bytes.pop(key, 0)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward_flops(
    gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any
) -> int:
    return int(sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape))


# torch's formulas, plus the ones it lacks: attention on the CPU and in-place addmm.
FLOP_FORMULAS: dict[Any, Any] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    aten.addmm_: flop_registry[aten.addmm],
}


def _count_flops(packet: Any, args: Any, kwargs: Any, out: Any) -> tuple[int, int]:
    """Return the FLOPs and the kind of an operation."""
    if packet not in FLOP_FORMULAS:
        return 0, OTHER
    kind = CONVOLUTION if "conv" in packet.__name__ else MATMUL
    return int(FLOP_FORMULAS[packet](*args, **kwargs, out_val=out)), kind


def _bytes_moved(
    function: Any, name: str, args: Any, inputs: list[Tensor], outputs: list[Tensor]
) -> int:
    """Return the bytes that an operation reads and writes. Allocations and views move none."""
    storages = {tensor.untyped_storage()._cdata for tensor in inputs}
    mutable = function._schema.is_mutable
    is_view = not mutable and all(out.untyped_storage()._cdata in storages for out in outputs)
    if name in ALLOCATIONS or is_view:
        return 0
    targets: list[Tensor] = outputs
    if mutable and not outputs:  # foreach and fused operations write to their inputs
        targets = list(_written_arguments(function, args))
    read_twice = [args[position] for position in READ_TWICE.get(name, ())]
    return sum(_num_bytes(tensor) for tensor in (*inputs, *targets, *read_twice))


def _written_arguments(function: Any, args: Any) -> Iterator[Tensor]:
    for argument, value in zip(function._schema.arguments, args):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from _tensors(value)


def _num_bytes(tensor: Tensor) -> int:
    """Return the bytes that a tensor occupies, counting expanded values once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def count_flops_per_image(config: RunConfig) -> float:
    """Count the floating-point operations of a training step per image, on the meta device."""
    execution = Execution.resolve(config.parallel, torch.device("meta"))
    method = build_method_on_meta(config)
    execution.place_module(method)
    lengths = text_lengths(config)
    return flops_per_image(method, micro_batch.blank_batch(config.views, 2, execution, lengths))


def flops_per_image(method: Method, batch: Batch) -> float:
    """Return the number of floating-point operations per image in a training step.

    The backward pass of the student counts as two of its forward passes. The teacher has a forward
    pass only. As usual, only matrix products and convolutions count, and recomputed forward passes
    do not.

    Args:
        method: The method on the meta device.
        batch: Images on the meta device.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as student:
        method(batch)
    with torch.no_grad(), FlopCounterMode(display=False) as teacher:
        method.targets(batch)
    return (3 * student.get_total_flops() + teacher.get_total_flops()) / len(batch)


def make_fake(
    module: nn.Module,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.channels_last,
) -> None:
    """Move a module from the meta device to fake CPU tensors, in place.

    Call this in the `prepare` argument of `record_trace`. Parameters shared by modules stay shared.
    """
    parameters: dict[int, nn.Parameter] = {}
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                if id(parameter) not in parameters:
                    parameters[id(parameter)] = nn.Parameter(
                        _empty(parameter, dtype, memory_format), parameter.requires_grad
                    )
                child._parameters[name] = parameters[id(parameter)]
        for name, buffer in child._buffers.items():
            if buffer is not None:
                child._buffers[name] = _empty(buffer, dtype, memory_format)


def _empty(like: Tensor, dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
    layout = memory_format if like.ndim == 4 else torch.contiguous_format
    dtype = dtype if like.is_floating_point() else like.dtype
    return torch.empty(like.shape, dtype=dtype, memory_format=layout, device="cpu")
