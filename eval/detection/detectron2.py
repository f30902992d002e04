"""Export a ResNet to Detectron2, which can fine-tune it by MoCo's published protocol.

Detectron2 reads weights from a pickled dict with the keys "model", "__author__" and
"matching_heuristics", which this module writes. The config of the detector needs INPUT.FORMAT RGB,
MODEL.RESNETS.STRIDE_IN_1X1 False, MODEL.BACKBONE.FREEZE_AT 0, MODEL.RESNETS.NORM SyncBN, and the
lines of `pixel_config`.
"""

import pickle
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor, nn

STEM_LAYERS = {"conv1": "conv1", "bn1": "conv1.norm"}
BLOCK_LAYERS = {
    **{f"conv{number}": f"conv{number}" for number in (1, 2, 3)},
    **{f"bn{number}": f"conv{number}.norm" for number in (1, 2, 3)},
    "downsample.0": "shortcut",
    "downsample.1": "shortcut.norm",
}


def rename_weights(weights: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Return timm's ResNet weights under Detectron2's names, such as res2.0.conv1.norm.weight.

    Raises:
        ValueError: If one of the weights does not belong to a plain bottleneck ResNet.
    """
    return {
        detectron2_name(key): value.detach().cpu().float().numpy()
        for key, value in weights.items()
        if not key.endswith("num_batches_tracked")
    }


def detectron2_name(key: str) -> str:
    """Return Detectron2's name for one of timm's weights.

    Raises:
        ValueError: If the weight does not belong to a plain bottleneck ResNet.
    """
    stem = re.fullmatch(r"(conv1|bn1)\.(\w+)", key)
    if stem:
        return f"stem.{STEM_LAYERS[stem[1]]}.{stem[2]}"
    block = re.fullmatch(r"layer([1-4])\.(\d+)\.(conv[123]|bn[123]|downsample\.[01])\.(\w+)", key)
    if block is None:
        raise ValueError(
            f"--export-detectron2: Detectron2 has no weight for {key!r}; "
            "give a ResNet-50, 101 or 152 with the ImageNet stem"
        )
    return f"res{int(block[1]) + 1}.{block[2]}.{BLOCK_LAYERS[block[3]]}.{block[4]}"


def export(backbone: nn.Module, path: Path) -> int:
    """Write the file for MODEL.WEIGHTS of a Detectron2 config, and return its number of arrays.

    Raises:
        ValueError: If the backbone is not a bottleneck ResNet with the ImageNet stem.
    """
    stem = getattr(backbone, "conv1", None)
    has_imagenet_stem = isinstance(stem, nn.Conv2d) and stem.kernel_size == (7, 7)
    if not has_imagenet_stem or not hasattr(backbone.get_submodule("layer1.0"), "conv3"):
        raise ValueError(
            "--export-detectron2: Detectron2's R_50_C4 is a bottleneck ResNet with a 7x7 stem, but "
            "this backbone is a different network; give a run of resnet50"
        )
    model = rename_weights(backbone.state_dict())
    content = {"model": model, "__author__": "ssl_pretrain", "matching_heuristics": True}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        pickle.dump(content, file)
    return len(model)


def check_channels(num_channels: int) -> None:
    """Raise ValueError unless images have three channels, as Detectron2 reads them."""
    if num_channels != 3:
        raise ValueError(
            f"--export-detectron2: Detectron2 reads RGB images, and this backbone takes "
            f"{num_channels} channel{'s' if num_channels > 1 else ''} (data.channels); train the "
            "detector here, without this option"
        )


def pixel_config(mean: Sequence[float], std: Sequence[float]) -> str:
    """Return the lines of a Detectron2 config with the mean and deviation of pixels in [0, 255]."""
    return "\n".join(
        f"MODEL.{name} [{', '.join(f'{255 * value:.3f}' for value in values)}]"
        for name, values in (("PIXEL_MEAN", mean), ("PIXEL_STD", std))
    )
