"""Check that a network takes the images, by size and channels, and measure its features' width.

The network runs on the meta device, which takes no memory and little time. The width is measured
because timm's `num_features` is not always the width of the output.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from functools import lru_cache

import torch
import yaml
from torch import Tensor, nn

from ssl_pretrain.models import custom_network, published_channels
from ssl_pretrain.models.timm_networks import (
    BackboneConfig,
    check_tag,
    create,
    create_on_meta,
    input_channels,
    is_meta_limitation,
    native_size,
)
from ssl_pretrain.schema import image_sizes
from ssl_pretrain.schema.image_sizes import ImageSize, describe, height_and_width, simplify
from ssl_pretrain.system.error_text import first_line
from ssl_pretrain.system.user_objects import OBJECT_PREFIX

MAX_CHANNELS = 32  # most channels of an image, as in `data.channels`


def check(config: BackboneConfig, sizes: Mapping[str, ImageSize]) -> None:
    """Run the network on images of every size, on the meta device.

    Args:
        config: The backbone. It is built for the first size.
        sizes: Image sizes in pixels, by configuration key.

    Raises:
        ValueError: If a size does not fit. The message names the key, the size and sizes that fit.
    """
    weights_key = "init_key" if config.init_key else "init_prefix"
    is_file = config.init != "random" and not config.init.startswith("timm:")
    if getattr(config, weights_key) and not is_file:
        raise ValueError(
            f"backbone.{weights_key}: {getattr(config, weights_key)!r} selects weights in a file, "
            f"but backbone.init is {config.init!r}; leave it empty, or give a file there"
        )
    check_tag(config)
    published_channels.check(config)
    for key, size in sizes.items():
        image_sizes.check(key, size)
        try:
            measure_feature_dim(config, next(iter(sizes.values())), size)
        except ValueError as error:
            is_about_size = str(error).startswith(f"{describe(size)} pixels")
            raise ValueError(f"{key}: {error}" if is_about_size else str(error)) from None


def measure_feature_dim(config: BackboneConfig, build_size: ImageSize, size: ImageSize) -> int:
    """Measure the width of the features from the network's output.

    Args:
        config: The backbone.
        build_size: Image size in pixels that the network is built for.
        size: Image size in pixels that it runs on.

    Raises:
        ValueError: If the network cannot be built, does not take the size, or does not return one
            vector per image.
    """
    random_init = replace(config, init="random", init_key="", init_prefix="")
    if config.name.startswith(OBJECT_PREFIX):  # the object can change between two runs
        return _feature_dim(random_init, build_size, size)
    sizes = height_and_width(build_size), height_and_width(size)
    return _cached_feature_dim(yaml.safe_dump(asdict(random_init)), *sizes)


@lru_cache(maxsize=256)
def _cached_feature_dim(
    config_yaml: str, build_size: tuple[int, int], size: tuple[int, int]
) -> int:
    config = BackboneConfig(**yaml.safe_load(config_yaml))
    return _feature_dim(config, simplify(build_size), simplify(size))


def _feature_dim(config: BackboneConfig, build_size: ImageSize, size: ImageSize) -> int:
    try:
        return _measure(config, build_size, size)
    except _WrongSizeError as error:
        if channels := _find_channels(config, build_size, size):
            raise ValueError(_describe_wrong_channels(config, channels)) from None
        raise ValueError(_describe_wrong_size(config, build_size, size, str(error))) from None


class _WrongSizeError(Exception):
    """The network does not take images of this size. The message is the first line of `error`."""

    def __init__(self, error: Exception):
        super().__init__(first_line(error).rstrip("."))


def _measure(config: BackboneConfig, build_size: ImageSize, size: ImageSize) -> int:
    """Measure the width of the features, or raise `_WrongSizeError`."""
    try:
        model = create_on_meta(lambda: create(config, build_size))
    except ValueError:
        raise
    except Exception as error:
        raise _WrongSizeError(error) from None
    try:
        widths = _output_widths(model, size)
    except Exception as error:
        if not is_meta_limitation(error) or next(model.parameters()).device.type != "meta":
            raise _WrongSizeError(error) from None
        try:
            with torch.random.fork_rng(devices=[]):
                widths = _output_widths(create(config, build_size), size)
        except Exception as error_on_cpu:
            raise _WrongSizeError(error_on_cpu) from None
    if len(widths) != 1 or not all(isinstance(width, int) for width in widths):
        if custom_network.is_custom(config.name):
            raise ValueError(
                f"backbone.name: {config.name} returns {' and '.join(sorted(map(str, widths)))} "
                "for an image, but one vector is needed; average over height and width in forward"
            )
        raise ValueError(
            f"backbone.args: {config.name} with {dict(config.args)} returns "
            f"{' and '.join(sorted(map(str, widths)))} "
            "for an image, but one vector is needed; leave out global_pool, features_only and "
            "whatever else changes the output"
        )
    return int(widths.pop())


def _output_widths(model: nn.Module, size: ImageSize) -> set[int | str]:
    """Return the widths of the output in evaluation mode and in training mode.

    An output that is not one vector per image is described in words.
    """
    device = next(model.parameters()).device
    images = torch.zeros(2, input_channels(model), *height_and_width(size), device=device)
    widths: set[int | str] = set()
    for training in (False, True):
        model.train(training)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            output = model(images)
        if not isinstance(output, Tensor):
            widths.add(f"a {type(output).__name__}")
        elif output.ndim == 2 and len(output) == 2:
            widths.add(output.shape[1])
        else:
            widths.add(f"shape {tuple(output.shape[1:])}")
    return widths


def _find_channels(config: BackboneConfig, build_size: ImageSize, size: ImageSize) -> int:
    """Return another number of channels of images that the network takes, or 0 if there is none.

    Those of its own convolutions are tried, and 3.
    """
    try:
        model = create_on_meta(lambda: create(config, build_size))
    except Exception:
        return 0
    channels = {getattr(layer, "in_channels", 3) for layer in model.modules()}
    for number in sorted(channels.intersection(range(1, MAX_CHANNELS + 1))):
        if number == input_channels(model):
            continue
        try:
            _measure(replace(config, args={**config.args, "in_chans": number}), build_size, size)
        except (_WrongSizeError, ValueError):
            continue
        return number
    return 0


def _describe_wrong_channels(config: BackboneConfig, channels: int) -> str:
    """Describe a network that takes images of other channels than those of the data set."""
    network, remedy = f"backbone.name: {config.name}", "choose another network"
    args = {key: value for key, value in config.args.items() if key != "in_chans"}
    if custom_network.is_custom(config.name):
        remedy = (
            "change its first layer (a function with a parameter in_chans receives data.channels)"
        )
    elif args:
        network, remedy = f"backbone.args: {config.name} with {args}", "change backbone.args"
    return (
        f"{network} takes images of {channels} channels, not of data.channels "
        f"{config.args.get('in_chans', 3)}; {remedy}, or set data.channels={channels}"
    )


def _describe_wrong_size(
    config: BackboneConfig, build_size: ImageSize, size: ImageSize, reason: str
) -> str:
    """Describe why a size does not fit, and name the nearest sizes that fit."""
    patch = _patch_size(config)
    fitting_sizes = [
        fitting
        for candidates in _nearby_sizes(config, size, patch or 32)
        if (fitting := _first_fitting_size(config, build_size, size, candidates))
    ]
    patches = f" (patches of {patch})" if patch else ""
    unique_sizes = {describe(fitting): fitting for fitting in fitting_sizes}
    sizes = ", ".join(map(str, sorted(unique_sizes.values(), key=height_and_width)))
    remedy = f"sizes that fit: {sizes}" if fitting_sizes else "no nearby size fits"
    return (
        f"{describe(size)} pixels do not fit backbone.name {config.name}{patches}: {reason}; "
        f"{remedy}"
    )


def _nearby_sizes(
    config: BackboneConfig, size: ImageSize, step: int
) -> tuple[Iterable[ImageSize], ...]:
    """Return smaller, larger and other sizes, those closest to `size` first."""
    if isinstance(size, int):
        return (
            list(range((size - 1) // step * step, 0, -step))[:8],
            range((size // step + 1) * step, size + 8 * step, step),
            [native_size(config.name)],
        )
    smaller = [side // step * step for side in size]
    larger = [-(-side // step) * step for side in size]
    return (
        [smaller] if min(smaller) > 0 and smaller != list(size) else [],
        [larger] if larger != list(size) else [[side + step for side in larger]],
    )


def _first_fitting_size(
    config: BackboneConfig,
    build_size: ImageSize,
    size: ImageSize,
    candidates: Iterable[ImageSize],
) -> ImageSize:
    """Return the first candidate that the network takes, or 0 if it takes none."""
    for candidate in candidates:
        try:
            _measure(config, candidate if build_size == size else build_size, candidate)
        except (_WrongSizeError, ValueError):
            continue
        return candidate
    return 0


def _patch_size(config: BackboneConfig) -> int:
    """Return the side of a ViT's patches in pixels, or 0 for other networks."""
    try:
        model = create_on_meta(lambda: create(config, native_size(config.name)))
    except Exception:
        return 0
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", 0)
    return int(patch[0]) if isinstance(patch, (tuple, list)) else int(patch or 0)
