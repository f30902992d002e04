"""Take steps of shipped configurations on a pretended GPU.

A step is the whole of `Stepper.__call__`: forward pass, targets, loss, backward pass, masked
optimizer step, batch norm's snapshots and `after_step`.
"""

from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from fake_cuda import DEVICE, pretend_cuda
from host_waits import RefuseHostWaits
from launches import count_launches, in_phase
from torch._subclasses.fake_tensor import unset_fake_temporarily
from traffic import Traffic

from ssl_pretrain import config
from ssl_pretrain.config import RunConfig
from ssl_pretrain.config.feasibility import build_method_on_meta
from ssl_pretrain.data.loader import Loader
from ssl_pretrain.distributed import process_group
from ssl_pretrain.optim import optimizers
from ssl_pretrain.optim.schedules import Progress
from ssl_pretrain.parallel import micro_batch
from ssl_pretrain.parallel.execution import Execution, bn_group_images
from ssl_pretrain.step import StepOutput, Stepper, build_stepper
from ssl_pretrain.views import recipe
from ssl_pretrain.views.batch import Batch
from ssl_pretrain.views.color_parameters import draw_colors

CONFIGS = Path(__file__).parents[2] / "configs"
STEPS = [Progress(step, 1000, 10) for step in (500, 501)]
SMALL = sorted([*(path.stem for path in CONFIGS.glob("*_cifar10.yaml")), "simcse_wordnet"])
IMAGENET = sorted(path.stem for path in CONFIGS.glob("*_imagenet.yaml"))


def load(stem: str, *overrides: str) -> RunConfig:
    """Return a shipped configuration, uncompiled, with any number of GPUs."""
    return config.load(
        CONFIGS / f"{stem}.yaml",
        ["parallel.compile=false", "launch.gpus_per_node=0", *overrides],
    )


def build(run: RunConfig, num_micro_batches: int = 1) -> tuple[Stepper, Batch]:
    """Return the stepper of one rank and its batch. Call it inside `pretend_cuda`."""
    local_batch_size = run.global_batch_size // process_group.world_size()
    if num_micro_batches > 1 and run.parallel.bn_group_images == "global":
        # On one rank, a batch norm group cannot be larger than a micro-batch.
        group_images = local_batch_size // num_micro_batches
        run = replace(run, parallel=replace(run.parallel, bn_group_images=group_images))
    execution = Execution.resolve(run.parallel, DEVICE)
    with unset_fake_temporarily():  # some networks read numbers from tensors while they are built
        method = build_method_on_meta(run)
    method.to_empty(device=DEVICE)
    micro_batch_size = local_batch_size // num_micro_batches
    text_lengths = config.text_lengths(run)
    stepper = build_stepper(
        method,
        run.parallel,
        run.optim,
        execution,
        micro_batch_size=micro_batch_size,
        global_batch_size=run.global_batch_size,
        example=micro_batch.blank_batch(run.views, micro_batch_size, execution, text_lengths),
    )
    optimizers.set_rates(stepper.optimizer, run.optim, STEPS[0], run.epochs, run.global_batch_size)
    batch = micro_batch.blank_batch(run.views, local_batch_size, execution, text_lengths)
    return stepper, batch


@cache
def launches_per_step(stem: str) -> dict[str, int]:
    """Return the launches of a step by phase, on one GPU that takes one batch norm group.

    Host waits and mixed devices raise an error.
    """
    run = load(stem)
    group_images = bn_group_images(run.parallel, run.global_batch_size)
    run = replace(run, global_batch_size=group_images)
    with pretend_cuda():
        stepper, batch = build(run)
        with count_launches() as color, RefuseHostWaits():
            apply_colors(run)
        take_step(stepper, batch, STEPS[0])  # allocates the optimizer's state
        with count_launches() as counter:
            loss = stepper.method.loss
            stepper.method.loss = in_phase(counter, "loss", loss)  # type: ignore[method-assign]
            take_step(stepper, batch, STEPS[1])
    return {"color": color.counts["other"], **counter.counts}


def take_step(stepper: Stepper, batch: Batch, progress: Progress = STEPS[0]) -> StepOutput:
    """Take a step, in which host waits and mixed devices raise an error."""
    with RefuseHostWaits():
        return stepper(progress, batch)


def count_traffic(stepper: Stepper, batch: Batch) -> Traffic:
    """Take a step as one of several ranks, and return what the rank sends."""
    with Traffic() as traffic:
        take_step(stepper, batch)
    return traffic


def apply_colors(run: RunConfig, num_images: int = 64) -> list[torch.Tensor]:
    """Color the views of some images with the loader's own code."""
    crops, indices = recipe.crop_per_view(run.views), np.arange(num_images)
    pixels = [
        torch.empty(num_images, 3, crop.size, crop.size, dtype=torch.uint8, device=DEVICE)
        for crop in crops
    ]
    colors = [draw_colors(crop, 0, 0, indices, view) for view, crop in enumerate(crops)]
    loader: Any = SimpleNamespace(
        reader=SimpleNamespace(views=run.views),
        _view_dtype=Execution.resolve(run.parallel, DEVICE).view_dtype,
    )
    return Loader._apply_colors(loader, pixels, colors)
