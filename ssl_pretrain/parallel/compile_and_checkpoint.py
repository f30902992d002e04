"""Compile the blocks of a network, or recompute their activations in the backward pass."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from ssl_pretrain.models import backbones
from ssl_pretrain.models.timm_networks import timm
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
    return forward, _freeze_statistics(norms, recomputation)


def _checkpoint_policy(
    context: object, operation: object, *_: object, **__: object
) -> CheckpointPolicy:
    is_expensive = operation in _EXPENSIVE_OPERATIONS
    return CheckpointPolicy.MUST_SAVE if is_expensive else CheckpointPolicy.PREFER_RECOMPUTE


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


def compile_blocks(method: nn.Module, cuda_graphs: bool) -> None:
    """Compile the forward pass of every block. Blocks of the same shape share compiled code.

    Args:
        method: Method to change. If it has dropout or drop path, random numbers come from PyTorch's
            generator, as they do without compilation.
        cuda_graphs: Replay the kernels of each block as one CUDA graph.
    """
    import torch._dynamo.config  # takes seconds, because it loads the compiler
    import torch._inductor.config

    blocks = [block for _, block in backbones.blocks(method)]
    # Beyond this limit, dynamo silently leaves blocks uncompiled.
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, 4 * len(blocks))
    torch._inductor.config.fallback_random |= has_dropout(method)
    for block in blocks:
        for norm in block.modules():
            if batch_norm.spans_ranks(norm):  # its collectives run between two compiled graphs
                norm.forward = torch.compiler.disable(norm.forward)
        mode = "reduce-overhead" if cuda_graphs else None
        block.forward = torch.compile(block.forward, mode=mode, dynamic=False)


def has_dropout(module: nn.Module) -> bool:
    """Return True if any layer is a dropout or drop path with a rate above 0."""
    return any(
        (isinstance(child, _DropoutNd) and child.p > 0)
        or (isinstance(child, timm.layers.DropPath) and (child.drop_prob or 0.0) > 0)
        for child in module.modules()
    )
