"""Create timm networks by name, on the meta device where that suffices."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from ssl_pretrain.models.timm_import import timm
from ssl_pretrain.schema import setting

Network = TypeVar("Network", bound=nn.Module)


@dataclass
class BackboneConfig:
    """The network that is pretrained and its initial weights."""

    name: str = setting("resnet50", "Name in timm: resnet50, vit_small_patch16_224, ...")
    stem: Literal["imagenet", "no_pool", "small"] = setting(
        "imagenet",
        "First layers of a ResNet, for small images. no_pool: no max-pooling. "
        "small: no max-pooling and stride 1.",
    )
    init: str = setting(
        "random",
        "Initial weights: random, timm:<tag>, a .safetensors or .pth file, or the folder of a run.",
    )
    init_key: str = setting(
        "", "Key in the file that holds the weights, such as teacher. Empty: found automatically."
    )
    init_prefix: str = setting(
        "",
        "Prefix of the backbone's keys in the file, such as module.encoder_q. "
        "Empty: found automatically.",
    )
    drop_path: float = setting(0.0, "Rate of stochastic depth.", below=1)
    args: dict[str, Any] = setting({}, "More arguments of the timm model, such as patch_size.")


def create(config: BackboneConfig, image_size: int) -> nn.Module:
    """Create the network without a classifier, for views of `image_size` pixels.

    Raises:
        ValueError: timm has no such model or weights or refuses an argument, or the stem cannot be
            made small.
    """
    _check_name(config.name)
    if config.args.get("in_chans", 3) != 3:
        raise ValueError(
            f"backbone.args.in_chans: {config.args['in_chans']} does not fit the images, which "
            "have three channels (red, green and blue); leave it out"
        )
    args = size_arguments(config.name, image_size) | dict(config.args)
    if config.drop_path:
        args["drop_path_rate"] = config.drop_path
    tag = config.init.removeprefix("timm:") if config.init.startswith("timm:") else ""
    name = f"{config.name}.{tag}" if tag else config.name
    model = _construct(config, name, bool(tag), args)
    if config.stem != "imagenet":
        _shrink_stem(model, config.name, stride_too=config.stem == "small")
    return model


def _construct(
    config: BackboneConfig, name: str, pretrained: bool, args: dict[str, Any]
) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, **args)
    except Exception as error:  # a network's constructor may fail in any way
        if isinstance(error, RuntimeError) and lacks_meta(error):
            raise  # the caller builds it on the CPU instead
        text = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
        if "drop_path_rate" in str(error) and config.drop_path:
            raise ValueError(
                f"backbone.drop_path: {config.drop_path} is not for {config.name}, which takes "
                "none; set it to 0"
            ) from None
        if isinstance(error, TypeError) or (config.args and not pretrained):
            raise ValueError(
                f"backbone.args: {config.name} refuses {dict(config.args)}: "
                f"{text if config.args else error}"
            ) from None
        if not pretrained:
            raise
        raise ValueError(
            f"backbone.init: {config.init!r} cannot be loaded ({type(error).__name__}). It needs a "
            f"network and a tag of timm.list_pretrained({config.name + '*'!r}); "
            "or give the weights as a file"
        ) from None


def size_arguments(name: str, image_size: int) -> dict[str, Any]:
    """Return constructor arguments for views of `image_size` pixels.

    A network that can takes other sizes too.
    """
    wanted = {"img_size": image_size, "dynamic_img_size": True, "strict_img_size": False}
    return {key: value for key, value in wanted.items() if key in constructor_arguments(name)}


@cache
def constructor_arguments(name: str) -> frozenset[str]:
    """Return the constructor arguments of a timm network that its entry point passes on."""
    model = without_memory(lambda: timm.create_model(name, num_classes=0))
    names: set[str] = set()
    for kind in type(model).__mro__:  # a class that takes **kwargs hands them to the next
        parameters = inspect.signature(kind.__init__).parameters  # type: ignore[misc]
        names |= set(parameters)
        if all(each.kind != each.VAR_KEYWORD for each in parameters.values()):
            break
    entry = set(inspect.signature(timm.models.model_entrypoint(name)).parameters)
    return frozenset(names if "kwargs" in entry else names & entry)


def _shrink_stem(model: nn.Module, name: str, stride_too: bool) -> None:
    stem = getattr(model, "conv1", None)
    if stem is None or not hasattr(model, "maxpool"):
        raise ValueError(
            f"backbone.stem: no_pool and small are for ResNets, and {name} has no convolution and "
            "max-pooling stem; use imagenet, with args.patch_size for a ViT"
        )
    model.maxpool = nn.Identity()
    if not stride_too:
        return
    # 7x7 with stride 2 becomes 3x3 with stride 1, as in SimCLR's CIFAR runs (appendix B.9).
    if isinstance(stem, nn.Conv2d):
        small = nn.Conv2d(3, stem.out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(small.weight, mode="fan_out", nonlinearity="relu")
        model.conv1 = small
    else:
        for layer in stem.modules():
            if isinstance(layer, nn.Conv2d):
                layer.stride = (1, 1)


def native_size(name: str) -> int:
    """Return the image size that the network was designed for."""
    return int(pretrained_cfg(name).input_size[-1])


def pretrained_cfg(name: str) -> Any:
    """Return what timm knows of a network's weights: input size, mean, deviation, classifier.

    Raises:
        ValueError: timm has no such model.
    """
    _check_name(name)
    return timm.models.get_pretrained_cfg(name) or timm.models.PretrainedCfg()


def _check_name(name: str) -> None:
    network, dot, tag = name.partition(".")
    if dot and timm.is_model(network):
        raise ValueError(
            f"backbone.name: {name!r} names weights too; "
            f"give backbone.name={network} backbone.init=timm:{tag}"
        )
    if not timm.is_model(name):
        close = get_close_matches(name, timm.list_models(), n=3)
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise ValueError(
            f"backbone.name: {name!r} is not a timm model.{hint} "
            "Names: python -c 'import timm; print(timm.list_models())'"
        )


def without_memory(construct: Callable[[], Network]) -> Network:
    """Create a network on the meta device, or on the CPU if its constructor needs values.

    The random state stays as it is.
    """
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return construct()
        except (NotImplementedError, RuntimeError) as error:
            if not lacks_meta(error):
                raise
            with torch.device("cpu"):
                return construct()


def lacks_meta(error: BaseException) -> bool:
    """Return True if the meta device lacks an operation. Any other error is a mistake."""
    return isinstance(error, NotImplementedError) or "meta" in str(error).lower()
