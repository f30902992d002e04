"""Refuse operations that make the host wait for a GPU, or that mix tensors of CPU and GPU."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operations whose result, or its shape, the host has to read from the device.
WAITING = {
    "_local_scalar_dense",
    "_linalg_check_errors",
    "_unique",
    "_unique2",
    "allclose",
    "bincount",
    "equal",
    "histc",
    "is_nonzero",
    "item",
    "linalg_eigh",
    "masked_select",
    "nonzero",
    "nonzero_numpy",
    "repeat_interleave",
    "unique_consecutive",
    "unique_dim",
    "unique_dim_consecutive",
}
INDEXING = {"index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_"}
COPIES = {"_to_copy", "copy_", "_copy_from"}


class HostWaitError(AssertionError):
    """An operation makes the host wait for the device."""


class MixedDeviceError(AssertionError):
    """An operation takes tensors of the CPU and of the GPU."""


class RefuseHostWaits(TorchDispatchMode):
    """Raise an error at the first operation that waits for the GPU or mixes devices."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        check_operation(function, args, kwargs)
        return function(*args, **kwargs)


def check_operation(function: Any, args: Any, kwargs: Any) -> None:
    """Check one dispatched operation.

    Raises:
        HostWaitError: If the host would wait.
        MixedDeviceError: If a tensor on the CPU meets one on the GPU.
    """
    name = function._overloadpacket.__name__
    inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    is_on_gpu = [tensor.is_cuda for tensor in inputs]
    if name in COPIES:
        _check_copy(function, args, kwargs, inputs)
        return
    if not any(is_on_gpu):
        return
    shapes = ", ".join(f"{tuple(x.shape)} on {x.device.type}" for x in inputs[:4])
    if name in WAITING and not _has_known_size(name, kwargs):
        raise HostWaitError(f"{function} waits for the device ({shapes})")
    if name in INDEXING and any(
        isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
    ):
        raise HostWaitError(f"{function} with a boolean mask waits for the device ({shapes})")
    if function.namespace != "c10d" and not all(is_on_gpu):
        raise MixedDeviceError(f"{function} mixes devices ({shapes})")


def _has_known_size(name: str, kwargs: Any) -> bool:
    return name == "repeat_interleave" and kwargs.get("output_size") is not None


def _check_copy(function: Any, args: Any, kwargs: Any, inputs: list[Tensor]) -> None:
    """Check a copy. From the CPU to the GPU, only pinned memory is copied without waiting."""
    if function._overloadpacket.__name__ == "_to_copy":
        source = inputs[0]
        target = torch.device(kwargs.get("device") or source.device)
        does_not_block = kwargs.get("non_blocking", False)
    else:
        target, source = inputs[0].device, inputs[1]
        does_not_block = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
    devices = source.device.type, target.type
    if devices == ("cuda", "cpu"):
        raise HostWaitError(f"{function} to the CPU waits for the device, {tuple(source.shape)}")
    is_pinned = getattr(source, "is_in_pinned_memory", False)
    if devices == ("cpu", "cuda") and not (does_not_block and is_pinned):
        raise HostWaitError(
            f"{function} to the GPU waits, because {tuple(source.shape)} is not in pinned memory "
            "or the copy is blocking"
        )
