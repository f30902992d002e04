"""Map vision transformers of timm to ViT, DINOv2 and I-JEPA in the library transformers.

The weights get the names that published checkpoints have, which every version of transformers
reads.

- ViT has a class token, and no registers or layer scale.
- DINOv2 has layer scale, and registers in its second form. Without layer scale its factors are 1.
- I-JEPA has neither class token nor registers nor layer scale.

ViT and I-JEPA normalize the tokens before pooling. A network of timm that normalizes after the
mean over patches has the same weights, and its features come from the last layer's output.
"""

from typing import Any

import torch
from timm.layers import Attention, GluMlp, LayerNorm, Mlp, PatchEmbed, resample_abs_pos_embed
from timm.models import vision_transformer
from torch import Tensor, nn

from ssl_pretrain.eval.exporting.transformers_mapping import (
    MappedNetwork,
    activation_name,
    is_exactly,
)
from ssl_pretrain.schema.image_sizes import ImageSize, height_and_width

CLASS_TOKEN = "outputs.last_hidden_state[:, 0]"


def find_vit_problem(model: Any, image_size: ImageSize) -> str:
    """Return what transformers does not have of this network, or an empty string."""
    if not is_exactly(model, vision_transformer.VisionTransformer):
        return f"has no {type(model).__name__} with these weights"
    block_problem = next(filter(None, map(_find_block_problem, model.blocks)), "")
    if block_problem:
        return block_problem
    height, width = height_and_width(image_size)
    has_class, has_registers = model.cls_token is not None, model.reg_token is not None
    is_dino = _is_dino(model)
    problems = {
        "applies a norm before the blocks": not _is_identity(model.norm_pre),
        "has a patch embedding of another kind": not is_exactly(model.patch_embed, PatchEmbed)
        or not _is_identity(model.patch_embed.norm),
        "has no learned positions": model.pos_embed is None,
        f"pools by {model.global_pool!r}, not by its class token or the mean over patches": (
            model.global_pool not in ("token", "avg") or model.pool_include_prefix
        ),
        "normalizes both before and after pooling, or never": (
            _is_identity(model.norm) == _is_identity(model.fc_norm)
        ),
        "has registers or layer scale but no class token": is_dino and not has_class,
        "has positions for its registers": has_registers and not model.no_embed_class,
        f"takes views of {height} x {width}, and DINOv2 only square ones": (
            is_dino and height != width
        ),
        "has an MLP of a width that DINOv2 does not have": is_dino and not _dino_mlp_ratio(model),
        "has a gated MLP, but no layer scale": not is_dino and _is_gated(model),
    }
    return next((problem for problem, applies in problems.items() if applies), "")


def map_vit(model: Any, image_size: ImageSize) -> MappedNetwork:
    """Return the network of transformers that computes the features of a vision transformer.

    Args:
        model: Network of timm for which `find_vit_problem` returns an empty string.
        image_size: Size of the views. The positions are resampled to it.
    """
    height, width = height_and_width(image_size)
    patch = list(model.patch_embed.patch_size)
    norm = model.fc_norm if _is_identity(model.norm) else model.norm
    config: dict[str, Any] = {
        "hidden_size": model.embed_dim,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": model.blocks[0].attn.num_heads,
        "hidden_act": activation_name(model.blocks[0].mlp.act),
        "layer_norm_eps": norm.eps,
        "image_size": height if height == width else [height, width],
        "patch_size": patch[0] if patch[0] == patch[1] else patch,
        "num_channels": model.patch_embed.proj.in_channels,
        "qkv_bias": model.blocks[0].attn.qkv.bias is not None,
    }
    weights = {f"layernorm.{key}": value for key, value in norm.state_dict().items()}
    weights |= _embedding_weights(model, (height, width))
    for index, block in enumerate(model.blocks):
        layer = _dino_layer(block) if _is_dino(model) else _vit_layer(block)
        weights |= {f"encoder.layer.{index}.{key}": value for key, value in layer.items()}
    if _is_dino(model):
        model_type, class_name = _add_dino_settings(model, config)
    else:
        config["intermediate_size"] = _mlp_width(model.blocks[0])
        has_class = model.cls_token is not None
        model_type, class_name = ("vit", "ViTModel") if has_class else ("ijepa", "IJepaModel")
    if model_type == "vit":  # a pooler that returns the class token unchanged
        config["pooler_act"] = "linear"
        weights["pooler.dense.weight"] = torch.eye(model.embed_dim)
        weights["pooler.dense.bias"] = torch.zeros(model.embed_dim)
    return MappedNetwork(model_type, class_name, config, weights, _feature_code(model))


def _feature_code(model: Any) -> str:
    """Return the Python expression of the features, from `model` and its `outputs`."""
    num_prefix = model.num_prefix_tokens
    if model.global_pool == "token":
        if not _is_identity(model.norm):
            return CLASS_TOKEN
        return "model.layernorm(outputs.hidden_states[-1][:, 0])"
    patches = f"[:, {num_prefix}:]" if num_prefix else ""
    if not _is_identity(model.norm):
        return f"outputs.last_hidden_state{patches}.mean(1)"
    return f"model.layernorm(outputs.hidden_states[-1]{patches}.mean(1))"


def _add_dino_settings(model: Any, config: dict[str, Any]) -> tuple[str, str]:
    """Add DINOv2's settings to a configuration. Return its type and its class."""
    config["use_swiglu_ffn"] = _is_gated(model)
    config["mlp_ratio"] = _dino_mlp_ratio(model)
    if model.reg_token is None:
        return "dinov2", "Dinov2Model"
    config["num_register_tokens"] = model.reg_token.shape[1]
    return "dinov2_with_registers", "Dinov2WithRegistersModel"


def _dino_mlp_ratio(model: Any) -> int:
    """Return the whole number from which DINOv2 computes the width of its MLP, or 0."""
    width, dim = _mlp_width(model.blocks[0]), model.embed_dim
    if not _is_gated(model):
        return 0 if width % dim else width // dim
    ratios = (n for n in range(1, 17) if 2 * ((int(dim * n * 2 / 3) + 7) // 8 * 8) == width)
    return next(ratios, 0)


def _embedding_weights(model: Any, view: tuple[int, int]) -> dict[str, Tensor]:
    """Return the weights before the first layer."""
    projection = model.patch_embed.proj
    grid = [length // patch for length, patch in zip(view, model.patch_embed.patch_size)]
    num_own_prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    positions = resample_abs_pos_embed(
        model.pos_embed.detach(),
        new_size=grid,
        old_size=list(model.patch_embed.grid_size),
        num_prefix_tokens=num_own_prefix,
    )
    bias = projection.bias
    weights = {
        "patch_embeddings.projection.weight": projection.weight,
        "patch_embeddings.projection.bias": (
            torch.zeros(model.embed_dim) if bias is None else bias
        ),
    }
    if model.cls_token is not None:
        weights["cls_token"] = model.cls_token
        if not num_own_prefix:  # transformers adds a position to the class token, here 0
            positions = torch.cat([torch.zeros(1, 1, model.embed_dim), positions], dim=1)
    if model.reg_token is not None:
        weights["register_tokens"] = model.reg_token
    if _is_dino(model):
        weights["mask_token"] = torch.zeros(1, model.embed_dim)  # not used
    weights["position_embeddings"] = positions
    return {f"embeddings.{key}": value for key, value in weights.items()}


def _vit_layer(block: Any) -> dict[str, Tensor]:
    return _rename(
        block,
        {
            "norm1": "layernorm_before",
            "norm2": "layernorm_after",
            "mlp.fc1": "intermediate.dense",
            "mlp.fc2": "output.dense",
        },
    )


def _dino_layer(block: Any) -> dict[str, Tensor]:
    is_gated = isinstance(block.mlp, GluMlp)
    names = {
        "norm1": "norm1",
        "norm2": "norm2",
        "mlp.fc1": "mlp.weights_in" if is_gated else "mlp.fc1",
        "mlp.fc2": "mlp.weights_out" if is_gated else "mlp.fc2",
    }
    ones = torch.ones(block.norm1.weight.shape[0])
    scales = {
        f"layer_scale{number}.lambda1": getattr(getattr(block, f"ls{number}"), "gamma", ones)
        for number in (1, 2)
    }
    return _rename(block, names) | scales


def _rename(block: Any, names: dict[str, str]) -> dict[str, Tensor]:
    """Return the weights of a block under other names, with queries, keys and values apart."""
    weights = {}
    for old_name, new_name in names.items():
        for key, value in block.get_submodule(old_name).state_dict().items():
            weights[f"{new_name}.{key}"] = value
    for key, value in block.attn.qkv.state_dict().items():
        for name, third in zip(("query", "key", "value"), value.chunk(3)):
            weights[f"attention.attention.{name}.{key}"] = third
    for key, value in block.attn.proj.state_dict().items():
        weights[f"attention.output.dense.{key}"] = value
    return weights


def _find_block_problem(block: Any) -> str:
    """Return what transformers does not have of a block, or an empty string."""
    if not (is_exactly(block, vision_transformer.Block) and is_exactly(block.attn, Attention)):
        return "has blocks of another kind"
    attention, mlp = block.attn, block.mlp
    if not all(map(_is_identity, (attention.q_norm, attention.k_norm, attention.norm))):
        return "normalizes inside its attention"
    if getattr(attention, "gate", None) is not None:
        return "has a gated attention"
    if attention.proj.bias is None or mlp.fc1.bias is None or mlp.fc2.bias is None:
        return "has linear layers without a bias"
    if not (is_exactly(block.norm1, LayerNorm) and is_exactly(block.norm2, LayerNorm)):
        return f"normalizes by {type(block.norm1).__name__}"
    is_gated = is_exactly(mlp, GluMlp) and not mlp.gate_last and isinstance(mlp.act, nn.SiLU)
    if not (is_gated or is_exactly(mlp, Mlp)) or not _is_identity(mlp.norm):
        return "has an MLP of another kind"
    if not is_gated and not activation_name(mlp.act):
        return f"has the activation {type(mlp.act).__name__}"
    return ""


def _is_dino(model: Any) -> bool:
    return model.reg_token is not None or not _is_identity(model.blocks[0].ls1)


def _is_gated(model: Any) -> bool:
    return isinstance(model.blocks[0].mlp, GluMlp)


def _is_identity(module: nn.Module) -> bool:
    return isinstance(module, nn.Identity)


def _mlp_width(block: Any) -> int:
    return int(block.mlp.fc1.out_features)
