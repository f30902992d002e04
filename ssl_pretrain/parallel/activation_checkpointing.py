"""Recompute the activations of blocks in the backward pass instead of storing them."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from ssl_pretrain.models import backbones
from ssl_pretrain.parallel import batch_norm

# Matrix products, whose outputs the mode `selective` stores. Norms, activation functions and
# additions are cheap to recompute.
_EXPENSIVE_OPERATIONS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.convolution.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}


def recompute_activations(method: nn.Module, mode: Literal["none", "blocks", "selective"]) -> None:
    """Make every trained block recompute its activations in the backward pass.

    Recomputation draws the same random numbers and does not change batch norm's statistics. Modules
    keep their names, so checkpoints can be loaded with and without recomputation.

    Args:
        method: Method to change. Blocks without trained parameters, such as a teacher's, have no
            backward pass and are skipped.
        mode: `blocks` only stores the input of each block. `selective` also stores the outputs of
            matrix products.
    """
    if mode == "none":
        return
    for _, block in backbones.blocks(method):
        if any(parameter.requires_grad for parameter in block.parameters()):
            norms = [module for module in block.modules() if batch_norm.is_batch_norm(module)]
            block.forward = partial(
                checkpoint,
                block.forward,
                use_reentrant=False,
                context_fn=partial(_checkpoint_contexts, norms, mode == "selective"),
            )


Context = AbstractContextManager[object]


def _checkpoint_contexts(norms: list[Any], is_selective: bool) -> tuple[Context, Context]:
    """Return the contexts of a block's forward pass and of its recomputation."""
    if not is_selective:
        return nullcontext(), _freeze_statistics(norms, nullcontext())
    forward, recomputation = create_selective_checkpoint_contexts(_checkpoint_policy)
    recomputation = _freeze_statistics(norms, _without_cached_casts(recomputation))
    return _without_cached_casts(forward), recomputation


def _checkpoint_policy(
    context: object, operation: object, *_: object, **__: object
) -> CheckpointPolicy:
    is_expensive = operation in _EXPENSIVE_OPERATIONS
    return CheckpointPolicy.MUST_SAVE if is_expensive else CheckpointPolicy.PREFER_RECOMPUTE


@contextmanager
def _without_cached_casts(context: Context) -> Iterator[None]:
    """Cast weights under autocast each time that a block uses them.

    Autocast keeps the casts of weights for the next view, but not for the recomputation, which
    would then have other operations than the forward pass. Selective recomputation refuses that.
    """
    is_enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with context:
            yield
    finally:
        torch.set_autocast_cache_enabled(is_enabled)


@contextmanager
def _freeze_statistics(norms: list[Any], recomputation: Context) -> Iterator[None]:
    """Keep batch norm's statistics fixed during recomputation."""
    states = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        with recomputation:
            yield
    finally:
        for norm, (momentum, count) in zip(norms, states):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)
