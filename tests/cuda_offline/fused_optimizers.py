"""Check the arguments of the fused optimizers as their CUDA kernels do.

Fake tensors do not support these operations. On a GPU they refuse lists whose tensors differ in
device, dtype or strides (`check_fast_path_restrictions` in ATen/native/ForeachUtils.h), because
the kernels walk through the memory of all lists with the same index.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

LISTS = {  # lists that must match the parameters
    "_fused_sgd_": ("gradients", "momentum buffers"),
    "_fused_adam_": ("gradients", "exp_avgs", "exp_avg_sqs"),
    "_fused_adamw_": ("gradients", "exp_avgs", "exp_avg_sqs"),
}


class FusedOptimizers(TorchDispatchMode):
    """Replace the fused optimizers by a check of their arguments."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function._overloadpacket.__name__
        if name not in LISTS:
            return function(*args, **(kwargs or {}))
        for kind, tensors in zip(LISTS[name], args[1:]):
            check_match(kind, args[0], tensors)
        return None


def check_match(kind: str, parameters: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    """Check that each tensor has the device, dtype, shape and strides of its parameter.

    Dimensions of size 1 may have any stride.
    """
    assert len(tensors) in (0, len(parameters)), f"{kind}: {len(tensors)} of {len(parameters)}"
    for parameter, tensor in zip(parameters, tensors):
        for attribute in ("device", "dtype", "shape"):
            expected, actual = getattr(parameter, attribute), getattr(tensor, attribute)
            assert actual == expected, f"{kind}: {attribute} {actual}, the parameter has {expected}"
        assert strides(tensor) == strides(parameter), (
            f"{kind}: strides {tensor.stride()}, the parameter has {parameter.stride()} "
            f"at shape {tuple(parameter.shape)}"
        )


def strides(tensor: Tensor) -> list[int]:
    """Return the strides of the dimensions with more than one element."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape) if size > 1]
