"""Suggest a configuration for a data set from measurements of its images."""

import json

import numpy as np

from ssl_pretrain.data.image_source import Source
from ssl_pretrain.data.source_report import ImageStatistics
from ssl_pretrain.data.sources import DataConfig

_SIZES = (16, 32, 64, 96, 128, 160, 224)  # candidate sizes of the crops, in pixels
_MAX_CIFAR_SIZE = 64  # largest crop for which CIFAR-10's recipe is suggested
_MAX_UPSCALING = 1.15  # largest ratio of the crop size to the median of the shorter sides
_IMAGES_SEEN = 40e6  # images seen in all epochs together, as in 800 epochs of CIFAR-10
_CIFAR_RECIPE = {
    "temperature": "0.5",
    "weight_decay": "0.0001",
    "base_lr": "1.0",
    "lr_scaling": "linear",
    "lr_reason": "from SimCLR for CIFAR-10, like the temperature, weight decay and colors",
    "backbone": "resnet18",
    "stem": "small",
    "stem_reason": "no stride in the first layers, because the images are small",
    "strength": "0.4",
    "hue": "0.1",
    "blur": "0.0",
    "max_batch": 512,
}
_IMAGENET_RECIPE = {
    "temperature": "0.1",
    "weight_decay": "0.000001",
    "base_lr": "0.075",
    "lr_scaling": "sqrt",
    "lr_reason": "from SimCLR for batches below 4,096, like the temperature, decay and colors",
    "backbone": "resnet50",
    "stem": "imagenet",
    "stem_reason": "from SimCLR",
    "strength": "0.8",
    "hue": "0.2",
    "blur": "0.5",
    "max_batch": 1024,
}

_TEMPLATE = """\
# a starting point, to be saved as my.yaml
method:
  name: simclr
  temperature: {temperature}
backbone:
  name: {backbone}
  stem: {stem}    # {stem_reason}
data:
  source: {source}
  root: {root}{split_keys}
{value_range}  num_workers: {num_workers}    # processes per rank; {workers_reason}
views:
  mean: [{mean}]    # measured on {num_measured:,} images; SimCLR itself uses pixels in [0, 1]
  std: [{std}]
  crops:
    global:
      size: {size}    # {size_reason}
      flip: 0.5    # 0 if left and right matter, as in digits and text
      jitter: 0.8
      brightness: {strength}
      contrast: {strength}
      saturation: {strength}
      hue: {hue}
      grayscale: 0.2    # 0 if color alone tells images apart
      blur: {blur}
optim:
  name: lars
  base_lr: {base_lr}    # {lr_reason}
  lr_scaling: {lr_scaling}
  weight_decay: {weight_decay}
global_batch_size: {batch}    # {steps} steps per epoch; SimCLR contrasts each image with the others
epochs: {epochs}    # {images_seen:,} images seen; 100 epochs of ImageNet are 128,000,000, \
800 of CIFAR-10 are 40,000,000"""


def suggest_config(config: DataConfig, source: Source, statistics: ImageStatistics) -> str:
    """Return a YAML that `ssl_pretrain.config` loads. Comments give the reasons for its values."""
    num_images = len(source)
    median_side = int(np.median([min(size) for size in statistics.sizes]))
    size = max([_SIZES[0], *(size for size in _SIZES if size <= _MAX_UPSCALING * median_side)])
    size_reason = f"the shorter sides have a median of {median_side} pixels"
    if size > median_side:
        size_reason += "; smaller crops are too small for the strides of a backbone"
    recipe = _CIFAR_RECIPE if size <= _MAX_CIFAR_SIZE else _IMAGENET_RECIPE
    batch = min(num_images, 2 ** int(np.log2(max(num_images / 4, 1))), recipe["max_batch"])
    epochs = int(np.clip(round(_IMAGES_SEEN / num_images, -2), 100, 800))
    value_range = ""
    if statistics.ranges:  # some images have more than 8 bits per channel
        low, high = config.range or statistics.value_range
        reason = "the values that become 0 and 255, excluding the lowest and highest 0.1 %"
        value_range = f"  range: [{low:g}, {high:g}]    # {reason}\n"
    is_digits = config.source == "digits"
    splits = {"train": config.train, "val": config.val}
    return _TEMPLATE.format(
        **recipe,
        source=config.source,
        root=json.dumps(config.root),
        split_keys="".join(
            f"\n  {key}: {json.dumps(value)}" for key, value in splits.items() if value
        ),
        value_range=value_range,
        num_workers=0 if is_digits else config.num_workers,
        workers_reason=(
            "none, as the images are tiny and in memory"
            if is_digits
            else "as many as there are CPU cores per GPU"
        ),
        mean=format_channels(statistics.mean),
        std=format_channels(statistics.std),
        num_measured=len(statistics.sizes),
        size=size,
        size_reason=size_reason,
        batch=batch,
        steps=num_images // batch,
        epochs=epochs,
        images_seen=epochs * num_images,
    )


def format_channels(values: np.ndarray) -> str:
    """Return one number per channel, separated by commas."""
    return ", ".join(f"{value:.4f}" for value in values)
