"""Backbones: timm networks that return one vector per image."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ssl_pretrain.models import image_size_check, published_weights, timm_networks
from ssl_pretrain.models.components import Backbone
from ssl_pretrain.models.text_encoders import TextEncoder
from ssl_pretrain.models.timm_networks import BackboneConfig
from ssl_pretrain.models.transformer import TransformerBlocks
from ssl_pretrain.schema.image_sizes import ImageSize

REMEDY = "set backbone.name, backbone.stem and backbone.args as in the run that trained them"
WRAPPER_PREFIXES = ("module.", "_orig_mod.", "_fsdp_wrapped_module.")  # DDP, torch.compile, FSDP1


def build(config: BackboneConfig, image_size: ImageSize) -> Backbone:
    """Build a backbone for views of `image_size` pixels.

    The weights are random, or those of the configuration's `timm:<tag>`. Weights from a file or a
    run are loaded afterwards by `load_strict`.

    Raises:
        ValueError: If timm has no such model or weights, refuses an argument, or cannot make the
            stem small, or if the network does not return one vector per image of that size.
    """
    width = image_size_check.measure_feature_dim(config, image_size, image_size)
    return Backbone(timm_networks.create(config, image_size), width, image_size)


def build_on_meta(config: BackboneConfig, image_size: ImageSize) -> Backbone:
    """Build a backbone on the meta device, to count its parameters and operations.

    Nothing is downloaded, because its weights have no values.
    """
    if config.init.startswith("timm:"):
        config = replace(config, init="random")
    return timm_networks.create_on_meta(lambda: build(config, image_size)).to("meta")


def strip_wrapper_prefixes(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefixes of wrapped modules from the names of weights."""
    plain_weights = {}
    for key, value in weights.items():
        for prefix in WRAPPER_PREFIXES:
            key = key.replace(f".{prefix}", ".").removeprefix(prefix)
        plain_weights[key] = value
    return plain_weights


def load_strict(
    backbone: nn.Module,
    weights: dict[str, Tensor],
    source: str,
    prefix: str = "",
    exact: bool = False,
) -> list[str]:
    """Load every key of the backbone from `weights`, or raise an error and change nothing.

    Args:
        backbone: The network.
        weights: Tensors under the names of this project, of timm, or of the code that published
            them. Tensors of a classifier or of other networks are ignored.
        source: Name of the weights for messages.
        prefix: Prefix of the backbone's keys in `weights`. If empty, it is found automatically.
        exact: True to refuse weights if any of them would be ignored or converted. Used for
            checkpoints of this project.

    Returns:
        Notes on the weights that were ignored or converted.

    Raises:
        ValueError: If a key is missing, unexpected or has another shape. The message lists such
            keys and names `source`.
    """
    weights, state = strip_wrapper_prefixes(weights), backbone.state_dict()
    prefix = next(iter(strip_wrapper_prefixes({prefix: torch.empty(0)})))
    if prefix and not any(key.startswith(prefix) for key in weights):
        raise ValueError(
            f"{source}: backbone.init_prefix: no tensor name starts with {prefix!r}; "
            f"choose a prefix of names such as {', '.join(list(weights)[:3])}"
        )
    if not exact and isinstance(backbone, Backbone):
        match = published_weights.match_weights(backbone.model, weights, prefix or None)
        if isinstance(match, str):
            if "init_prefix" in match:  # the message already contains the remedy
                raise ValueError(f"{source}: {match}. Nothing was loaded")
            channels = backbone.num_channels
            remedy = REMEDY
            if channels != 3:
                remedy += f", or backbone.init=random, as data.channels is {channels}"
            raise ValueError(
                f"{source}: not the weights of this backbone: {match}. Nothing was loaded; {remedy}"
            )
        _load(backbone.model, match.weights)
        return [note for note in match.notes if note != "prefix 'model.'"]
    if weights and not set(weights) & set(state):  # timm's names without this project's prefix
        weights = {f"model.{key}": value for key, value in weights.items()}
    shape_mismatches = [
        f"{key} {tuple(weights[key].shape)} for {tuple(state[key].shape)}"
        for key in set(state) & set(weights)
        if weights[key].shape != state[key].shape
    ]
    problems = published_weights.describe_mismatched_keys(
        sorted(set(state) - set(weights)),
        sorted(set(weights) - set(state)),
        sorted(shape_mismatches),
    )
    if problems:
        raise ValueError(
            f"{source}: not the weights of this backbone: {problems}. Nothing was loaded; {REMEDY}"
        )
    _load(backbone, weights)
    return []


def _load(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy the weights into a module. A module on the meta device has no memory and is skipped."""
    if not next(module.parameters()).is_meta:
        module.load_state_dict(weights, strict=True)


def networks(module: nn.Module) -> list[Backbone]:
    """Return every backbone in `module`, the student's and the teachers'."""
    return [child for child in module.modules() if isinstance(child, Backbone)]


def text_encoders(module: nn.Module) -> list[TextEncoder]:
    """Return every text encoder in `module`."""
    return [child for child in module.modules() if isinstance(child, TextEncoder)]


def blocks(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the names and modules of the repeated blocks of every network in `module`.

    They are in `blocks` of a ViT, in `layer1` to `layer4` of a ResNet, in `stages` of other timm
    networks, in the `TransformerBlocks` of predictors and decoders, and in text encoders. Each
    block is sharded, compiled or recomputed as a unit. Some networks have none.
    """
    return [
        (f"{name}.{block_name}".lstrip("."), block)
        for name, network in module.named_modules()
        for block_name, block in _own_blocks(network)
    ]


def _own_blocks(network: nn.Module) -> list[tuple[str, nn.Module]]:
    if isinstance(network, TransformerBlocks):
        return list(network.named_children())
    if isinstance(network, TextEncoder):
        return network.blocks()
    if not isinstance(network, Backbone):
        return []
    return [
        (f"model.{key}.{block_name}", block)
        for key, stack in network.model.named_children()
        if key.rstrip("0123456789") in ("blocks", "layer", "stages")
        for block_name, block in stack.named_children()
    ]


def count_parameters(module: nn.Module) -> int:
    """Return the number of weights in all parameters of a module, trained or not."""
    return sum(parameter.numel() for parameter in module.parameters())
