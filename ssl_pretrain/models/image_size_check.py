"""Check that a network takes images of a size, and measure the width of its features.

The network is tried on the meta device, where that takes no memory and little time. timm's
`num_features` is not always the width of the output.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from functools import lru_cache

import torch
import yaml
from torch import Tensor, nn

from ssl_pretrain.models.timm_networks import (
    BackboneConfig,
    create,
    lacks_meta,
    native_size,
    without_memory,
)


def check(config: BackboneConfig, sizes: Mapping[str, int]) -> None:
    """Try the network on images of every size, on the meta device.

    Args:
        config: The backbone. It is built for the first size.
        sizes: Image sizes in pixels by the keys that set them.

    Raises:
        ValueError: Names the key, the size and the sizes that would do.
    """
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
            feature_dim(config, next(iter(sizes.values())), size)
        except ValueError as error:
            raise ValueError(
                f"{key}: {error}" if str(error).startswith(f"{size} pixels") else str(error)
            ) from None


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
    random_init = replace(config, init="random", init_key="", init_prefix="")
    return _measured(yaml.safe_dump(asdict(random_init)), built_for, size)


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
        model = without_memory(lambda: create(config, built_for))
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
                widths = _try(create(config, built_for), size)
        except Exception as problem:
            raise _WrongSizeError(_first_line(problem)) from None
    if len(widths) != 1 or not all(isinstance(width, int) for width in widths):
        outputs = " and ".join(sorted(map(str, widths)))
        raise ValueError(
            f"backbone.args: {config.name} with {dict(config.args)} gives {outputs} "
            "for an image, and one vector is needed; leave out global_pool, features_only and "
            "whatever else changes the output"
        )
    return int(widths.pop())


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
    below = range(size // step * step - (0 if size % step else step), 0, -step)
    above = range((size // step + 1) * step, size + 8 * step, step)
    sizes = {
        _first_that_fits(config, built_for, size, tried)
        for tried in (list(below)[:8], above, [native_size(config.name)])
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
        model = without_memory(lambda: create(config, native_size(config.name)))
    except Exception:
        return 0
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", 0)
    return int(patch[0]) if isinstance(patch, (tuple, list)) else int(patch or 0)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
