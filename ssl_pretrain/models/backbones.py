"""Backbones: timm networks that return one vector per image."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ssl_pretrain.models import image_size_check, published_weights, timm_networks
from ssl_pretrain.models.components import Backbone
from ssl_pretrain.models.timm_networks import BackboneConfig

REMEDY = "give backbone.name, stem and args of the run that trained them"
PREFIXES = ("module.", "_orig_mod.", "_fsdp_wrapped_module.")  # DDP, torch.compile, FSDP1


def build(config: BackboneConfig, image_size: int) -> Backbone:
    """Build a backbone for views of `image_size` pixels.

    Its weights are random or those of `timm:<tag>`. Weights from a file or a run are loaded
    afterwards by `load_strict`.

    Raises:
        ValueError: If timm has no such model or weights or refuses an argument, if the stem cannot
            be made small, or if the network does not return one vector per image of that size.
    """
    width = image_size_check.feature_dim(config, image_size, image_size)
    return Backbone(timm_networks.create(config, image_size), width)


def on_meta(config: BackboneConfig, image_size: int) -> Backbone:
    """Build a backbone on the meta device, to count its parameters and operations."""
    return timm_networks.without_memory(lambda: build(config, image_size)).to("meta")


def plain_keys(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefixes of wrapped modules from the names of weights."""
    plain = {}
    for key, value in weights.items():
        for prefix in PREFIXES:
            key = key.replace(f".{prefix}", ".").removeprefix(prefix)
        plain[key] = value
    return plain


def load_strict(
    backbone: nn.Module,
    weights: dict[str, Tensor],
    source: str,
    prefix: str = "",
    exact: bool = False,
) -> list[str]:
    """Load every key of the backbone from `weights`, or change nothing.

    Args:
        backbone: The network.
        weights: Tensors under the names of this project, of timm, or of the code that published
            them. Tensors of a classifier or of other networks are left out.
        source: Name of the weights in messages.
        prefix: Prefix of the backbone's keys in `weights`. Empty to search for it.
        exact: Refuse weights of which something would have to be left out or converted. Used for
            checkpoints of this project.

    Returns:
        Notes on what was left out or converted.

    Raises:
        ValueError: If a key is missing, unexpected or of another shape. The message lists such keys
            and names `source`.
    """
    weights, expected = plain_keys(weights), backbone.state_dict()
    prefix = next(iter(plain_keys({prefix: torch.empty(0)})))
    if prefix and not any(key.startswith(prefix) for key in weights):
        raise ValueError(
            f"{source}: backbone.init_prefix: no name in it starts with {prefix!r}; "
            f"it has {', '.join(list(weights)[:3])}, ..."
        )
    if not exact and isinstance(backbone, Backbone):
        match = published_weights.match(backbone.model, weights, prefix or None)
        if isinstance(match, str):
            remedy = "" if "init_prefix" in match else f"; {REMEDY}"
            raise ValueError(
                f"{source}: not the weights of this backbone: {match}. Nothing was loaded{remedy}"
            )
        _load(backbone.model, match.weights)
        return [note for note in match.notes if note != "prefix 'model.'"]
    if weights and not set(weights) & set(expected):  # timm's names, without our prefix
        weights = {f"model.{key}": value for key, value in weights.items()}
    reshaped = [
        f"{key} {tuple(weights[key].shape)} for {tuple(expected[key].shape)}"
        for key in set(expected) & set(weights)
        if weights[key].shape != expected[key].shape
    ]
    problems = published_weights.describe_keys(
        sorted(set(expected) - set(weights)), sorted(set(weights) - set(expected)), sorted(reshaped)
    )
    if problems:
        raise ValueError(
            f"{source}: not the weights of this backbone: {problems}. Nothing was loaded; {REMEDY}"
        )
    _load(backbone, weights)
    return []


def _load(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy the weights into a module, unless it is on the meta device, which has no memory."""
    if not next(module.parameters()).is_meta:
        module.load_state_dict(weights, strict=True)


def blocks(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the names and modules of the repeated blocks of every backbone in `module`.

    They are in `blocks` of a ViT, in `layer1` to `layer4` of a ResNet, and in `stages` of other
    timm networks. Each is sharded, compiled or recomputed as a unit. Some networks have none.
    """
    return [
        (f"{name}.model.{key}.{number}".lstrip("."), block)
        for name, backbone in module.named_modules()
        if isinstance(backbone, Backbone)
        for key, stack in backbone.model.named_children()
        if key.rstrip("0123456789") in ("blocks", "layer", "stages")
        for number, block in stack.named_children()
    ]


def count_parameters(module: nn.Module) -> int:
    """Return the number of weights in all parameters of a module, trained or not."""
    return sum(parameter.numel() for parameter in module.parameters())
