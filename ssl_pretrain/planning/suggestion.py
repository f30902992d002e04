"""Suggest a configuration for a data set and this machine.

The shipped recipe of the method is the starting point. What depends on the number of images, on
their size and colors, or on the machine is adapted, and each change has a reason.
"""

import json
import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import yaml

from ssl_pretrain import config as configuration
from ssl_pretrain import methods, schema
from ssl_pretrain.config import RunConfig
from ssl_pretrain.data.image_source import Source, require_labels
from ssl_pretrain.data.source_report import ImageStatistics, measure_images
from ssl_pretrain.data.sources import DataConfig
from ssl_pretrain.models import custom_network
from ssl_pretrain.planning import step_time
from ssl_pretrain.schema import presets
from ssl_pretrain.system.user_objects import OBJECT_PREFIX

MIN_IMAGES = 16
MAX_MEASURED_IMAGES = 2000
SIZES = (16, 32, 64, 96, 128, 160, 224)  # candidate sizes of the views, in pixels
MAX_SMALL_SIZE = 64  # largest view for which CIFAR-10's recipe is the base, and largest on a CPU
MAX_UPSCALING = 1.15  # largest ratio of the view to the median of the shorter sides
IMAGES_SEEN = 40e6  # images seen in all epochs together, as in 800 epochs of CIFAR-10
MAX_EPOCHS, MIN_EPOCHS = 800, 100  # without a limit of time
CPU_SECONDS = 900.0  # expected length of a run on a CPU
MIN_CPU_EPOCHS = 20  # a smaller network is chosen rather than fewer epochs
MAX_CPU_BATCH = 256
# Networks for a CPU, from the largest to the smallest: timm's name and the stem.
CPU_NETWORKS = (("resnet18", "small"), ("resnet18", "no_pool"), ("test_resnet", "no_pool"))
EPOCH_KEYS = (  # settings that count epochs of the recipe
    "optim.warmup_epochs",
    "optim.milestones",
    "method.queue_from_epoch",
    "method.teacher_temperature_warmup_epochs",
)
NUM_CHECKPOINTS = 10  # checkpoints and online measurements in a run


@dataclass
class Suggestion:
    """A suggested configuration.

    Attributes:
        tree: The settings, as a YAML has them.
        reasons: One sentence per setting that was chosen, by dotted key.
        expected_seconds: Expected time of the training on this machine.
    """

    tree: dict[str, Any]
    reasons: dict[str, str] = field(default_factory=dict)
    expected_seconds: float = 0.0

    def set(self, key: str, value: Any, reason: str = "") -> None:
        """Set a dotted key, with the reason for its value."""
        *sections, name = key.split(".")
        tree = self.tree
        for section in sections:
            tree = tree.setdefault(section, {})
        tree[name] = value
        if reason:
            self.reasons[key] = reason

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a dotted key, or the default."""
        value = schema.value_at(self.tree, key)
        return default if value is None else value

    def cap(self, key: str, maximum: float, reason: str) -> None:
        """Lower a number to a maximum, with the reason. Do nothing if the key is absent."""
        value = self.get(key)
        if value is not None and value > maximum:
            self.set(key, type(value)(maximum), reason)

    def to_yaml(self) -> str:
        """Return the settings as YAML, with the reasons as comments."""
        return "\n".join(_yaml_lines(self.tree, self.reasons))


def suggest(
    config: DataConfig,
    source: Source,
    *,
    method: str = "simclr",
    backbone: str | None = None,
    epochs: int | None = None,
    max_seconds: float | None = None,
    statistics: ImageStatistics | None = None,
) -> Suggestion:
    """Suggest a configuration for these images on this machine.

    Args:
        config: The data set.
        source: Its training images.
        method: Name of the method, or `package.module` of the user's.
        backbone: Value of `backbone.name`, or None to choose a network.
        epochs: Value of `epochs`, or None to choose the length of the run.
        max_seconds: Longest expected time of the training, by default a quarter of an hour on a
            CPU and no limit on a GPU. A number of epochs may take longer.
        statistics: Measurements of the images, if they exist already.

    Raises:
        ValueError: If there are too few images, none is readable, the method is unknown, or it
            needs labels that the images do not have.
    """
    if len(source) < MIN_IMAGES:
        raise ValueError(
            f"data.root: {source.full_path} has {len(source)} images, which is too few to learn "
            f"from; give {MIN_IMAGES} or more, better thousands"
        )
    on_cpu = not torch.cuda.is_available()
    statistics = statistics or measure_images(source, MAX_MEASURED_IMAGES)
    if not statistics.sizes:
        raise ValueError(f"data.root: no image of {source.full_path} can be read")
    size, size_reason = _choose_size(statistics, on_cpu)
    result, recipe_name = _load_recipe(method, size)
    _describe_data(result, config, statistics)
    _adapt_views(result, size, size_reason, statistics, config)
    _adapt_backbone(result, backbone, on_cpu)
    _adapt_batch(result, len(source), on_cpu)
    result.set("evaluation", {"crop_ratio": 1.0, "k": min(20, len(source) // 4)})
    if configuration.build_method_on_meta(_build(result)).needs_labels:
        require_labels(source, f"method {method}")
    max_seconds = max_seconds or (CPU_SECONDS if on_cpu else math.inf)
    _choose_epochs(result, source, backbone, epochs, max_seconds)
    result.reasons["method.name"] = f"the other settings are those of {recipe_name}"
    configuration.check(_build(result), world_size=1)
    return result


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
    if is_custom:
        methods.find(method)  # raises an error if there is no such method
    data_set = "cifar10" if size <= MAX_SMALL_SIZE else "imagenet"
    name = f"{'simclr' if is_custom else method}_{data_set}"
    path = presets.find(name)
    values = configuration.to_dict(configuration.load(path))
    result = Suggestion({})
    for key in schema.flatten(yaml.safe_load(path.read_text())):
        if key.partition(".")[0] not in ("data", "evaluation", "online", "checkpoint", "launch"):
            result.set(key, schema.value_at(values, key))
    if is_custom:
        result.tree["method"] = {"name": method}
    return result, name


def _describe_data(result: Suggestion, config: DataConfig, statistics: ImageStatistics) -> None:
    """Set the section `data`, and the range of images with more than 8 bits."""
    result.set("data.source", config.source)
    for name in ("root", "train", "val", "args"):
        if value := getattr(config, name):
            result.set(f"data.{name}", value)
    if statistics.ranges:
        low, high = config.range or statistics.value_range
        reason = "the values that become 0 and 255, excluding the lowest and highest 0.1 %"
        result.set("data.range", [float(low), float(high)], reason)
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
    is_gray = np.ptp(statistics.mean) < 1e-4 and np.ptp(statistics.std) < 1e-4
    recipe_size = max(crop["size"] for crop in result.tree["views"]["crops"].values())
    for name, crop in result.tree["views"]["crops"].items():
        key = f"views.crops.{name}"
        scaled_size = max(8, round(crop["size"] * size / recipe_size / 8) * 8)
        if scaled_size != crop["size"]:
            reason = size_reason if crop["size"] == recipe_size else "scaled like the first views"
            result.set(f"{key}.size", scaled_size, reason)
            crop.pop("blur_kernel", None)  # the default is a tenth of the size
        if config.source == "digits":
            result.set(f"{key}.flip", 0.0, "a mirrored 2 is not a 2")
        if is_gray:
            for color in ("saturation", "hue", "grayscale"):
                if crop.get(color):
                    result.set(f"{key}.{color}", 0.0, "the images are gray")


def _adapt_backbone(result: Suggestion, backbone: str | None, on_cpu: bool) -> None:
    """Set the network that the caller wants, or one that suits a CPU."""
    recipe_name = result.get("backbone.name", "resnet50")
    if backbone is None and not on_cpu:
        return
    name = backbone or CPU_NETWORKS[0][0]
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
        size = result.tree["views"]["crops"]["global"]["size"]
        result.set("method.patch_size", size // 4, "a quarter of the view")
        result.set("method.stride", size // 8, "half of a patch")


def _choose_epochs(
    result: Suggestion,
    source: Source,
    backbone: str | None,
    given_epochs: int | None,
    max_seconds: float,
) -> None:
    """Choose the epochs, and on a CPU the network, by measured steps of training."""
    num_images = len(source)
    wanted = int(np.clip(round(IMAGES_SEEN / num_images, -2), MIN_EPOCHS, MAX_EPOCHS))
    wanted = given_epochs or wanted
    recipe = deepcopy(result)
    networks: tuple[tuple[str, str] | None, ...] = (None,)
    if backbone is None and max_seconds < math.inf:
        networks = CPU_NETWORKS
    for network in networks:
        if network is not None:
            name, stem = network
            result.set("backbone.name", name, "the largest network that is fast enough on a CPU")
            result.set("backbone.stem", stem)
        _scale_schedule(result, recipe, wanted)
        seconds = num_images * step_time.seconds_per_image(_build(result), source)
        epochs = max(1, math.floor(min(wanted, max_seconds / seconds)))
        if epochs >= min(MIN_CPU_EPOCHS, wanted):
            break
    epochs = given_epochs or epochs
    _scale_schedule(result, recipe, epochs)
    result.expected_seconds = epochs * seconds
    minutes = max(1, round(result.expected_seconds / 60))
    reason = f"{epochs * num_images:,} images seen, about {minutes} min on this machine"
    result.set("epochs", epochs, reason)
    interval = max(1, epochs // NUM_CHECKPOINTS)
    result.set("checkpoint.every_epochs", interval)
    online = {"knn_every_epochs": interval, "k": min(20, max(1, num_images // 8))}
    result.set("online", online)


def _scale_schedule(result: Suggestion, recipe: Suggestion, epochs: int) -> None:
    """Scale everything that counts epochs with the length of the run."""
    result.set("epochs", epochs)
    ratio = min(1.0, epochs / recipe.get("epochs"))
    reason = f"scaled with the {epochs} epochs"
    for key in EPOCH_KEYS:
        value = recipe.get(key)
        if isinstance(value, list):
            result.set(key, [round(epoch * ratio, 2) for epoch in value], reason)
        elif value:
            result.set(key, type(value)(round(value * ratio, 2)), reason)


def _build(result: Suggestion) -> RunConfig:
    return configuration.from_dict(result.tree, "the suggestion")


def _yaml_lines(tree: Mapping[str, Any], reasons: Mapping[str, str], key: str = "") -> list[str]:
    """Return the lines of a YAML, with the reasons as comments."""
    lines = []
    indent = "  " * (key.count(".") + bool(key))
    for name, value in tree.items():
        full_key = f"{key}.{name}".lstrip(".")
        if isinstance(value, Mapping) and value and full_key != "backbone.args":
            lines += [f"{indent}{name}:", *_yaml_lines(value, reasons, full_key)]
            continue
        comment = f"    # {reasons[full_key]}" if full_key in reasons else ""
        lines.append(f"{indent}{name}: {json.dumps(value)}{comment}")
    return lines
