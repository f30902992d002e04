"""Views to features: any timm ResNet or ViT, by name, without its classifier."""

from __future__ import annotations

from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

from ssl_pretrain.schema import below

PREFIXES = ("module.", "_orig_mod.", "_fsdp_wrapped_module.")  # DDP, torch.compile, FSDP1


@dataclass
class BackboneConfig:
    """Which network is pretrained, and where its weights come from."""

    name: str = "resnet50"  # any timm name: resnet50, vit_small_patch16_224, ...
    stem: Literal["imagenet", "no_pool", "small"] = (
        "imagenet"  # for small images: no max-pooling before the stages; small: stride 1 there too
    )
    init: str = "random"  # random | timm:<tag> | <file.safetensors or .pth> | <run folder>; loaded strictly
    drop_path: float = field(default=0.0, metadata=below(1))  # stochastic depth
    args: dict[str, Any] = field(default_factory=dict)  # further arguments of the timm model (patch_size, channels, ...)


class Backbone(nn.Module):
    """A timm model that maps images (rows, 3, height, width) to pooled features (rows, feature_dim)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.feature_dim: int = model.num_features  # type: ignore[assignment]

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)


def build(config: BackboneConfig, image_size: int) -> Backbone:
    """The backbone of `config` for views of `image_size` pixels, with random weights or those of `timm:<tag>`.

    Weights from a file or a run are loaded by `checkpoint.initialize`, which knows both formats.

    Raises:
        ValueError: timm has no such model, no such weights, refuses an argument, or the stem cannot be made small.
    """
    if not timm.is_model(config.name):
        close = get_close_matches(config.name, timm.list_models(), n=3)
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise ValueError(
            f"backbone.name: {config.name!r} is not a timm model.{hint} Names: python -c 'import timm; print(timm.list_models())'"
        )
    args = dict(config.args)
    if config.drop_path:
        args["drop_path_rate"] = config.drop_path
    tag = config.init.removeprefix("timm:") if config.init.startswith("timm:") else ""
    name = f"{config.name}.{tag}" if tag else config.name
    if takes_image_size(config.name):
        args.setdefault("img_size", image_size)
        args.setdefault("dynamic_img_size", True)  # local crops are smaller than the global ones
    try:
        model = timm.create_model(name, pretrained=bool(tag), num_classes=0, **args)
    except TypeError as error:
        raise ValueError(f"backbone.args: {config.name} refuses {dict(config.args)}: {error}") from None
    except Exception as error:
        if not tag:
            raise
        raise ValueError(
            f"backbone.init: {config.init!r} cannot be loaded ({type(error).__name__}). It needs a network and a tag of "
            f"timm.list_pretrained({config.name + '*'!r}); or give the weights as a file"
        ) from None
    if config.stem != "imagenet":
        _shrink_stem(model, config.name, stride_too=config.stem == "small")
    return Backbone(model)


def takes_image_size(name: str) -> bool:
    return timm.models.model_entrypoint(name).__module__.rpartition(".")[2] in {"vision_transformer", "deit", "vision_transformer_hybrid"}


def _shrink_stem(model: nn.Module, name: str, stride_too: bool) -> None:
    stem = getattr(model, "conv1", None)
    if stem is None or not hasattr(model, "maxpool"):
        raise ValueError(
            f"backbone.stem: no_pool and small are for ResNets, and {name} has no convolution and max-pooling stem; "
            f"use imagenet, with args.patch_size for a ViT"
        )
    model.maxpool = nn.Identity()
    if not stride_too:
        return
    if isinstance(stem, nn.Conv2d):  # 7x7 stride 2 becomes 3x3 stride 1, as in SimCLR's CIFAR runs (appendix B.9)
        small = nn.Conv2d(3, stem.out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(small.weight, mode="fan_out", nonlinearity="relu")
        model.conv1 = small
    else:
        for layer in stem.modules():
            if isinstance(layer, nn.Conv2d):
                layer.stride = (1, 1)


def plain_keys(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under the names of an unwrapped module: `module.`, `_orig_mod.` and `_fsdp_wrapped_module.` removed."""
    plain = {}
    for key, value in weights.items():
        for prefix in PREFIXES:
            key = key.replace(f".{prefix}", ".").removeprefix(prefix)
        plain[key] = value
    return plain


def load_strict(backbone: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Loads 100 % of the backbone's keys from `weights`, or changes nothing.

    Raises:
        ValueError: a key is missing, unexpected or of another shape; the message lists them and names `source`.
    """
    weights, own = plain_keys(weights), backbone.state_dict()
    if weights and not set(weights) & set(own):  # timm's own names, without ours in front
        weights = {f"model.{key}": value for key, value in weights.items()}
    missing, unexpected = sorted(set(own) - set(weights)), sorted(set(weights) - set(own))
    reshaped = sorted(
        f"{key} {tuple(weights[key].shape)} for {tuple(own[key].shape)}"
        for key in set(own) & set(weights)
        if weights[key].shape != own[key].shape
    )
    if missing or unexpected or reshaped:
        found = [
            f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
            for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
            if keys
        ]
        raise ValueError(
            f"{source}: not the weights of this backbone: {'; '.join(found)}. "
            "Nothing was loaded; give backbone.name, stem and args of the run that made them"
        )
    backbone.load_state_dict(weights, strict=True)


def blocks(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, block) of the repeated blocks of every backbone in `module`: a ViT's `blocks`, a ResNet's in `layer1` to `layer4`,
    other timm networks' in `stages`. What is sharded, compiled or recomputed as one. Empty where a network has none."""
    found = []
    for name, backbone in module.named_modules():
        stacks = backbone.model.named_children() if isinstance(backbone, Backbone) else ()
        for key, stack in stacks:
            if key.rstrip("0123456789") in ("blocks", "layer", "stages"):
                found += [(f"{name}.model.{key}.{number}".lstrip("."), block) for number, block in stack.named_children()]
    return found


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def on_meta(config: BackboneConfig, image_size: int) -> Backbone:
    """The same backbone without memory behind its parameters, to count and to check."""
    with torch.device("meta"):
        return build(config, image_size)
