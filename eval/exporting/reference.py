"""Arguments, reference features and architecture facts that identify an exported network."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ssl_pretrain import rng
from ssl_pretrain.schema.image_sizes import ImageSize, height_and_width

WEIGHTS, REFERENCE_FILE = "model.safetensors", "reference.safetensors"
ARGUMENTS_FILE = "timm.json"
NUM_IMAGES = 2
# Largest accepted difference, relative to the largest feature. Rounding on another processor causes
# a hundredth of this difference, and another network causes a hundred times as much.
TOLERANCE = 1e-3


def read_arguments(folder: Path) -> dict[str, Any]:
    """Return the entries of ARGUMENTS_FILE: the network, its input format and its origin.

    Raises:
        ValueError: If a file of the export is missing, or ARGUMENTS_FILE is damaged.
    """
    files = (WEIGHTS, ARGUMENTS_FILE, REFERENCE_FILE)
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise ValueError(
            f"{folder}: {', '.join(missing)} is missing; give a folder that eval.export wrote"
        )
    try:
        arguments = json.loads((folder / ARGUMENTS_FILE).read_text(encoding="utf-8"))
    except ValueError:  # no JSON, or no UTF-8
        arguments = None
    if not isinstance(arguments, dict):
        raise ValueError(f"{folder / ARGUMENTS_FILE}: is damaged; export again")
    return arguments


def reference_images(size: ImageSize, channels: int = 3) -> Tensor:
    """Return smooth noise, float32 (NUM_IMAGES, C, height, width), with standard deviation near 1.

    The images are the same on every machine.
    """
    shape = height_and_width(size)

    def noise(epoch: int, height: int, width: int) -> Tensor:
        num_values = channels * height * width
        values = rng.uniform(0, epoch, np.arange(NUM_IMAGES), 0, rng.Purpose.SUBSET, num_values)
        return torch.from_numpy(values.reshape(NUM_IMAGES, channels, height, width))

    smooth = nn.functional.interpolate(noise(0, 8, 8), shape, mode="bilinear")
    return (4 * (smooth - 0.5) + (noise(1, *shape) - 0.5)).float()


@torch.no_grad()
def check(model: nn.Module, folder: str | Path) -> None:
    """Raise ValueError unless `model` computes the exported features of the reference images.

    A strict load does not guarantee this. For example, the weights of a network with 12 heads also
    load into one with 6.

    Args:
        model: Maps images to features on the CPU.
        folder: Folder of the export.
    """
    reference = load_file(Path(folder) / REFERENCE_FILE)
    features, reference_features = model.eval()(reference["images"]), reference["features"]
    if features.shape != reference_features.shape:
        raise ValueError(
            f"{folder}: the features of the model have shape {tuple(features.shape)}, but the"
            f" exported features have shape {tuple(reference_features.shape)}; set num_classes=0"
        )
    difference = (features - reference_features).abs().max().item()
    largest_feature = reference_features.abs().max().item()
    if not difference <= TOLERANCE * largest_feature:
        arguments = read_arguments(Path(folder))
        facts = ", ".join(f"{key} {value}" for key, value in arguments["facts"].items())
        raise ValueError(
            f"{folder}: the weights loaded, but the features differ by up to {difference:.2g}, and"
            f" the largest is {largest_feature:.2g}, so this is not the exported network (stem"
            f" {arguments['stem']}, {facts}); build it from {ARGUMENTS_FILE}, or with"
            " eval.export.load"
        )


def architecture_facts(backbone: nn.Module) -> dict[str, Any]:
    """Return architecture facts that weights do not show, such as heads, epsilons and pooling."""
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
        pool_type = getattr(pool, "pool_type", type(pool).__name__)
        facts["pooling"] = pool if isinstance(pool, str) else pool_type
    facts["norm_eps"] = attributes("eps", float)
    return facts
