"""What is done to a network block by block: activations computed again in the backward pass, and compilation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from ssl_pretrain.models.timm_import import timm
from ssl_pretrain.parallel import batch_norm

# What `selective` keeps: the outputs that cost matrix products; norms, activations and additions are computed again.
_KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.convolution.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}

Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


def recompute(block: nn.Module, selective: bool) -> None:
    """From now on `block` keeps its input alone, or also the outputs of its matrix products, and is run again in the backward
    pass: with the same draws, and without a second move of batch norm's statistics."""
    norms = [module for module in block.modules() if batch_norm.is_batch_norm(module)]

    def contexts() -> Contexts:
        first, again = (
            create_selective_checkpoint_contexts(_keep)
            if selective
            else (nullcontext(), nullcontext())
        )
        return first, _both(again, norms)

    block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)


def keep_again(block: nn.Module) -> None:
    """Undoes `recompute`, and what else was put over the block's own forward."""
    del block.forward


def _keep(context: Any, operation: Any, *_arguments: Any, **_keywords: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


@contextmanager
def _both(again: AbstractContextManager[Any], norms: list[Any]) -> Iterator[None]:
    """Recomputes with batch norm's statistics standing still: momentum 0 leaves them, and the count of batches is put back."""
    before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        with again:
            yield
    finally:
        for norm, (momentum, count) in zip(norms, before):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)


def compile_each(blocks: list[nn.Module], drops: bool, cuda_graphs: bool) -> None:
    """Compiles every block's forward; blocks of one shape share their code.

    Args:
        drops: some layer draws random numbers, which then come from torch's generator, as they do without compilation.
        cuda_graphs: replay each block's kernels as one CUDA graph.
    """
    import torch._dynamo.config  # loads the compiler: seconds, which only this needs
    import torch._inductor.config

    torch._dynamo.config.recompile_limit = max(
        torch._dynamo.config.recompile_limit, 4 * len(blocks)
    )  # beyond it blocks stay eager, unsaid
    torch._inductor.config.fallback_random |= drops
    mode = "reduce-overhead" if cuda_graphs else None
    compiled: Callable[..., Any] = partial(torch.compile, mode=mode, dynamic=False)
    for block in blocks:
        for norm in block.modules():
            if batch_norm.spans_ranks(
                norm
            ):  # its collectives run as written, between two compiled pieces
                norm.forward = torch.compiler.disable(norm.forward)
        block.forward = compiled(block.forward)


def drops(module: nn.Module) -> bool:
    """Whether a layer of `module` drops anything: dropout or drop-path with a rate above 0."""
    dropouts = [child.p for child in module.modules() if isinstance(child, _DropoutNd)]
    paths = [
        child.drop_prob or 0.0
        for child in module.modules()
        if isinstance(child, timm.layers.DropPath)
    ]
    return max([0.0, *dropouts, *paths]) > 0
