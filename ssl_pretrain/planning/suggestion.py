"""Suggest a configuration for a data set and this machine.

The shipped recipe of the method is the starting point. What depends on the number of images, on
their size and colors, or on the machine is adapted, and each change has a reason.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ssl_pretrain import config as configuration
from ssl_pretrain import methods, schema
from ssl_pretrain.data.config import DataConfig
from ssl_pretrain.data.image_source import Source, require_labels
from ssl_pretrain.data.source_report import (
    ImageStatistics,
    measure_images,
    with_measured_range,
)
from ssl_pretrain.methods.base import SentenceMethodConfig
from ssl_pretrain.models import custom_network
from ssl_pretrain.planning import recommended_weights, run_length
from ssl_pretrain.planning.suggested_settings import Suggestion
from ssl_pretrain.schema import config_file, presets
from ssl_pretrain.schema.image_sizes import height_and_width
from ssl_pretrain.system.user_objects import OBJECT_PREFIX
from ssl_pretrain.views.recipe import COLOR_OPERATIONS

MIN_IMAGES = 16
# Images whose colors are measured: as many as have this many pixels together, within limits.
MEASURED_PIXELS = 40e6
MIN_MEASURED_IMAGES, MAX_MEASURED_IMAGES = 32, 2000
SIZES = (16, 32, 64, 96, 128, 160, 224)  # candidate sizes of the views, in pixels
MAX_SMALL_SIZE = 64  # largest view for which CIFAR-10's recipe is the base, and largest on a CPU
MAX_UPSCALING = 1.15  # largest ratio of the view to the median of the shorter sides
PHOTO_CROP_RATIO = 0.875  # of the resized image, as in ImageNet's evaluations
CPU_SECONDS = 900.0  # expected length of a run on a CPU
MAX_CPU_BATCH = 256


def suggest(
    config: DataConfig,
    source: Source,
    *,
    method: str = "simclr",
    backbone: str | None = None,
    epochs: int | None = None,
    keep_all_images: bool = False,
    max_seconds: float | None = None,
    statistics: ImageStatistics | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Suggestion:
    """Suggest a configuration for these images on this machine.

    Args:
        config: The data set.
        source: Its training images.
        method: Name of the method, or `package.module` of the user's.
        backbone: Value of `backbone.name`, or None to choose a network.
        epochs: Value of `epochs`, or None to choose the length of the run.
        keep_all_images: True to train on all images of the source, however long one epoch takes.
        max_seconds: Longest expected time of the training, by default a quarter of an hour on a
            CPU and no limit on a GPU. A number of epochs may take longer.
        statistics: Measurements of the images, if they exist already.
        settings: Other settings of the caller, as a tree. They replace what would be chosen.

    Raises:
        ValueError: If there are too few images, none is readable, the method is unknown, or it
            needs labels that the images do not have.
    """
    num_images = len(source)
    if num_images < MIN_IMAGES:
        raise ValueError(
            f"data.root: {source.full_path} has {num_images} images, which is too few to learn "
            f"from; give {MIN_IMAGES} or more, better thousands"
        )
    on_cpu = not torch.cuda.is_available()
    if statistics is None:
        statistics = _measure_images(source)
        ranged = with_measured_range(source, statistics)
        statistics = statistics if ranged is source else _measure_images(ranged)
        source = ranged
    if not statistics.sizes:
        raise ValueError(f"data.root: no image of {source.full_path} can be read")
    size, size_reason = _choose_size(statistics, on_cpu)
    result, recipe_name = _load_recipe(method, size)
    _describe_data(result, config, statistics)
    _adapt_views(result, size, size_reason, statistics, config)
    needs_patches = bool(_masked_crops(result))
    _adapt_backbone(result, backbone, on_cpu and not needs_patches)
    _adapt_patches(result)
    _adapt_batch(result, num_images, on_cpu)
    settings = settings or {}
    result.replace(settings)  # the time depends on them
    if configuration.build_method_on_meta(result.build()).needs_labels:
        require_labels(source, f"method {method}")
    max_seconds = max_seconds or (CPU_SECONDS if on_cpu else math.inf)
    if on_cpu and backbone is None and not needs_patches:
        seconds = run_length.choose_cpu_network(result, source, epochs, max_seconds)
    else:
        seconds = run_length.measure(result, source)
    if epochs is None and not keep_all_images:
        num_images = run_length.choose_num_images(
            result, num_images, MIN_IMAGES, seconds, max_seconds
        )
        _adapt_batch(result, num_images, on_cpu)
    run_length.choose_epochs(result, num_images, seconds, epochs, max_seconds)
    _adapt_evaluation(result, size, statistics)
    result.set("evaluation.k", min(20, num_images // 4))
    if size >= MAX_SMALL_SIZE and not _describe_missing_colors(statistics):
        recommended_weights.recommend(result, num_images)
    result.replace(settings)
    result.reasons["method.name"] = f"the other settings are those of {recipe_name}"
    configuration.check(result.build(), world_size=1)
    return result


def _measure_images(source: Source) -> ImageStatistics:
    """Measure fewer images the larger they are, because decoding them takes the time."""
    statistics = measure_images(source, MIN_MEASURED_IMAGES)
    if not statistics.sizes:
        return statistics
    num_pixels = np.median([width * height for width, height in statistics.sizes])
    num_images = int(np.clip(MEASURED_PIXELS / num_pixels, 0, MAX_MEASURED_IMAGES))
    if num_images <= MIN_MEASURED_IMAGES:
        return statistics
    return measure_images(source, num_images)


def _describe_missing_colors(statistics: ImageStatistics) -> str:
    """Return why the images have no red, green and blue, or an empty string if they have."""
    if statistics.num_channels not in (1, 3):
        return f"the images have {statistics.num_channels} channels"
    is_gray = np.ptp(statistics.mean) < 1e-4 and np.ptp(statistics.std) < 1e-4
    return "the images are gray" if is_gray else ""


def _choose_size(statistics: ImageStatistics, on_cpu: bool) -> tuple[int, str]:
    """Return the size of the largest view, and the reason."""
    side = int(np.median([min(size) for size in statistics.sizes]))
    size = max([SIZES[0], *(size for size in SIZES if size <= MAX_UPSCALING * side)])
    reason = f"the shorter sides have a median of {side} pixels"
    if on_cpu and size > MAX_SMALL_SIZE:
        return MAX_SMALL_SIZE, f"{reason}; larger views take too long on a CPU"
    if size > side:
        reason += "; smaller views are too small for the strides of a backbone"
    return size, reason


def _load_recipe(method: str, size: int) -> tuple[Suggestion, str]:
    """Return the settings of the method's shipped recipe, without its data, and its name."""
    is_custom = method not in methods.names()
    if issubclass(methods.find(method).Config, SentenceMethodConfig):
        raise ValueError(
            f"method.name: {method} takes texts and no images; start from the recipe simcse_wiki"
        )
    data_set = "cifar10" if size <= MAX_SMALL_SIZE else "imagenet"
    name = f"{'simclr' if is_custom else method}_{data_set}"
    path = presets.find(name)
    values = configuration.to_dict(configuration.load(path))
    result = Suggestion({})
    for key in schema.flatten(config_file.read_yaml(path)):
        if key.partition(".")[0] not in ("data", "evaluation", "online", "checkpoint", "launch"):
            result.set(key, schema.value_at(values, key))
    if is_custom:
        result.tree["method"] = {"name": method}
    return result, name


def _describe_data(result: Suggestion, config: DataConfig, statistics: ImageStatistics) -> None:
    """Set the section `data`, and the range of images with more than 8 bits."""
    result.set("data.source", config.source)
    columns = ("image_column", "label_column", "caption_column")
    for name in ("root", "train", "val", *columns, "args"):
        if value := getattr(config, name):
            result.set(f"data.{name}", value)
    if config.subset:
        result.set("data.subset", config.subset)
    if statistics.num_channels != 3:
        result.set("data.channels", statistics.num_channels, "the channels of the images")
    if statistics.ranges:
        limits = config.range or statistics.value_range
        reason = "the values that become 0 and 255, excluding the lowest and highest 0.1 %"
        if len(limits) > 2:
            reason += ", per channel"
        result.set("data.range", list(map(float, limits)), reason)
    in_memory = config.source == "digits" or config.source.startswith(OBJECT_PREFIX)
    if in_memory:
        result.set("data.num_workers", 0, "the images are in memory")
    else:
        result.set("data.num_workers", config.num_workers, "processes per rank that read images")


def _adapt_views(
    result: Suggestion,
    size: int,
    size_reason: str,
    statistics: ImageStatistics,
    config: DataConfig,
) -> None:
    """Scale the views to a size, and adapt colors and normalization to the images."""
    measured = f"measured on {len(statistics.sizes):,} images"
    result.set("views.mean", [round(float(value), 4) for value in statistics.mean], measured)
    std = [max(round(float(value), 4), 0.01) for value in statistics.std]
    result.set("views.std", std, measured)
    missing_colors = _describe_missing_colors(statistics)
    recipe_size = max(crop["size"] for crop in result.tree["views"]["crops"].values())
    for name, crop in result.tree["views"]["crops"].items():
        key = f"views.crops.{name}"
        scaled_size = max(8, round(crop["size"] * size / recipe_size / 8) * 8)
        if scaled_size != crop["size"]:
            reason = size_reason if crop["size"] == recipe_size else "scaled like the first views"
            if name in _masked_crops(result):
                _scale_patches(result, f"{key}.mask.patch_size", crop, scaled_size)
            result.set(f"{key}.size", scaled_size, reason)
            crop.pop("blur_kernel", None)  # the default is a tenth of the size
        if config.source == "digits":
            result.set(f"{key}.flip", 0.0, "a mirrored 2 is not a 2")
        if missing_colors:
            for operation in COLOR_OPERATIONS:
                if crop.get(operation):
                    result.set(f"{key}.{operation}", 0.0, missing_colors)


def _scale_patches(result: Suggestion, key: str, crop: Mapping[str, Any], scaled_size: int) -> None:
    """Set the largest patches of which a scaled view has as many as the recipe's view."""
    num_patches = crop["size"] // crop["mask"]["patch_size"]
    divisors = [side for side in range(1, scaled_size + 1) if scaled_size % side == 0]
    patch_size = max(side for side in divisors if scaled_size // side >= num_patches)
    result.set(key, patch_size, f"{scaled_size // patch_size} patches per side")


def _adapt_backbone(result: Suggestion, backbone: str | None, replace: bool) -> None:
    """Set the network that the caller wants, or replace the recipe's by one that suits a CPU."""
    recipe_name = result.get("backbone.name", "resnet50")
    if backbone is None and not replace:
        return
    name = backbone or run_length.CPU_NETWORKS[0][0]
    result.set("backbone.name", name, "as given" if backbone else "small enough for a CPU")
    section = result.tree["backbone"]
    is_resnet = not custom_network.is_custom(name) and name.startswith(
        ("resnet", "resnext", "wide_resnet", "test_resnet")
    )
    if not is_resnet:
        section.pop("stem", None)
        section.pop("args", None)
    if is_resnet != recipe_name.startswith("resnet"):
        section.pop("args", None)
        section.pop("drop_path", None)
    if "vit" not in name:
        section.pop("drop_path", None)
        result.tree["method"].pop("vit_starts", None)
        result.tree["method"].pop("freeze_patch_embed", None)


def _masked_crops(result: Suggestion) -> dict[str, dict[str, Any]]:
    """Return the crops whose patches are masked, which needs a network with patches."""
    crops = result.tree["views"]["crops"]
    return {
        name: crop
        for name, crop in crops.items()
        if crop.get("mask", {}).get("kind", "none") != "none"
    }


def _adapt_patches(result: Suggestion) -> None:
    """Give the network the patches of the masks."""
    for crop in _masked_crops(result).values():
        name = result.get("backbone.name")
        if not custom_network.is_custom(name):
            reason = "as in the masks"
            result.set("backbone.args.patch_size", crop["mask"]["patch_size"], reason)


def _adapt_batch(result: Suggestion, num_images: int, on_cpu: bool) -> None:
    """Choose the batch, and shrink what counts images or depends on the batch."""
    maximum = MAX_CPU_BATCH if on_cpu else 1024
    largest = max(4, 2 ** int(math.log2(num_images / 4)))
    batch = min(int(result.get("global_batch_size")), largest, maximum)
    steps = num_images // batch
    result.set("global_batch_size", batch, f"{steps} steps per epoch")
    group = result.get("parallel.bn_group_images", "global")
    if group != "global" and (int(group) >= batch or batch % int(group)):
        result.set("parallel.bn_group_images", max(1, batch // 2), "half of the batch")
    if (queue := result.get("method.queue_size")) is not None:
        size = max(batch, min(queue, num_images) // batch * batch)
        result.set("method.queue_size", size, "whole batches, at most one epoch")
    power = 2 ** int(math.log2(num_images))
    result.cap("method.num_prototypes", max(64, power), "no more prototypes than images")
    result.cap("method.freeze_prototypes_steps", steps, "one epoch")
    if result.get("method.name") == "cpc":
        side = min(height_and_width(result.tree["views"]["crops"]["global"]["size"]))
        result.set("method.patch_size", side // 4, "a quarter of the view")
        result.set("method.stride", side // 8, "half of a patch")


def _adapt_evaluation(result: Suggestion, size: int, statistics: ImageStatistics) -> None:
    """Set the share of an image that evaluations see: all of a small one, the center of a photo."""
    side = np.median([min(size) for size in statistics.sizes])
    if side * PHOTO_CROP_RATIO < size:
        result.set("evaluation.crop_ratio", 1.0, "small images are evaluated whole")
    else:
        result.set("evaluation.crop_ratio", PHOTO_CROP_RATIO, "the center, as usual for photos")
