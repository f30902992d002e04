"""Create timm networks by name, on the meta device where that suffices.

If wandb is installed, timm imports it for one function of timm's training script. That takes longer
than the import of torch, in every command and on every rank. So wandb is hidden while timm is
imported, and the function imports wandb when it is called.
"""

import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from ssl_pretrain.models import custom_network
from ssl_pretrain.schema import DIMENSIONLESS, setting
from ssl_pretrain.schema.image_sizes import ImageSize
from ssl_pretrain.system import program

Network = TypeVar("Network", bound=nn.Module)


class _LazyWandb:
    """Replacement for the module wandb, which is imported on first use."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module("wandb"), name)


def _import_timm() -> Any:
    if "timm" in sys.modules or "wandb" in sys.modules:
        return importlib.import_module("timm")
    sys.modules["wandb"] = None  # type: ignore[assignment]  # `import wandb` raises ImportError
    try:
        module = importlib.import_module("timm")
    finally:
        del sys.modules["wandb"]
    vars(importlib.import_module("timm.utils.summary"))["wandb"] = _LazyWandb()
    return module


timm = _import_timm()


_CHANNELS = "num_input_channels"  # attribute of a network, which its copies keep


@dataclass
class BackboneConfig:
    """Network to pretrain and its initial weights."""

    name: str = setting(
        "resnet50",
        "timm's name, such as resnet50 or vit_small_patch16_224. package.module:function: a "
        "function that returns a network of your own. Its parameter in_chans, if it has one, "
        "receives data.channels.",
    )
    stem: Literal["imagenet", "no_pool", "small"] = setting(
        "imagenet",
        "First layers of a ResNet. For small images, no_pool omits max-pooling, and small also "
        "sets the stride to 1.",
    )
    init: str = setting(
        "random",
        "Initial weights: random, timm:<tag>, a .safetensors or .pth file, or the folder of a run.",
    )
    init_key: str = setting(
        "", "Key of the weights in the file, such as teacher. If empty, it is found automatically."
    )
    init_prefix: str = setting(
        "",
        "Prefix of the backbone's keys in the file, such as module.encoder_q. "
        "If empty, it is found automatically.",
    )
    drop_path: float = setting(0.0, "Rate of stochastic depth.", below=1, unit=DIMENSIONLESS)
    args: dict[str, Any] = setting({}, "Other arguments of the timm model, such as patch_size.")


def create(config: BackboneConfig, image_size: ImageSize) -> nn.Module:
    """Create the network without a classifier, for views of `image_size` pixels.

    Raises:
        ValueError: If timm lacks the model or its weights or refuses an argument, or the stem
            cannot be changed.
    """
    if custom_network.is_custom(config.name):
        model = _create_custom(config, image_size)
    else:
        model = _create_by_timm(config, image_size)
    setattr(model, _CHANNELS, int(config.args.get("in_chans", 3)))
    return model


def _create_by_timm(config: BackboneConfig, image_size: ImageSize) -> nn.Module:
    _check_name(config.name)
    args = size_arguments(config.name, image_size) | dict(config.args)
    if config.drop_path:
        args["drop_path_rate"] = config.drop_path
    model = _construct(config, args)
    if config.stem != "imagenet":
        _shrink_stem(model, config.name, unit_stride=config.stem == "small")
    return model


def input_channels(model: nn.Module) -> int:
    """Return the number of channels of the images that a network takes."""
    return getattr(model, _CHANNELS, 3)


def _create_custom(config: BackboneConfig, image_size: ImageSize) -> nn.Module:
    """Create a network of the user's, and refuse settings that only networks of timm have."""
    remedy = f"which are for networks of timm, not for {config.name}; leave it out"
    if config.stem != "imagenet":
        raise ValueError(f"backbone.stem: {config.stem} changes the first layers, {remedy}")
    if config.drop_path:
        raise ValueError(
            f"backbone.drop_path: {config.drop_path} is for networks of timm, not for "
            f"{config.name}; set it in backbone.args"
        )
    if config.init.startswith("timm:"):
        raise ValueError(f"backbone.init: {config.init} names weights, {remedy}")
    return custom_network.create(config.name, config.args, image_size)


def _construct(config: BackboneConfig, args: dict[str, Any]) -> nn.Module:
    tag = config.init.removeprefix("timm:") if config.init.startswith("timm:") else ""
    name, pretrained = f"{config.name}.{tag}" if tag else config.name, bool(tag)
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, **args)
    except Exception as error:  # constructors raise errors of many types
        if isinstance(error, RuntimeError) and is_meta_limitation(error):
            raise  # the caller then builds the network on the CPU
        reason = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
        if "drop_path_rate" in str(error) and config.drop_path:
            raise ValueError(
                f"backbone.drop_path: {config.drop_path} is not possible for {config.name}, which "
                "has no stochastic depth; set it to 0"
            ) from None
        if isinstance(error, TypeError) or (config.args and not pretrained):
            raise ValueError(
                f"backbone.args: {config.name} refuses {dict(config.args)}: "
                f"{reason if config.args else error}; change backbone.args"
            ) from None
        if not pretrained:
            raise
        raise ValueError(
            f"backbone.init: {config.init!r} cannot be loaded ({type(error).__name__}). Check the "
            f"network connection, and that timm.list_pretrained({config.name + '*'!r}) has the "
            "tag, or give the weights as a file"
        ) from None


def size_arguments(name: str, image_size: ImageSize) -> dict[str, Any]:
    """Return the constructor arguments that make a network accept views of `image_size` pixels.

    If the constructor supports it, the network also accepts other sizes.
    """
    if custom_network.is_custom(name):
        return {}
    img_size = image_size if isinstance(image_size, int) else tuple(image_size)
    arguments = {"img_size": img_size, "dynamic_img_size": True, "strict_img_size": False}
    return {key: value for key, value in arguments.items() if key in constructor_arguments(name)}


@cache
def constructor_arguments(name: str) -> frozenset[str]:
    """Return the names of the constructor arguments that a timm network's entry point passes on."""
    model = create_on_meta(lambda: timm.create_model(name, num_classes=0))
    names: set[str] = set()
    for base in type(model).__mro__:  # a class with **kwargs passes them to the next class
        parameters = inspect.signature(base.__init__).parameters  # type: ignore[misc]
        names |= set(parameters)
        if all(parameter.kind != parameter.VAR_KEYWORD for parameter in parameters.values()):
            break
    entry = set(inspect.signature(timm.models.model_entrypoint(name)).parameters)
    return frozenset(names if "kwargs" in entry else names & entry)


def _shrink_stem(model: nn.Module, name: str, unit_stride: bool) -> None:
    stem = getattr(model, "conv1", None)
    if stem is None or not hasattr(model, "maxpool"):
        raise ValueError(
            f"backbone.stem: no_pool and small are for ResNets, and {name} has no convolution and "
            "max-pooling stem; use imagenet, with args.patch_size for a ViT"
        )
    model.maxpool = nn.Identity()
    if not unit_stride:
        return
    # 7x7 with stride 2 becomes 3x3 with stride 1, as in SimCLR's CIFAR runs (appendix B.9).
    if isinstance(stem, nn.Conv2d):
        small_stem = nn.Conv2d(stem.in_channels, stem.out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(small_stem.weight, mode="fan_out", nonlinearity="relu")
        model.conv1 = small_stem
    else:
        for layer in stem.modules():
            if isinstance(layer, nn.Conv2d):
                layer.stride = (1, 1)


def check_tag(config: BackboneConfig) -> None:
    """Raise ValueError if `backbone.init` is `timm:<tag>` and timm has no such weights."""
    tag = config.init.removeprefix("timm:") if config.init.startswith("timm:") else None
    if tag is None or custom_network.is_custom(config.name) or not timm.is_model(config.name):
        return  # the network itself is checked when it is built
    tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{config.name}.*")]
    if tag not in tags:
        raise ValueError(
            f"backbone.init: {config.init!r} names no weights of {config.name}; give "
            f"{', '.join(f'timm:{known}' for known in tags) or 'random, as timm has none'}"
        )


def describe_pretrained(config: BackboneConfig, model: nn.Module) -> list[str]:
    """Return notes on what timm has converted in the weights of `timm:<tag>`."""
    weights = timm.models.get_pretrained_cfg(f"{config.name}.{config.init.removeprefix('timm:')}")
    embedding: Any = getattr(model, "patch_embed", None)
    if weights is None or not hasattr(embedding, "grid_size"):
        return []
    original = create_on_meta(lambda: timm.create_model(config.name, num_classes=0)).patch_embed
    size, patch_size = weights.input_size[-1], original.patch_size[0]
    notes = []
    if getattr(model, "pos_embed", None) is not None:
        grid = size // patch_size
        if (grid, grid) != tuple(embedding.grid_size):
            new_grid = " x ".join(map(str, embedding.grid_size))
            notes.append(f"positions resampled from {grid} x {grid} to {new_grid} patches")
    if embedding.patch_size[0] != patch_size:
        notes.append(
            f"patch embedding resampled from {patch_size} to {embedding.patch_size[0]} pixels"
        )
    return notes


def native_size(name: str) -> int:
    """Return the image size that the network was designed for."""
    return int(pretrained_cfg(name).input_size[-1])


def pretrained_cfg(name: str) -> Any:
    """Return timm's metadata for a network, such as its input size, mean and classifier.

    Raises:
        ValueError: If timm has no such model.
    """
    if custom_network.is_custom(name):
        return timm.models.PretrainedCfg()
    _check_name(name)
    return timm.models.get_pretrained_cfg(name) or timm.models.PretrainedCfg()


def architecture(model: nn.Module) -> str:
    """Return the name under which timm builds a network, or the class of another network."""
    config = getattr(model, "pretrained_cfg", None) or {}
    return config.get("architecture") or type(model).__name__


def _check_name(name: str) -> None:
    network, dot, tag = name.partition(".")
    if dot and timm.is_model(network):
        raise ValueError(
            f"backbone.name: {name!r} includes the tag of pretrained weights; "
            f"give backbone.name={network} backbone.init=timm:{tag}"
        )
    if not timm.is_model(name):
        similar = get_close_matches(name, timm.list_models(), n=3)
        hint = f" Did you mean {' or '.join(map(repr, similar))}?" if similar else ""
        raise ValueError(
            f"backbone.name: {name!r} is not a timm model.{hint} "
            f"`{program.command('list backbones')}` lists all"
        )


def create_on_meta(construct: Callable[[], Network]) -> Network:
    """Create a network on the meta device, or on the CPU if its constructor needs values.

    The state of torch's random number generator does not change.
    """
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return construct()
        except (NotImplementedError, RuntimeError) as error:
            if not is_meta_limitation(error):
                raise
            with torch.device("cpu"):
                return construct()


def is_meta_limitation(error: BaseException) -> bool:
    """Return True if the error means that the meta device lacks an operation."""
    return isinstance(error, NotImplementedError) or "meta" in str(error).lower()
