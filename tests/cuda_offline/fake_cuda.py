"""Pretend that this machine has a GPU, on which tensors have a shape but no memory.

Tensors on `DEVICE` are fake tensors. Autocast, the choice of cuDNN's batch norm, fused attention
and the limits that the Triton kernels ask for are those of the GPU. Every operation is dispatched
as on a GPU, and nothing is computed.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import batch_norm_kernels
import graph_backward
import torch
from fused_optimizers import FusedOptimizers
from host_waits import HostWaitError
from shared_memory import SHARED_MEMORY
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

DEVICE = torch.device("cuda", 0)
_ORIGINAL_ATTENTION = F.scaled_dot_product_attention


@contextmanager
def pretend_cuda(capability: int = 90) -> Iterator[FakeTensorMode]:
    """Make tensors on `DEVICE` usable, including their backward passes.

    Args:
        capability: Compute capability of the GPU: 80, 89 or 90, which is an H100.
    """
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        # Triton kernels look at the addresses of tensors, which are 0.
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        mode = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        for target, name, value in (
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
            (torch.cuda, "get_device_capability", lambda *_: divmod(capability, 10)),
            (torch.cuda, "get_device_name", lambda *_: f"fake GPU of capability {capability}"),
            (torch.cuda, "current_device", lambda: DEVICE.index),
            (torch.Tensor, "pin_memory", _mark_as_pinned),
            (torch.cuda, "synchronize", _refuse_to_wait),
            (torch.cuda.Stream, "synchronize", _refuse_to_wait),
            (torch.cuda.Event, "synchronize", _refuse_to_wait),
            (nn.Module, "_apply", _Converter()),
            (F, "scaled_dot_product_attention", _fused_attention),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        stack.enter_context(_fake_triton_driver(capability))
        stack.enter_context(batch_norm_kernels.registered("Meta"))
        stack.enter_context(FusedOptimizers())
        stack.enter_context(graph_backward.replace_engine())
        yield mode


def _mark_as_pinned(tensor: Tensor, *_: object) -> Tensor:
    tensor.is_in_pinned_memory = True  # type: ignore[attr-defined]
    return tensor


def _refuse_to_wait(*_: object) -> None:
    raise HostWaitError("synchronize makes the host wait for the device")


class _Converter:
    """Replacement of `nn.Module._apply`, which cannot change the device of fake tensors in place.

    It puts new tensors into the modules. Tensors that modules share stay shared.
    """

    def __init__(self) -> None:
        self._converted: dict[int, tuple[Tensor, Tensor]] = {}  # by the old tensor's id

    def __get__(self, module: nn.Module, owner: type) -> Any:
        return lambda function, recurse=True: self._convert(module, function)

    def _convert(self, module: nn.Module, function: Callable[[Tensor], Tensor]) -> nn.Module:
        for child in module.modules():
            for name, parameter in child._parameters.items():
                if parameter is not None:
                    child._parameters[name] = self._convert_tensor(parameter, function)
            for name, buffer in child._buffers.items():
                if buffer is not None:
                    child._buffers[name] = self._convert_tensor(buffer, function)
        return module

    def _convert_tensor(self, tensor: Any, function: Callable[[Tensor], Tensor]) -> Any:
        with torch.no_grad():
            result = function(tensor)
        if result is tensor:
            return tensor
        if id(tensor) not in self._converted:
            if isinstance(tensor, nn.Parameter):
                result = nn.Parameter(result, tensor.requires_grad)
            self._converted[id(tensor)] = tensor, result
        return self._converted[id(tensor)][1]


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Return the output of the kernel that PyTorch chooses on a GPU for bfloat16.

    It is flash attention, or memory-efficient attention if there is a mask. Without a driver,
    PyTorch would choose plain matrix products.
    """
    if query.device.type != DEVICE.type:
        return _ORIGINAL_ATTENTION(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
    if torch.is_autocast_enabled(query.device.type):
        query, key, value = (x.to(torch.bfloat16) for x in (query, key, value))
    if attn_mask is not None:
        bias = _attention_bias(attn_mask, query, key)
        needs_gradient = any(x.requires_grad for x in (query, key, value))
        masked_output: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, needs_gradient, dropout_p, is_causal, scale=scale
        )[0]
        return masked_output
    output: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, dropout_p, is_causal, scale=scale
    )[0]
    return output


def _attention_bias(attn_mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Return a mask as the kernel takes it: added, and with rows of aligned length."""
    if attn_mask.dtype == torch.bool:
        bias = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -math.inf)
    else:
        bias = attn_mask.to(query.dtype)
    length = bias.shape[-1]
    bias = F.pad(bias, (0, -length % 16))[..., :length]
    return bias.expand(*query.shape[:2], query.shape[2], key.shape[2])


@contextmanager
def _fake_triton_driver(capability: int) -> Iterator[None]:
    """Give Triton the limits of the device. Launches do nothing."""
    try:
        from triton.backends.compiler import GPUTarget
        from triton.runtime import JITFunction, driver
    except ImportError:
        yield
        return
    properties = {"max_shared_mem": SHARED_MEMORY[capability], "multiprocessor_count": 132}
    fake: Any = SimpleNamespace(
        utils=SimpleNamespace(get_device_properties=lambda _: properties),
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_device=lambda: capability,  # the key of Triton's compiled kernels
        get_current_stream=lambda _: 0,
    )
    with (
        mock.patch.object(driver, "_active", fake),
        mock.patch.object(JITFunction, "run", lambda *_, **__: None),
    ):
        yield
