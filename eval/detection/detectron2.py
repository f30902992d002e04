"""A ResNet's weights under the names of Detectron2's own, for the published protocol of MoCo there.

Detectron2 reads a pickle of {"model", "__author__", "matching_heuristics"}: this file writes one, and nothing of this project
reads a pickle. In the config of the detector: INPUT.FORMAT RGB, MODEL.RESNETS.STRIDE_IN_1X1 False, MODEL.BACKBONE.FREEZE_AT 0,
MODEL.RESNETS.NORM SyncBN, MODEL.PIXEL_MEAN and PIXEL_STD as `pixels` gives them.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor, nn

NORM = {1: "conv1.norm", 2: "conv2.norm", 3: "conv3.norm"}


def names(weights: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """timm's ResNet weights under Detectron2's names: stem.conv1, res2.0.conv1.norm, res2.0.shortcut, ...

    Raises:
        ValueError: a key that a plain bottleneck ResNet does not have.
    """
    renamed = {}
    for key, value in weights.items():
        if key.endswith("num_batches_tracked"):
            continue
        renamed[_name(key)] = value.detach().cpu().float().numpy()
    return renamed


def _name(key: str) -> str:
    stem = re.fullmatch(r"(conv1|bn1)\.(\w+)", key)
    if stem:
        return f"stem.conv1.{stem[2]}" if stem[1] == "conv1" else f"stem.conv1.norm.{stem[2]}"
    block = re.fullmatch(r"layer([1-4])\.(\d+)\.(conv[123]|bn[123]|downsample\.[01])\.(\w+)", key)
    if block is None:
        raise ValueError(
            f"Detectron2 has no place for {key!r}: the export is of ResNets 50, 101 and 152 with the ImageNet stem"
        )
    stage, number, part, entry = int(block[1]) + 1, block[2], block[3], block[4]
    if part.startswith("downsample"):
        part = "shortcut" if part.endswith("0") else "shortcut.norm"
    elif part.startswith("bn"):
        part = NORM[int(part[2])]
    return f"res{stage}.{number}.{part}.{entry}"


def export(backbone: nn.Module, path: Path) -> int:
    """Writes the file that MODEL.WEIGHTS of a Detectron2 config takes; returns the number of its arrays.

    Raises:
        ValueError: the backbone is not a bottleneck ResNet with the ImageNet stem.
    """
    stem = getattr(backbone, "conv1", None)
    if (
        not isinstance(stem, nn.Conv2d)
        or stem.kernel_size != (7, 7)
        or not hasattr(backbone.get_submodule("layer1.0"), "conv3")
    ):
        raise ValueError(
            "--export-detectron2: Detectron2's R_50_C4 is a bottleneck ResNet with a 7x7 stem; this backbone is another network"
        )
    model = names(backbone.state_dict())
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        pickle.dump(
            {"model": model, "__author__": "ssl_pretrain", "matching_heuristics": True}, file
        )
    return len(model)


def pixels(mean: Sequence[float], std: Sequence[float]) -> str:
    """The lines of a Detectron2 config that say how images were normalized."""
    values = {"PIXEL_MEAN": mean, "PIXEL_STD": std}
    return "\n".join(
        f"MODEL.{name} [{', '.join(f'{255 * value:.3f}' for value in each)}]"
        for name, each in values.items()
    )
