"""Compile the parts of a method: blocks, the stem before them, and the heads after them.

Each part is compiled by itself. Blocks of the same shape share one graph, which keeps compilation
short, and FSDP can gather the weights of each block. Modules keep their names.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch._dynamo.config
import torch._inductor.config
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from ssl_pretrain.methods.base import Method
from ssl_pretrain.models import backbones
from ssl_pretrain.models.components import Backbone
from ssl_pretrain.models.timm_networks import timm
from ssl_pretrain.parallel import batch_norm, compile_report, drop_path


def compile_network(method: Method, device: torch.device, cuda_graphs: bool) -> None:
    """Compile the forward passes of a method's blocks, stems and heads.

    Pooling and the last norm are single kernels and stay as they are.

    Args:
        method: Method to change, on its device. If it has dropout or drop path, random numbers come
            from PyTorch's generator, as they do without compilation.
        device: Device of the method.
        cuda_graphs: Replay the kernels of each block as one CUDA graph. Stems and heads are
            excluded, because the next step would overwrite their outputs, the embeddings.
    """
    compile_report.observe()
    torch._inductor.config.fallback_random |= has_dropout(method)
    for module in method.modules():
        if batch_norm.spans_ranks(module):  # collectives run between two compiled graphs
            module.forward = torch.compiler.disable(module.forward)
    compile_part = partial(torch.compile, dynamic=False)
    compile_block = partial(compile_part, mode="reduce-overhead" if cuda_graphs else None)
    blocks = [block for _, block in backbones.blocks(method)]
    # Beyond this limit, dynamo silently leaves parts uncompiled. ResNet blocks have many shapes.
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, 4 * len(blocks))
    for backbone in backbones.networks(method):
        drop_path.share_code([block for _, block in backbones.blocks(backbone)], device)
        _compile_stem(backbone.model, compile_part)
        if isinstance(backbone.model, timm.models.VisionTransformer):  # called by `tokens` alone
            embed_patches = compile_part(backbone.embed_patches)
            backbone.embed_patches = embed_patches  # type: ignore[method-assign]
    for block in blocks:
        block.forward = compile_block(block.forward)
    for head in _heads(method):
        head.forward = compile_part(head.forward)


def has_dropout(module: nn.Module) -> bool:
    """Return True if any layer is a dropout or drop path with a rate above 0."""
    return any(
        (isinstance(child, _DropoutNd) and child.p > 0)
        or (isinstance(child, timm.layers.DropPath) and (child.drop_prob or 0.0) > 0)
        for child in module.modules()
    )


def _compile_stem(model: Any, compile_part: Callable[..., Any]) -> None:
    """Compile the layers before the first block, for ResNets, ViTs and networks with a `stem`."""
    if isinstance(model, timm.models.ResNet):
        layers = [model.conv1, model.bn1, model.act1, model.maxpool]
        _compile_chain([(layer, "forward") for layer in layers], compile_part)
    elif isinstance(model, timm.models.VisionTransformer):
        _compile_chain([(model.patch_embed, "forward"), (model, "_pos_embed")], compile_part)
    elif isinstance(getattr(model, "stem", None), nn.Module) and not _spans_ranks(model.stem):
        model.stem.forward = compile_part(model.stem.forward)


def _compile_chain(calls: list[tuple[Any, str]], compile_part: Callable[..., Any]) -> None:
    """Compile consecutive calls of a network's forward pass as one function.

    The first call then does the work of all, and the others return their input. A batch norm over
    ranks divides the chain.

    Args:
        calls: Owners and names of the functions. The output of each is the input of the next.
        compile_part: Function that compiles a function.
    """
    for i, (owner, _) in enumerate(calls):
        if isinstance(owner, nn.Module) and _spans_ranks(owner):
            _compile_chain(calls[:i], compile_part)
            _compile_chain(calls[i + 1 :], compile_part)
            return
    if len(calls) < 2:
        return
    functions = [getattr(owner, name) for owner, name in calls]

    def run_chain(x: Tensor) -> Tensor:
        for function in functions:
            x = function(x)
        return x

    first_owner, first_name = calls[0]
    setattr(first_owner, first_name, compile_part(run_chain))
    for owner, name in calls[1:]:
        setattr(owner, name, _identity)


def _identity(x: Tensor) -> Tensor:
    return x


def _heads(method: nn.Module) -> list[nn.Module]:
    """Return the modules outside of backbones whose layers can share a kernel.

    They are stacks of layers, and linear layers that compute their weights. A stack with batch norm
    over ranks is left out. Its collectives would divide it into parts of one layer.
    """
    heads: list[nn.Module] = []
    for child in method.children():
        is_stack = isinstance(child, nn.Sequential) and len(child) > 1
        computes_weights = isinstance(child, nn.Linear) and type(child) is not nn.Linear
        if isinstance(child, Backbone):
            continue
        if is_stack or computes_weights:
            heads += [] if _spans_ranks(child) else [child]
        else:
            heads += _heads(child)
    return heads


def _spans_ranks(module: nn.Module) -> bool:
    return any(batch_norm.spans_ranks(child) for child in module.modules())
