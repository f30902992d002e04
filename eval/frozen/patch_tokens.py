"""Tokens of frozen networks and of raw pixels, for the attentive probe."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ssl_pretrain.distributed import process_group
from ssl_pretrain.eval import results
from ssl_pretrain.eval.frozen import features
from ssl_pretrain.eval.frozen.evaluation_split import EvaluationSplit
from ssl_pretrain.eval.runs import Run
from ssl_pretrain.parallel import memory
from ssl_pretrain.views.batch import upload

TokenFunction = Callable[[Tensor], Tensor]  # normalized images to tokens (batch, tokens, dim)


def patch_tokens(backbone: nn.Module) -> TokenFunction:
    """Return the function that computes a backbone's patch tokens after its final norm."""
    network: Any = backbone
    return lambda images: network.tokens(images).patches


def num_patch_tokens(run: Run) -> int:
    """Return the number of patch tokens of an evaluation view."""
    backbone: Any = run.backbone
    rows, columns = backbone.grid(run.image_size)
    return int(rows * columns)


def _pixel_patch_side(run: Run) -> int:
    """Return the side of the pixel patches, which are about as many as the tokens.

    Positions of feature maps may be further apart than the image is wide.
    """
    backbone: Any = run.backbone
    return max(1, run.image_size // int(backbone.grid(run.image_size)[0]))


def describe_tokens(run: Run) -> str:
    """Describe the tokens, as an entry of the saved protocol."""
    backbone: Any = run.backbone
    rows, columns = backbone.grid(run.image_size)
    return (
        f"{rows} x {columns} patch tokens of the last layer after the final norm, if the network"
        f" has one, {backbone.token_dim} numbers each"
    )


def pixel_patches(
    run: Run, split: EvaluationSplit, offset: features.Offset = (0, 0)
) -> tuple[Tensor, Tensor]:
    """Return the pixels of each patch in [0, 1], (n, patches, 3 * side * side), and the labels."""
    side, batches = _pixel_patch_side(run), []
    for images, labels in split.batches():
        pixels = upload(features.shift(images, *offset), run.device).float().div_(255)
        patches = nn.functional.unfold(pixels, side, stride=side).transpose(1, 2)
        batches.append((patches, labels))
    return features.concatenate(batches, run.device)


def embedders(
    run: Run, train: EvaluationSplit, rows: tuple[str, ...]
) -> list[tuple[str, features.SplitEmbedder]]:
    """Return the name and the token embedder of each row of the table, raw pixels first."""
    found: list[tuple[str, features.SplitEmbedder]] = []
    if "raw" in rows:
        found.append(("raw pixels", partial(pixel_patches, run)))
    for name, backbone in features.networks(run, train, rows):
        found.append((name, partial(features.extract, patch_tokens(backbone))))
    return found


def check_memory(run: Run, num_train: int, num_test: int, rows: tuple[str, ...]) -> None:
    """Print how much memory the tokens take and how much is free.

    Raises:
        ValueError: If they do not fit.
    """
    backbone: Any = run.backbone
    raw_dim = 3 * _pixel_patch_side(run) ** 2
    dim = max(raw_dim if row == "raw" else backbone.token_dim for row in rows)
    num_tokens = num_patch_tokens(run)
    # The batches of a split are concatenated, so the larger split is in memory twice.
    num_images = num_train + num_test + max(num_train, num_test)
    num_ranks = process_group.local_world_size() if run.device.type == "cpu" else 1
    needed_bytes = num_ranks * num_images * num_tokens * dim * torch.finfo(torch.float32).bits // 8
    demand = f"{needed_bytes / memory.GIB:.2f} GiB"
    try:
        free_bytes = memory.available_bytes(run.device)
    except ValueError:  # neither CUDA nor Linux
        results.print_progress(f"tokens need up to {demand}; the free memory is unknown here")
        return
    free = f"{free_bytes / memory.GIB:.2f} GiB"
    results.print_progress(f"tokens need up to {demand}; {free} is free")
    if needed_bytes > memory.USABLE_FRACTION * free_bytes:
        raise ValueError(
            f"--protocol cached: {num_tokens} tokens of {dim} numbers for {num_train:,} training"
            f" and {num_test:,} test images need up to {demand}, more than"
            f" {memory.USABLE_FRACTION:.0%} of the {free} free. Give --protocol capi, which"
            " computes them anew in every step, or fewer images (data.subset=N)"
        )
