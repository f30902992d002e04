"""Find the largest micro-batch that fits in memory, by trials on blank images."""

import copy
from collections.abc import Sequence
from functools import partial

import torch

from ssl_pretrain.methods.base import Method
from ssl_pretrain.parallel import activation_checkpointing, batch_norm, memory
from ssl_pretrain.parallel.execution import Execution, ParallelConfig, bn_group_images
from ssl_pretrain.parallel.wrap import shards_weights, warm_up
from ssl_pretrain.views import masks, recipe
from ssl_pretrain.views.batch import Batch, blank_texts
from ssl_pretrain.views.recipe import ViewsConfig


def blank_batch(
    views: ViewsConfig, num_images: int, execution: Execution, text_lengths: Sequence[int] = ()
) -> Batch:
    """Return black images of class 0, masks, and texts of zeros, in the run's shapes and formats.

    Args:
        views: Settings of the views.
        num_images: Number of images.
        execution: Device and formats of the run.
        text_lengths: Number of tokens of each text of an image.
    """
    zeros = partial(torch.zeros, num_images, device=execution.device)
    images = [
        zeros(views.num_channels, crop.height, crop.width, dtype=execution.view_dtype)
        for crop in recipe.crop_per_view(views)
    ]
    indices = zeros(dtype=torch.int64)
    mask_sets = masks.blank(views, num_images, execution.device)
    texts = blank_texts(text_lengths, num_images, execution.device)
    return Batch(execution.place_views(images), indices, indices, mask_sets, texts)


def find_micro_batch_size(
    method: Method,
    config: ParallelConfig,
    views: ViewsConfig,
    execution: Execution,
    *,
    text_lengths: Sequence[int],
    local_batch_size: int,
    global_batch_size: int,
) -> tuple[int, str]:
    """Return the largest micro-batch that fits in memory on every rank, and how it was estimated.

    Forward and backward passes are run on a copy of the method with whole weights. If the run
    shards its weights, more memory remains free than estimated.

    Args:
        method: The method, on the CPU.
        config: Parallel settings of the run.
        views: Settings of the views.
        execution: Device and formats of the run.
        text_lengths: Number of tokens of each text of an image.
        local_batch_size: Images per optimizer step on this rank.
        global_batch_size: Images per optimizer step over all ranks.

    Raises:
        ValueError: If not even the smallest micro-batch fits.
    """
    group_images = bn_group_images(config, global_batch_size)
    divisor = min(group_images, local_batch_size) if batch_norm.statistics(method) else 1
    trial_method = execution.place_module(copy.deepcopy(method), shards_weights(config))
    activation_checkpointing.recompute_activations(trial_method, config.activation_checkpointing)

    def measure_bytes(num_images: int) -> int:
        example = blank_batch(views, num_images, execution, text_lengths)
        return memory.measure_peak_bytes(
            partial(warm_up, trial_method, execution, example), execution.device
        )

    free_bytes = memory.available_bytes(execution.device)
    return memory.largest_micro_batch(local_batch_size, divisor, measure_bytes, free_bytes)
