"""Build what a run needs from its configuration."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import nn

from ssl_pretrain import config as configuration
from ssl_pretrain import rng
from ssl_pretrain.checkpoint import state as checkpoint
from ssl_pretrain.config import RunConfig
from ssl_pretrain.data import loader, sources
from ssl_pretrain.distributed import process_group
from ssl_pretrain.methods.base import Method
from ssl_pretrain.models import backbones
from ssl_pretrain.monitoring.online_knn import OnlineKNN
from ssl_pretrain.parallel import batch_norm, compile_and_checkpoint, memory, parallel_config
from ssl_pretrain.parallel import wrap as parallel
from ssl_pretrain.planning import flops
from ssl_pretrain.step import check_accumulation
from ssl_pretrain.views import color, crops, recipe


def build_method(config: RunConfig, source: sources.Source | None = None) -> Method:
    """Build the method and its backbone on the CPU, initialized from the seed alike on every rank.

    Raises:
        ValueError: The method needs labels and the source has none, or `backbone.init` does not fit.
    """
    image_size = recipe.each(config.views)[0].size
    torch.manual_seed(rng.seed_of(config.seed, 0, 0))
    backbone = backbones.build(config.backbone, image_size)
    notes = checkpoint.initialize(backbone, config.backbone)
    if notes and process_group.is_main():
        print(f"backbone.init: {config.backbone.init}: {'; '.join(notes)}", flush=True)
    method: Method = config.method.build(backbone)
    if method.needs_labels and source is not None:
        sources.require_labels(source, f"method {config.method.name}")
    return method


def images_at_once(method: Method, config: RunConfig, device: torch.device) -> int:
    """Return the micro-batch size per rank: the configured one, or the largest that fits in memory.

    The latter is found by trial and printed. The trial has whole weights; shards leave more room.

    Raises:
        ValueError: Not even the smallest micro-batch fits, or the method's loss does not allow micro-batches.
    """
    share = config.global_batch_size // process_group.world_size()
    images = configuration.part_size(config, process_group.world_size())
    if images is None:
        group = parallel_config.bn_group_images(config.parallel, config.global_batch_size)
        multiple = 1 if not batch_norm.statistics(method) else min(group, share)
        moved = parallel.to_device(method, config.parallel, device)
        again = parallel.recompute(moved, config.parallel)

        def cost(images: int) -> int:
            example = blank_batch(config, images, device)
            return memory.peak(
                lambda: parallel.rehearse(moved, config.parallel, device, example), device
            )

        images, measured = memory.largest_part(share, multiple, cost, memory.available(device))
        for block in again:  # `wrap` converts their norms first
            compile_and_checkpoint.keep_again(block)
        if process_group.is_main():
            print(
                f"local_batch_size: auto took {images} of {share} images at once ({measured})",
                flush=True,
            )
    if images < share:
        check_accumulation(method, config.parallel)
    return images


def wrap(method: Method, config: RunConfig, images: int, device: torch.device) -> nn.Module:
    """Move the method to its device, distribute it over the ranks, and warm it up with blank images.

    Args:
        images: Micro-batch size per rank.
    """
    example = blank_batch(config, images, device)
    return parallel.wrap(
        method,
        config.parallel,
        images=images,
        global_batch_size=config.global_batch_size,
        device=device,
        example=example,
    )


def blank_batch(config: RunConfig, images: int, device: torch.device) -> loader.Batch:
    labels = torch.zeros(images, dtype=torch.int64, device=device)
    dtype = parallel.view_dtype(config.parallel, device)
    blank = [
        torch.zeros(images, 3, crop.size, crop.size, dtype=dtype, device=device)
        for crop in recipe.each(config.views)
    ]
    return loader.Batch(parallel.place(blank, config.parallel, device), labels, labels)


def flops_per_image(config: RunConfig) -> float:
    """Count the floating-point operations of a training step per image, on the meta device."""
    meta = torch.device("meta")
    return flops.per_image(
        parallel.to_device(configuration.method_on_meta(config), config.parallel, meta),
        blank_batch(config, 2, meta),
    )


def online_knn(config: RunConfig, batches: loader.Loader, device: torch.device) -> OnlineKNN:
    """Build the k-NN monitor on training images, transformed as in evaluations."""
    settings, source = config.evaluation, batches.source
    size = settings.image_size or recipe.each(config.views)[0].size
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
            views = [color.normalize(pixels.to(device), config.views.mean, config.views.std)]
            yield parallel.place(views, config.parallel, device)[0], labels

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
        config.online, normalized, source.labels, order, batches.steps_per_epoch, device, pixels
    )
