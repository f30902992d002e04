"""The reference features and the architecture, by which an exported network is recognized."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ssl_pretrain import rng

REFERENCE, ARGUMENTS = "reference.safetensors", "timm.json"
NUM_IMAGES = 2
# Largest difference as a share of the largest feature. Rounding on another processor differs by a
# hundredth of it, another network by a hundred times as much.
TOLERANCE = 1e-3


def reference_images(size: int) -> Tensor:
    """Return smooth noise, float32 (NUM_IMAGES, 3, size, size) of standard deviation about 1.

    It is the same on every machine.
    """

    def noise(epoch: int, side: int) -> Tensor:
        values = rng.uniform(
            0, epoch, np.arange(NUM_IMAGES), 0, rng.Purpose.SUBSET, 3 * side * side
        )
        return torch.from_numpy(values.reshape(NUM_IMAGES, 3, side, side))

    smooth = nn.functional.interpolate(noise(0, 8), (size, size), mode="bilinear")
    return (4 * (smooth - 0.5) + (noise(1, size) - 0.5)).float()


@torch.no_grad()
def check(model: nn.Module, folder: str | Path) -> None:
    """Raise ValueError unless `model` gives the exported features for the reference images.

    Weights can load strictly into another network, such as those of 12 heads into 6.

    Args:
        model: Maps images to features on the CPU.
        folder: Folder of the export.
    """
    reference = load_file(Path(folder) / REFERENCE)
    features, expected = model.eval()(reference["images"]), reference["features"]
    if features.shape != expected.shape:
        raise ValueError(
            f"{folder}: the model gives features {tuple(features.shape)}, the exported one"
            f" {tuple(expected.shape)}; set num_classes=0"
        )
    difference, largest = (features - expected).abs().max().item(), expected.abs().max().item()
    if not difference <= TOLERANCE * largest:
        arguments = json.loads((Path(folder) / ARGUMENTS).read_text())
        facts = ", ".join(f"{key} {value}" for key, value in arguments["facts"].items())
        raise ValueError(
            f"{folder}: the weights loaded, and the features differ by {difference:.2g} where the"
            f" largest is {largest:.2g}, so this is another network than the exported one. That has"
            f" stem {arguments['stem']}, {facts}; build it with {ARGUMENTS}, or by eval.export.load"
        )


def architecture_facts(backbone: nn.Module) -> dict[str, Any]:
    """Return facts that the weights do not tell: heads, epsilons, pooling, positions."""
    model: Any = backbone.model

    def attributes(name: str, kind: type) -> list[Any]:
        values = (getattr(module, name, None) for module in model.modules())
        return sorted({value for value in values if isinstance(value, kind)})

    facts: dict[str, Any] = {"feature_dim": backbone.feature_dim}
    if heads := attributes("num_heads", int):
        facts["num_heads"] = heads[0] if len(heads) == 1 else heads
    if (patch := getattr(getattr(model, "patch_embed", None), "patch_size", None)) is not None:
        facts["patch_size"] = list(patch) if isinstance(patch, Sequence) else patch
    if hasattr(model, "pos_embed"):
        positions = model.pos_embed
        facts["positions"] = list(positions.shape) if isinstance(positions, Tensor) else None
    if hasattr(model, "cls_token"):
        facts["class_token"] = model.cls_token is not None
    if hasattr(model, "global_pool"):
        pool = model.global_pool
        module_type = getattr(pool, "pool_type", type(pool).__name__)
        facts["pooling"] = pool if isinstance(pool, str) else module_type
    facts["norm_eps"] = attributes("eps", float)
    return facts
