"""Count floating-point operations. A multiplication and an addition are two operations."""

from typing import Any

import torch
from torch.utils.flop_counter import (
    FlopCounterMode,
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from ssl_pretrain.methods.base import Method
from ssl_pretrain.views.batch import Batch

aten = torch.ops.aten


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape))


# torch's formulas, and those it lacks: attention on a CPU and products added in place.
FORMULAS: dict[Any, Any] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten.addmm_: flop_registry[aten.addmm],
}


def per_image(method: Method, batch: Batch) -> float:
    """Return the operations of a training step per image.

    The backward pass of the student counts as two of its forward passes, the teacher has a forward
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
