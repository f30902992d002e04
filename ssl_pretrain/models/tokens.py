"""Token outputs of a backbone: one vector per patch, with masked or dropped patches.

timm's own modules compute patches, positions, rotary angles, blocks and norms. The forward pass
equals timm's `forward_features`, from which pooled features are computed. In addition, patches can
be replaced by a mask token before positions are added, or dropped afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from ssl_pretrain.models import feature_maps
from ssl_pretrain.models.timm_networks import architecture, timm
from ssl_pretrain.schema.image_sizes import ImageSize, height_and_width

_MEASURED_SIZE = 256  # pixels, a multiple of the strides of common networks


@dataclass
class Tokens:
    """Output of a backbone for every patch of its images.

    Attributes:
        prefix: Class token and then registers, (B, P, D). P may be 0.
        patches: The patches row by row, or in the order of `kept`, (B, L, D).
        intermediate: Tokens of the requested layers, in the order of the request.
    """

    prefix: Tensor
    patches: Tensor
    intermediate: list[Tokens] = field(default_factory=list)


# FSDP finds the tensors whose backward pass needs the weights again in trees. torch 2.11 does not
# look into dataclasses that are not registered.
pytree.register_dataclass(Tokens)


def is_transformer(model: nn.Module) -> bool:
    """Return True if patches of this network can be masked and dropped."""
    return isinstance(model, timm.models.VisionTransformer | timm.models.eva.Eva)


def find_problem(model: nn.Module, image_size: ImageSize) -> str:
    """Return why `compute` returns no tokens of this network, or an empty string if it does.

    Networks such as BEiT, MLP-Mixer and Hiera output a sequence before pooling, but its class
    tokens and its order are the network's own.
    """
    if is_transformer(model):
        return ""
    has_class_token = getattr(model, "cls_token", None) is not None
    features = None if has_class_token else feature_maps.probe(model, image_size)
    if has_class_token or (isinstance(features, Tensor) and features.ndim == 3):
        return (
            f"{architecture(model)} has tokens, but they can only be computed for timm's "
            "VisionTransformer and Eva classes (vit_*, deit*, eva02*)"
        )
    problem = feature_maps.describe_problem(features)
    return f"{architecture(model)} {problem}" if problem else ""


def check_maskable(model: nn.Module) -> None:
    """Raise ValueError unless patches of the network can be masked and dropped."""
    if not is_transformer(model):
        raise ValueError(
            f"backbone.name: {architecture(model)} has no patches that can be masked or left out; "
            "choose a vision transformer, such as vit_small_patch16_224 (also deit*, eva02* and "
            "vit_*_dinov3)"
        )


def grid(model: Any, image_size: ImageSize) -> tuple[int, int]:
    """Return the number of rows and columns of patches in images of `image_size` pixels."""
    if is_transformer(model):
        rows, columns = model.patch_embed.dynamic_feat_size(height_and_width(image_size))
        return int(rows), int(columns)
    return feature_maps.measure(model, image_size)[1:]


def num_prefix_tokens(model: Any) -> int:
    """Return the number of class tokens and registers."""
    return int(model.num_prefix_tokens) if is_transformer(model) else 0


def token_dim(model: Any) -> int:
    """Return the width of the tokens."""
    if hasattr(model, "num_features"):  # timm's width before pooling and heads
        return int(model.num_features)
    return feature_maps.measure(model, _MEASURED_SIZE)[0]


def patch_size(model: Any) -> int:
    """Return the side of a patch in pixels.

    Raises:
        ValueError: If patches are not square.
    """
    if not is_transformer(model):
        return _MEASURED_SIZE // feature_maps.measure(model, _MEASURED_SIZE)[1]
    height, width = model.patch_embed.feat_ratio(as_scalar=False)
    if height != width:
        raise ValueError(
            f"backbone.args.patch_size: patches of {height} x {width} pixels are not square, as "
            "methods with patches need; set one number"
        )
    return int(height)


def disable_position_augmentation(module: Any) -> None:
    """Turn off the random shift, stretch and scale of rotary positions, if the module has them."""
    if hasattr(module, "rescale_coords"):
        module.shift_coords = module.jitter_coords = module.rescale_coords = None
        module.aug_active = False


def compute(
    model: Any,
    embed: Callable[..., tuple[Tensor, Tensor | None]],
    images: Tensor,
    *,
    masked: Tensor | None,
    mask_token: Tensor | None,
    kept: Tensor | None,
    valid: Tensor | None,
    layers: Sequence[int],
    normalize: bool,
) -> Tokens:
    """Compute the tokens of a timm network. `Backbone.tokens` describes arguments and errors.

    `embed` is `embed_patches` for this network, or a compiled form of it.
    """
    assert (masked is None) == (mask_token is None), "`masked` and `mask_token` go together"
    assert valid is None or kept is not None, "`valid` marks padding among `kept`"
    if masked is not None or kept is not None:
        check_maskable(model)
    if not is_transformer(model):
        last, maps = feature_maps.compute(model, images, layers)
        return Tokens(*_split(last, 0), [Tokens(*_split(tokens, 0)) for tokens in maps])
    _check_patch_dropout(model)
    wanted = [_layer_number(model, layer) for layer in layers]
    x, rope = embed(images, masked, mask_token)
    arguments = {}
    if kept is not None:
        x, rope = _keep(model, x, rope, kept)
        if valid is not None:
            arguments["attn_mask"] = _attention_mask(valid, model.num_prefix_tokens)
    x = model.norm_pre(x)
    norm = _final_norm(model) if normalize else nn.Identity()
    outputs = {}
    for number, block in enumerate(model.blocks):
        if rope is not None:
            arguments["rope"] = rope[number] if model.rope_mixed else rope
        x = block(x, **arguments)
        if number in wanted:
            outputs[number] = Tokens(*_split(norm(x), model.num_prefix_tokens))
    prefix, patches = _split(norm(x), model.num_prefix_tokens)
    return Tokens(prefix, patches, [outputs[number] for number in wanted])


def embed_patches(
    model: Any, images: Tensor, masked: Tensor | None, mask_token: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the input of a vision transformer's blocks, and its rotary angles if it has any.

    Compilation for pooled features replaces `forward` and `_pos_embed` on the instances. The
    functions are therefore taken from the classes, which keep the original ones.
    """
    x = type(model.patch_embed).forward(model.patch_embed, images)
    if masked is not None and mask_token is not None:
        # Patches are (B, N, D), or (B, rows, columns, D) with `dynamic_img_size`.
        num_patches = x[0, ..., 0].numel()
        if masked.shape != (len(x), num_patches):
            raise ValueError(
                f"masks of {masked.shape[1]} patches per image do not fit the {num_patches} "
                f"patches of {architecture(model)} in {images.shape[-2]} x {images.shape[-1]} "
                "pixels; set views.crops.*.mask.patch_size to the backbone's patch size"
            )
        x = torch.where(masked.view(*x.shape[:-1], 1), mask_token.to(x.dtype), x)
    output = type(model)._pos_embed(model, x)
    return output if isinstance(output, tuple) else (output, None)


def _keep(model: Any, x: Tensor, rope: Tensor | None, kept: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return each image's prefix and `kept` patches, and the rotary angles of these patches."""
    prefix, patches = _split(x, model.num_prefix_tokens)
    patches = patches.gather(1, kept.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))
    if rope is not None:
        rope = timm.layers.apply_keep_indices_nlc(x, rope, kept)
        # Angles are (B, 1, L, dim) for all heads, or (depth, B, heads, L, dim) if they are learned.
        rope = rope.transpose(0, 1) if model.rope_mixed else rope.unsqueeze(1)
    return torch.cat([prefix, patches], dim=1), rope


def _attention_mask(valid: Tensor, num_prefix_tokens: int) -> Tensor:
    """Return an attention mask that hides padding from every token, bool (B, 1, 1, tokens)."""
    attended = F.pad(valid, (num_prefix_tokens, 0), value=True)
    # A softmax over no tokens would be NaN. All outputs of such an image are padding anyway.
    is_empty = ~attended.any(1, keepdim=True)
    return (attended | is_empty)[:, None, None, :]


def _final_norm(model: Any) -> nn.Module:
    """Return the norm of the tokens. With average pooling, timm applies it to the mean instead."""
    return model.fc_norm if isinstance(model.norm, nn.Identity) else model.norm


def _split(x: Tensor, num_prefix_tokens: int) -> tuple[Tensor, Tensor]:
    return x[:, :num_prefix_tokens], x[:, num_prefix_tokens:]


def _layer_number(model: Any, layer: int) -> int:
    depth = len(model.blocks)
    if not -depth <= layer < depth:
        raise ValueError(
            f"layer {layer} does not exist: {architecture(model)} has {depth} blocks, "
            f"numbered 0 to {depth - 1}, or -{depth} to -1"
        )
    return layer % depth


def _check_patch_dropout(model: Any) -> None:
    if getattr(model.patch_drop, "prob", 0.0):
        raise ValueError(
            f"backbone.args.patch_drop_rate: {model.patch_drop.prob} would drop patches at random "
            "from tokens that a method needs; leave it out"
        )
