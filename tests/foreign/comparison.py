"""Real images, our stepper in float64 and differences, for the comparisons with official code."""

import io
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ssl_pretrain.distributed import process_group
from ssl_pretrain.methods.base import Method
from ssl_pretrain.optim.optimizers import OptimConfig
from ssl_pretrain.parallel.execution import Execution, ParallelConfig
from ssl_pretrain.step import Stepper, build_stepper
from ssl_pretrain.views.batch import Batch

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def read_images(count: int, size: int) -> Tensor:
    """Return square, normalized images of imagenet_sample.zip, float64 (count, 3, size, size)."""
    images = []
    with zipfile.ZipFile(Path(os.environ["SSL_PRETRAIN_DATA"]) / "imagenet_sample.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.lower().endswith("jpeg"))
        for name in names[:: len(names) // count][:count]:
            image = Image.open(io.BytesIO(archive.read(name))).convert("RGB")
            images.append(np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)))
    pixels = torch.from_numpy(np.stack(images)).double().permute(0, 3, 1, 2) / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference, relative to the largest entry of `theirs`."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def largest_difference(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]
) -> tuple[float, str]:
    """Return the largest `relative_difference` of a tensor, and the name of the tensor."""
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    return max((relative_difference(ours[name], theirs[name]), name) for name in ours)


def build_float64_stepper(method: Method, recipe: OptimConfig, example: Batch) -> Stepper:
    """Return a stepper whose batch is `example` on each rank."""
    num_images = len(example)
    settings = ParallelConfig(precision="float64", bn_group_images=num_images)
    return build_stepper(
        method,
        settings,
        recipe,
        Execution.resolve(settings, torch.device("cpu")),
        micro_batch_size=num_images,
        global_batch_size=num_images * process_group.world_size(),
        example=example,
    )
