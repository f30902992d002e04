"""Backbones: any timm network, by its name, that gives one vector per image.

When the configuration is checked, the network is tried on the meta device for every image size.
That also measures the width of its features, which `num_features` of timm does not always give.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from functools import cache, lru_cache
from typing import Any, Literal

import torch
import yaml
from torch import Tensor, nn

from ssl_pretrain.models import published_weights
from ssl_pretrain.models.timm_import import timm
from ssl_pretrain.schema import setting

REMEDY = "give backbone.name, stem and args of the run that made them"
PREFIXES = ("module.", "_orig_mod.", "_fsdp_wrapped_module.")  # DDP, torch.compile, FSDP1


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


class Backbone(nn.Module):
    """A timm model from images, (batch, 3, height, width), to features, (batch, feature_dim)."""

    def __init__(self, model: nn.Module, feature_dim: int | None = None):
        super().__init__()
        self.model = model
        self.feature_dim: int = feature_dim or model.num_features  # type: ignore[assignment]

    def forward(self, images: Tensor) -> Tensor:
        """Return the features of the images, shape (batch, feature_dim)."""
        return self.model(images)


def build(config: BackboneConfig, image_size: int) -> Backbone:
    """Build a backbone for views of `image_size` pixels.

    Its weights are random or those of `timm:<tag>`. Weights from a file or a run are loaded
    afterwards by `load_strict`.

    Raises:
        ValueError: timm has no such model or weights or refuses an argument, the stem cannot be
            made small, or the network does not give one vector per image of that size.
    """
    width = feature_dim(config, image_size, image_size)
    return Backbone(_create(config, image_size), width)


def _create(config: BackboneConfig, image_size: int) -> nn.Module:
    _check_name(config.name)
    args = dict(config.args)
    if args.get("in_chans", 3) != 3:
        raise ValueError(
            f"backbone.args.in_chans: {args['in_chans']} does not fit the images, which have three "
            "channels (red, green and blue); leave it out"
        )
    if config.drop_path:
        args["drop_path_rate"] = config.drop_path
    tag = config.init.removeprefix("timm:") if config.init.startswith("timm:") else ""
    name = f"{config.name}.{tag}" if tag else config.name
    args = size_arguments(config.name, image_size) | args
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
    model = _without_memory(lambda: timm.create_model(name, num_classes=0))
    names: set[str] = set()
    for kind in type(model).__mro__:  # a class that takes **kwargs hands them to the next
        parameters = inspect.signature(kind.__init__).parameters  # type: ignore[misc]
        names |= set(parameters)
        if all(each.kind != each.VAR_KEYWORD for each in parameters.values()):
            break
    entry = set(inspect.signature(timm.models.model_entrypoint(name)).parameters)
    return frozenset(names if "kwargs" in entry else names & entry)


def takes_image_size(name: str) -> bool:
    """Return True if the constructor of a timm network takes `img_size`."""
    return "img_size" in constructor_arguments(name)


def _without_memory(create: Callable[[], nn.Module]) -> nn.Module:
    """Create a network on the meta device, or on the CPU if its constructor needs values.

    The random state stays as it is.
    """
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return create()
        except (NotImplementedError, RuntimeError) as error:
            if not lacks_meta(error):
                raise
            with torch.device("cpu"):
                return create()


def lacks_meta(error: BaseException) -> bool:
    """Return True if the meta device lacks an operation. Any other error is a mistake."""
    return isinstance(error, NotImplementedError) or "meta" in str(error).lower()


def feature_dim(config: BackboneConfig, built_for: int, size: int) -> int:
    """Measure the width of the features on the network's output.

    Args:
        config: The backbone.
        built_for: Image size in pixels that the network is built for.
        size: Image size in pixels that it is tried with.

    Raises:
        ValueError: The network cannot be built, cannot take the size, or does not give one vector
            per image.
    """
    plain = BackboneConfig(config.name, config.stem, drop_path=config.drop_path, args=config.args)
    return _measured(yaml.safe_dump(asdict(plain)), built_for, size)


@lru_cache(maxsize=256)
def _measured(config: str, built_for: int, size: int) -> int:
    settings = BackboneConfig(**yaml.safe_load(config))
    try:
        return _width(settings, built_for, size)
    except _WrongSizeError as error:
        raise ValueError(_about_size(settings, built_for, size, str(error))) from None


class _WrongSizeError(Exception):
    """Raised for a network that cannot take images of a size."""


def _width(config: BackboneConfig, built_for: int, size: int) -> int:
    try:
        model = _without_memory(lambda: _create(config, built_for))
    except ValueError:
        raise
    except Exception as error:
        raise _WrongSizeError(_first_line(error)) from None
    try:
        widths = _try(model, size)
    except Exception as error:
        if not lacks_meta(error) or next(model.parameters()).device.type != "meta":
            raise _WrongSizeError(_first_line(error)) from None
        try:
            with torch.random.fork_rng(devices=[]):
                widths = _try(_create(config, built_for), size)
        except Exception as problem:
            raise _WrongSizeError(_first_line(problem)) from None
    if len(widths) != 1 or not all(isinstance(width, int) for width in widths):
        outputs = " and ".join(sorted(map(str, widths)))
        raise ValueError(
            f"backbone.args: {config.name} with {dict(config.args)} gives {outputs} "
            "for an image, and one vector is needed; leave out global_pool, features_only and "
            "whatever else changes the output"
        )
    (width,) = widths
    return int(width)


def _try(model: nn.Module, size: int) -> set[int | str]:
    """Return the widths of the output in evaluation and in training.

    An output that is not one vector per image is described in words.
    """
    device = next(model.parameters()).device
    widths: set[int | str] = set()
    for training in (False, True):
        model.train(training)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            output = model(torch.zeros(2, 3, size, size, device=device))
        shape = tuple(output.shape) if isinstance(output, Tensor) else None
        if shape is None:
            widths.add(f"a {type(output).__name__}")
        else:
            widths.add(shape[1] if len(shape) == 2 and shape[0] == 2 else f"shape {shape[1:]}")
    return widths


def _about_size(config: BackboneConfig, built_for: int, size: int, reason: str) -> str:
    """Describe what is wrong with a size, and the nearest sizes that fit."""
    patch = _patch(config)
    step = patch or 32
    native = native_size(config.name)
    below = range(size // step * step - (0 if size % step else step), 0, -step)
    above = range((size // step + 1) * step, size + 8 * step, step)
    sizes = {
        _first_that_fits(config, built_for, size, tried)
        for tried in (list(below)[:8], above, [native])
    } - {0}
    do = f"sizes that do: {', '.join(map(str, sorted(sizes)))}" if sizes else "no size near it does"
    about = f" (patches of {patch})" if patch else ""
    return f"{size} pixels do not fit backbone.name {config.name}{about}: {reason}; {do}"


def _first_that_fits(
    config: BackboneConfig, built_for: int, size: int, tried: Iterable[int]
) -> int:
    for other in tried:
        try:
            _width(config, other if built_for == size else built_for, other)
        except (_WrongSizeError, ValueError):
            continue
        return other
    return 0


def _patch(config: BackboneConfig) -> int:
    try:
        model = _without_memory(lambda: _create(config, native_size(config.name)))
    except Exception:
        return 0
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", 0)
    return int(patch[0]) if isinstance(patch, (tuple, list)) else int(patch or 0)


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


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")


def check(config: BackboneConfig, sizes: Mapping[str, int]) -> None:
    """Try the network on images of every size, on the meta device.

    Args:
        config: The backbone. It is built for the first size.
        sizes: Image sizes in pixels by the keys that set them.

    Raises:
        ValueError: Names the key, the size and the sizes that would do.
    """
    built_for = next(iter(sizes.values()))
    if (config.init_key or config.init_prefix) and (
        config.init == "random" or config.init.startswith("timm:")
    ):
        key = "init_key" if config.init_key else "init_prefix"
        raise ValueError(
            f"backbone.{key}: {getattr(config, key)!r} is for a file of weights, "
            f"and backbone.init is {config.init!r}"
        )
    if config.init == "timm:":
        raise ValueError(
            "backbone.init: 'timm:' names no weights; "
            f"give a tag of timm.list_pretrained({config.name + '*'!r})"
        )
    for key, size in sizes.items():
        try:
            feature_dim(config, built_for, size)
        except ValueError as error:
            raise ValueError(
                f"{key}: {error}" if str(error).startswith(f"{size} pixels") else str(error)
            ) from None


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
            them. Other networks and a classifier among them are left out.
        source: Name of the weights in messages.
        prefix: Prefix of the backbone's keys in `weights`. Empty to search for it.
        exact: Nothing may be left out or converted, as in a checkpoint of this project.

    Returns:
        Notes of what was left out or converted.

    Raises:
        ValueError: A key is missing, unexpected or of another shape. The message lists them and
            names `source`.
    """
    weights, expected = plain_keys(weights), backbone.state_dict()
    prefix = next(iter(plain_keys({prefix: torch.empty(0)})))
    if prefix and not any(key.startswith(prefix) for key in weights):
        some = ", ".join(list(weights)[:3])
        raise ValueError(
            f"{source}: backbone.init_prefix: no name in it starts with {prefix!r}; "
            f"it has {some}, ..."
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
    problems = published_weights.listed(
        sorted(set(expected) - set(weights)), sorted(set(weights) - set(expected)), sorted(reshaped)
    )
    if problems:
        raise ValueError(
            f"{source}: not the weights of this backbone: {problems}. Nothing was loaded; {REMEDY}"
        )
    _load(backbone, weights)
    return []


def _load(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy the weights into a module. One on the meta device has nothing to copy them to."""
    if not next(module.parameters()).is_meta:
        module.load_state_dict(weights, strict=True)


def blocks(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the names and modules of the repeated blocks of every backbone in `module`.

    They are in `blocks` of a ViT, in `layer1` to `layer4` of a ResNet, and in `stages` of other
    timm networks. Each is sharded, compiled or recomputed as a unit. Some networks have none.
    """
    repeated = []
    for name, backbone in module.named_modules():
        stacks = backbone.model.named_children() if isinstance(backbone, Backbone) else ()
        for key, stack in stacks:
            if key.rstrip("0123456789") in ("blocks", "layer", "stages"):
                repeated += [
                    (f"{name}.model.{key}.{number}".lstrip("."), block)
                    for number, block in stack.named_children()
                ]
    return repeated


def count_parameters(module: nn.Module) -> int:
    """Return the number of weights in all parameters of a module, trained or not."""
    return sum(parameter.numel() for parameter in module.parameters())


def on_meta(config: BackboneConfig, image_size: int) -> Backbone:
    """Build a backbone on the meta device, to count its parameters and operations."""
    try:
        with torch.device("meta"):
            return build(config, image_size)
    except RuntimeError as error:  # drop path of older timm versions needs values
        if not lacks_meta(error):
            raise
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        return build(config, image_size).to("meta")
