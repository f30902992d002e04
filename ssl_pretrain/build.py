"""Build what a run needs from its configuration."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from ssl_pretrain import config as configuration
from ssl_pretrain import rng
from ssl_pretrain.checkpoint import state as checkpoint
from ssl_pretrain.config import RunConfig
from ssl_pretrain.data import loader, sources
from ssl_pretrain.distributed import process_group
from ssl_pretrain.methods.base import Method
from ssl_pretrain.models import backbones
from ssl_pretrain.monitoring.online_knn import OnlineKNN
from ssl_pretrain.optim import optimizers
from ssl_pretrain.optim.optimizers import OptimConfig
from ssl_pretrain.parallel import batch_norm, compile_and_checkpoint, memory
from ssl_pretrain.parallel.execution import Execution
from ssl_pretrain.parallel.parallel_config import ParallelConfig, bn_group_images
from ssl_pretrain.parallel.wrap import is_sharded, warm_up, wrap
from ssl_pretrain.planning import flops
from ssl_pretrain.step import Stepper, check_accumulation
from ssl_pretrain.views import color, crops, recipe
from ssl_pretrain.views.batch import Batch


def build_method(config: RunConfig, source: sources.Source | None = None) -> Method:
    """Build the method and its backbone on the CPU, initialized from the seed alike on every rank.

    Raises:
        ValueError: The method needs labels and the source has none, or `backbone.init` does not fit.
    """
    image_size = recipe.expand_counts(config.views)[0].size
    torch.manual_seed(rng.seed_of(config.seed, 0, 0))
    backbone = backbones.build(config.backbone, image_size)
    notes = checkpoint.initialize(backbone, config.backbone)
    if notes and process_group.is_main():
        print(f"backbone.init: {config.backbone.init}: {'; '.join(notes)}", flush=True)
    method: Method = config.method.build(backbone)
    if method.needs_labels and source is not None:
        sources.require_labels(source, f"method {config.method.name}")
    return method


def micro_batch_size(method: Method, config: RunConfig, execution: Execution) -> int:
    """Return the configured micro-batch size, or the largest one that fits in memory.

    The latter is found by trial and printed. The trial has whole weights; shards leave more room.

    Raises:
        ValueError: Not even the smallest micro-batch fits, or the method's loss does not allow
            micro-batches.
    """
    world_size = process_group.world_size()
    share = config.global_batch_size // world_size
    images = configuration.part_size(config, world_size)
    if images is None:
        images, measured = _largest_micro_batch(method, config, execution, share)
        if process_group.is_main():
            print(
                f"micro_batch_size: auto took {images} of {share} images at once ({measured})",
                flush=True,
            )
    if images < share:
        check_accumulation(method, config.parallel)
    return images


def _largest_micro_batch(
    method: Method, config: RunConfig, execution: Execution, share: int
) -> tuple[int, str]:
    group = bn_group_images(config.parallel, config.global_batch_size)
    multiple = min(group, share) if batch_norm.statistics(method) else 1
    trial = execution.place_module(copy.deepcopy(method), is_sharded(config.parallel))
    compile_and_checkpoint.recompute_activations(trial, config.parallel.activation_checkpointing)

    def measure(images: int) -> int:
        example = blank_batch(config, images, execution)
        return memory.peak(partial(warm_up, trial, execution, example), execution.device)

    return memory.largest_micro_batch(share, multiple, measure, memory.available(execution.device))


def build_run_stepper(method: Method, config: RunConfig, execution: Execution) -> Stepper:
    """Distribute the method over the ranks and build the optimizer, as the configuration says."""
    images = micro_batch_size(method, config, execution)
    return build_stepper(
        method,
        config.parallel,
        config.optim,
        execution,
        seed=config.seed,
        micro_batch_size=images,
        global_batch_size=config.global_batch_size,
        example=blank_batch(config, images, execution),
    )


def build_stepper(
    method: Method,
    parallel_config: ParallelConfig,
    optim_config: OptimConfig,
    execution: Execution,
    *,
    micro_batch_size: int,
    global_batch_size: int,
    example: Batch,
    seed: int = 0,
) -> Stepper:
    """Wrap a method, build its optimizer and return the function that takes optimizer steps.

    Args:
        method: The method, on the CPU.
        parallel_config: How the ranks compute.
        optim_config: The optimizer and its schedule.
        execution: Device and formats.
        micro_batch_size: Images per forward pass on this rank.
        global_batch_size: Images per optimizer step over all ranks.
        example: A micro-batch in the shapes of the run.
        seed: Seed of dropout and drop path.
    """
    model = wrap(
        method,
        parallel_config,
        execution,
        micro_batch_size=micro_batch_size,
        global_batch_size=global_batch_size,
        example=example,
    )
    return Stepper(
        model,
        optimizers.build(optim_config, method),
        parallel_config,
        seed,
        micro_batch_size,
        global_batch_size,
        optim_config,
        execution,
    )


def blank_batch(config: RunConfig, images: int, execution: Execution) -> Batch:
    """Return black images in the shapes of the run, with labels of class 0."""
    numbers = torch.zeros(images, dtype=torch.int64, device=execution.device)
    sizes = [crop.size for crop in recipe.expand_counts(config.views)]
    blank = partial(torch.zeros, dtype=execution.view_dtype, device=execution.device)
    views = [blank(images, 3, size, size) for size in sizes]
    return Batch(execution.place_views(views), numbers, numbers)


def flops_per_image(config: RunConfig) -> float:
    """Count the floating-point operations of a training step per image, on the meta device."""
    execution = Execution.resolve(config.parallel, torch.device("meta"))
    method = execution.place_module(configuration.method_on_meta(config))
    return flops.per_image(method, blank_batch(config, 2, execution))


def online_knn(config: RunConfig, batches: loader.Loader, execution: Execution) -> OnlineKNN:
    """Build the k-NN monitor on training images, transformed as in evaluations."""
    settings, source = config.evaluation, batches.source
    size = settings.image_size or recipe.expand_counts(config.views)[0].size
    transform = partial(
        crops.evaluate,
        size=size,
        crop_ratio=settings.crop_ratio,
        interpolation=settings.interpolation,
    )

    def normalized(numbers: np.ndarray) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for pixels, labels in loader.images(
            source, numbers, transform, 256, 0, config.data.max_replaced
        ):
            views = [
                color.normalize(pixels.to(execution.device), config.views.mean, config.views.std)
            ]
            yield execution.place_views(views)[0], labels

    def pixels(numbers: np.ndarray) -> torch.Tensor:
        return torch.cat(
            [
                found
                for found, _ in loader.images(
                    source, numbers, transform, 256, 0, config.data.max_replaced
                )
            ]
        )

    order = rng.permutation(config.seed, 0, len(source))
    return OnlineKNN(
        config.online,
        normalized,
        source.labels,
        order,
        batches.steps_per_epoch,
        execution.device,
        pixels,
    )
