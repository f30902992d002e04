"""Tokens of frozen networks and of raw pixels, for the attentive probe."""

import argparse
import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ssl_pretrain.distributed import process_group
from ssl_pretrain.eval import results
from ssl_pretrain.eval.frozen import features, named_features
from ssl_pretrain.eval.frozen.evaluation_split import EvaluationSplit
from ssl_pretrain.eval.runs import Run
from ssl_pretrain.models.timm_networks import architecture
from ssl_pretrain.models.tokens import is_transformer
from ssl_pretrain.parallel import memory
from ssl_pretrain.schema.image_sizes import ImageSize, height_and_width
from ssl_pretrain.views.batch import upload

PATCHES = "patches"
NAME = re.compile(r"patches|prefix|last[1-9]\d*")
ADVICE = "give patches, prefix or last<n>, such as last4"
TokenFunction = Callable[[Tensor], Tensor]  # normalized images to tokens (batch, tokens, dim)


class TokenSequence:
    """The tokens of a backbone that a probe attends to, as a function of normalized images.

    Args:
        backbone: Network that computes the tokens.
        name: "patches" is the patch tokens of the last layer. "prefix" is its class token and
            registers. "last<n>" concatenates each patch's tokens of the last n layers. All tokens
            are after the final norm, if the network has one.

    Raises:
        ValueError: If there is no such sequence or the backbone does not have it.
    """

    def __init__(self, backbone: nn.Module, name: str = PATCHES):
        if not NAME.fullmatch(name):
            raise ValueError(f"--feature {name}: a probe attends to several tokens; {ADVICE}")
        network: Any = backbone
        self._network, self.name = network, name
        self.num_layers = named_features.num_layers(name)
        named_features.check_tokens_supported(
            network, name, "evaluate its pooled feature with ssl-pretrain linear or knn"
        )
        self.dim: int = self.num_layers * network.token_dim
        # The feature maps of a convolutional network's blocks differ in size.
        depth = len(network.model.blocks) if is_transformer(network.model) else 0
        if name.startswith("last") and self.num_layers > depth:
            raise ValueError(
                f"--feature {name}: {architecture(network.model)} has {depth} layers of"
                f" patches; give {f'at most last{depth}' if depth else 'patches'}"
            )
        if name == "prefix" and not network.num_prefix_tokens:
            raise ValueError(
                f"--feature prefix: {type(network.model).__name__} has no class token and no"
                " registers; give patches"
            )

    def __call__(self, images: Tensor) -> Tensor:
        """Return tokens (batch, tokens, dim) of images (batch, channels, height, width)."""
        if self.num_layers > 1:
            tokens = self._network.tokens(images, layers=range(-self.num_layers, 0))
            return torch.cat([layer.patches for layer in tokens.intermediate], dim=2)
        tokens = self._network.tokens(images)
        return tokens.prefix if self.name == "prefix" else tokens.patches

    def count(self, image_size: ImageSize) -> int:
        """Return the number of tokens of an image of `image_size` pixels."""
        if self.name == "prefix":
            return int(self._network.num_prefix_tokens)
        rows, columns = self._network.grid(image_size)
        return int(rows * columns)

    def describe(self, image_size: ImageSize) -> str:
        """Describe the tokens, as an entry of the saved protocol."""
        rows, columns = self._network.grid(image_size)
        kind = f"{rows} x {columns} patch tokens of the last layer"
        if self.name == "prefix":
            kind = f"{self.count(image_size)} class token and registers of the last layer"
        elif self.num_layers > 1:
            kind = f"{rows} x {columns} patch tokens of the last {self.num_layers} layers"
        return f"{kind} after the final norm, if the network has one, {self.dim} numbers each"


def sequence_name(text: str) -> str:
    """Return `text` if it names a sequence of tokens. Used as the `type` of an argparse option."""
    if not NAME.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a sequence of tokens; {ADVICE}")
    return text


def _pixel_patch_side(run: Run) -> int:
    """Return the side of the pixel patches. There are about as many of them as patch tokens.

    The backbone's `patch_size` would not do, because it can be larger than a small image.
    """
    backbone: Any = run.backbone
    rows = int(backbone.grid(run.image_size)[0])
    return max(1, height_and_width(run.image_size)[0] // rows)


def pixel_patches(
    run: Run, split: EvaluationSplit, offset: features.Offset = (0, 0)
) -> tuple[Tensor, Tensor]:
    """Return pixels in [0, 1] by patch, (n, patches, C * side * side), and the labels."""
    side, batches = _pixel_patch_side(run), []
    for images, labels in split.batches():
        pixels = upload(features.shift(images, *offset), run.device).float().div_(255)
        patches = nn.functional.unfold(pixels, side, stride=side).transpose(1, 2)
        batches.append((patches, labels))
    return features.concatenate(batches, run.device)


def embedders(
    run: Run, train: EvaluationSplit, rows: tuple[str, ...], feature: str = PATCHES
) -> list[tuple[str, features.SplitEmbedder]]:
    """Return the name and the token embedder of each row of the table, raw pixels first."""
    raw: list[tuple[str, features.SplitEmbedder]] = []
    if "raw" in rows:
        raw = [("raw pixels", partial(pixel_patches, run))]
    return raw + [
        (name, partial(features.extract, TokenSequence(backbone, feature)))
        for name, backbone in features.networks(run, train, rows)
    ]


def check_memory(
    run: Run, num_train: int, num_test: int, rows: tuple[str, ...], feature: str = PATCHES
) -> None:
    """Print how much memory the tokens take and how much is free.

    Raises:
        ValueError: If the tokens do not fit, or the backbone does not have them.
    """
    sequence = TokenSequence(run.backbone, feature)
    side = _pixel_patch_side(run)
    num_channels = run.config.views.num_channels
    height, width = height_and_width(run.image_size)
    raw_shape = ((height // side) * (width // side), num_channels * side**2)
    shapes = [
        raw_shape if row == "raw" else (sequence.count(run.image_size), sequence.dim)
        for row in rows
    ]
    num_tokens, dim = max(shapes, key=math.prod)
    # Concatenating the batches of a split copies them, so the larger split is in memory twice.
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
