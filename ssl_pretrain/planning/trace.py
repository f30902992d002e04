"""A computation run on tensors without memory, operation by operation: what each would compute, move and hold.

Everything is the real program: only the storage behind the tensors is missing, so a step of any size takes about a second.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

MATMUL, CONVOLUTION, OTHER = range(3)
# Batch norm in training reads its input once for the statistics and once more to normalize; its backward, and a convolution's,
# read the gradient twice.
_READ_TWICE = {
    "native_batch_norm": (0,),
    "native_batch_norm_backward": (0, 1),
    "convolution_backward": (0,),
}
_MADE_NOT_MOVED = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


@dataclass
class Trace:
    """Per operation, in order: floating point operations, bytes read and written, bytes held after it, and of which kind it is.

    sent: (collective, bytes of all ranks' parts together) of every collective. norms: the channels of every batch norm that
    was run, forward and backward apart. marks: where phases begin. results: what the traced function returned, tensors without memory.
    """

    flops: np.ndarray
    moved: np.ndarray
    held: np.ndarray
    kind: np.ndarray
    wide: np.ndarray  # float32 or wider: no tensor cores
    sent: list[tuple[str, int]]
    norms: dict[str, list[int]]
    marks: dict[str, int] = field(default_factory=dict)
    results: Any = None

    def __post_init__(self) -> None:
        if not self.marks:
            self.marks = {"": 0}

    def phase(self, name: str) -> Trace:
        """The operations from the mark `name` to the next; none where the next was made at once."""
        following = [*self.marks.values(), len(self.flops)][list(self.marks).index(name) + 1]
        span = slice(self.marks[name], following)
        return Trace(
            self.flops[span],
            self.moved[span],
            self.held[span],
            self.kind[span],
            self.wide[span],
            self.sent,
            self.norms,
        )

    @property
    def peak(self) -> int:
        """Most bytes held at once above what was there before."""
        return int(self.held.max(initial=0))


@dataclass
class Line:
    """The same computation for any number of images, of traces at `few` and `more`: all its sizes are straight lines."""

    few: Trace
    more: Trace
    num_few: int
    num_more: int

    def __post_init__(self) -> None:
        assert np.array_equal(self.few.kind, self.more.kind), (
            "the operations do not depend on the number of images"
        )

    def at(self, images: int) -> Trace:
        a, b = self.few, self.more
        share = (images - self.num_few) / (self.num_more - self.num_few)

        def between(few: np.ndarray, more: np.ndarray) -> np.ndarray:
            return few + (more - few) * share

        results = {
            name: {key: _resized(z, b.results[name][key], share) for key, z in group.items()}
            for name, group in (a.results or {}).items()
        }
        columns = (
            between(a.flops, b.flops),
            between(a.moved, b.moved),
            between(a.held, b.held),
            a.kind,
            a.wide,
        )
        return Trace(*columns, a.sent, a.norms, a.marks, results)


@dataclass(frozen=True)
class Shape:
    """A result without even a tensor: what `like` makes one of."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    trained: bool

    def like(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, requires_grad=self.trained)


def shape_of(z: Tensor) -> Shape:
    return Shape(tuple(z.shape), z.dtype, z.requires_grad)


def _resized(few: Shape, more: Shape, share: float) -> Shape:
    return Shape(
        tuple(round(a + (b - a) * share) for a, b in zip(few.shape, more.shape)),
        few.dtype,
        few.trained,
    )


def run(made: Callable[[], Any], function: Callable[[Any, Callable[[str], None]], Any]) -> Trace:
    """Traces `function`, which takes what `made` makes, and a function that marks where a phase begins.

    All tensors are made here, without memory; what `made` makes is there already and is not counted.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        there = made()
        with Recorder() as recorder:
            results = function(there, recorder.mark)
    return recorder.trace(results)


class Recorder(TorchDispatchMode):
    """Records every operation inside a `with`; on real tensors as well as on those without memory."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, int, int, int, bool]] = []
        self.sent: list[tuple[str, int]] = []
        self.norms: dict[str, list[int]] = {"forward": [], "backward": []}
        self.marks: dict[str, int] = {}
        self._alive: dict[int, int] = {}  # bytes of each storage made inside
        self._held = 0

    def mark(self, name: str) -> None:
        self.marks[name] = len(self.rows)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        if function.namespace == "prim":
            return out
        name = function._overloadpacket.__name__
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        for tensor in outputs:
            self._hold(tensor)
        if function.namespace == "c10d":
            self._send(name, args)
            return out
        if (
            name in ("native_batch_norm", "native_batch_norm_backward")
            and args[5 if name == "native_batch_norm" else 7]
        ):
            self.norms["backward" if name.endswith("backward") else "forward"].append(
                inputs[0].shape[1]
            )
        flops, kind = _flops(function._overloadpacket, name, args, kwargs, out)
        moved = _moved(function, name, args, inputs, outputs)
        wide = bool(outputs) and outputs[0].dtype in (torch.float32, torch.float64)
        self.rows.append((flops, moved, self._held, kind, wide))
        return out

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        size = storage.nbytes()
        self._alive[key] = size
        self._held += size
        weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        self._held -= self._alive.pop(key, 0)

    def _send(self, name: str, args: Any) -> None:
        first = [x for x in tree_leaves(args[0]) if isinstance(x, Tensor)]
        whole = sum(x.numel() * x.element_size() for x in first)
        if name == "_reduce_scatter_base_":  # its argument is the result: a rank's part
            whole = args[1].numel() * args[1].element_size()
        self.sent.append((name.strip("_").removesuffix("_base"), whole))

    def trace(self, results: Any = None) -> Trace:
        columns = np.array(self.rows, dtype=np.int64).reshape(-1, 5).T
        flops, moved, held, kind, wide = columns
        return Trace(
            flops, moved, held, kind, wide.astype(bool), self.sent, self.norms, self.marks, results
        )


def _flops(packet: Any, name: str, args: Any, kwargs: Any, out: Any) -> tuple[int, int]:
    """Floating point operations, a multiplication and an addition being two, and the kind; as torch.utils.flop_counter counts,
    and what it leaves out: attention on a CPU and products added to what is there."""
    if "scaled_dot_product" in name and name.endswith("for_cpu"):
        return sdpa_flop_count(args[0].shape, args[1].shape, args[2].shape), MATMUL
    if "scaled_dot_product" in name and name.endswith("for_cpu_backward"):
        return sdpa_backward_flop_count(
            args[0].shape, args[1].shape, args[2].shape, args[3].shape
        ), MATMUL
    if name == "addmm_":
        return 2 * args[1].shape[0] * args[1].shape[1] * args[2].shape[1], MATMUL
    if packet in flop_registry:
        kind = CONVOLUTION if "conv" in name else MATMUL
        return int(flop_registry[packet](*args, **kwargs, out_val=out)), kind
    return 0, OTHER


def _moved(function: Any, name: str, args: Any, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """Bytes that an operation reads and writes, if each of its tensors is read or written once; nothing for a view of one."""
    if name in _MADE_NOT_MOVED:
        return 0
    known = {x.untyped_storage()._cdata for x in inputs}
    if not function._schema.is_mutable and all(
        x.untyped_storage()._cdata in known for x in outputs
    ):
        return 0
    again = sum(_size(args[place]) for place in _READ_TWICE.get(name, ()))
    written = sum(_size(x) for x in outputs)
    if (
        function._schema.is_mutable and not outputs
    ):  # foreach and fused: what they write they have among their inputs
        written = sum(_size(x) for x in _mutated(function, args))
    return sum(_size(x) for x in inputs) + written + again


def _mutated(function: Any, args: Any) -> Iterator[Tensor]:
    for argument, value in zip(function._schema.arguments, args):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from (x for x in tree_leaves(value) if isinstance(x, Tensor))


def _size(tensor: Tensor) -> int:
    """Bytes behind a tensor; a value that is expanded is read once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def without_memory(
    module: nn.Module, dtype: torch.dtype = torch.float32, channels_last: bool = True
) -> nn.Module:
    """The module, built on the meta device, with parameters and buffers that look as if they were on the CPU; inside `run` only."""
    made: dict[int, Any] = {}
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                made.setdefault(
                    id(parameter),
                    nn.Parameter(
                        _empty(parameter, dtype, channels_last),
                        requires_grad=parameter.requires_grad,
                    ),
                )
                child._parameters[name] = made[id(parameter)]
        for name, buffer in child._buffers.items():
            if buffer is not None:
                child._buffers[name] = _empty(buffer, dtype, channels_last)
    return module


def _empty(like: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    layout = torch.channels_last if channels_last and like.ndim == 4 else torch.contiguous_format
    return torch.empty(
        like.shape,
        dtype=dtype if like.is_floating_point() else like.dtype,
        memory_format=layout,
        device="cpu",
    )
