"""Write a backbone as a folder that `transformers.AutoModel.from_pretrained` loads.

ViT, DINOv2, I-JEPA, ResNet, ConvNeXt and ConvNeXt V2 become transformers' own classes, as far as
they have the same operations. transformers itself is not needed to write them.
"""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from ssl_pretrain.eval.exporting import transformers_convnets, transformers_vit
from ssl_pretrain.eval.exporting.transformers_mapping import MappedNetwork
from ssl_pretrain.schema.image_sizes import ImageSize, height_and_width

FOLDER_NAME = "transformers"
RESAMPLING = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers


def find_problem(model: nn.Module, image_size: ImageSize) -> str:
    """Return what transformers does not have of this network, or an empty string if it maps."""
    if hasattr(model, "blocks"):
        return transformers_vit.find_vit_problem(model, image_size)
    return transformers_convnets.find_convnet_problem(model)


def map_network(model: nn.Module, image_size: ImageSize) -> MappedNetwork:
    """Return the network of transformers with the weights of this one, which maps."""
    if hasattr(model, "blocks"):
        return transformers_vit.map_vit(model, image_size)
    return transformers_convnets.map_convnet(model)


def write(folder: Path, model: nn.Module, view: dict[str, Any]) -> str:
    """Write config.json, model.safetensors and preprocessor_config.json.

    Args:
        folder: New folder.
        model: Network of timm that maps.
        view: The entry `input` of the export's arguments.

    Returns:
        The Python expression of the features, from `model` and its `outputs`.
    """
    network = map_network(model, view["size"])
    folder.mkdir()
    weights = {
        key: value.detach().cpu().contiguous().clone() for key, value in network.weights.items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": [network.class_name],
        "model_type": network.model_type,
        **network.config,
        "dtype": "float32",
    }
    _write_json(folder / "config.json", config)
    if not find_processor_problem(view):
        _write_json(folder / "preprocessor_config.json", _processor_config(view))
    return network.feature_code


def find_processor_problem(view: dict[str, Any]) -> str:
    """Return why transformers' image processor cannot do the transform, or an empty string."""
    height, width = height_and_width(view["size"])
    if view["channels"] != 3:
        return f"its image processors read color images, and these have {view['channels']} channels"
    if view["range"]:
        return "its image processors know no range of values (data.range)"
    if height != width:
        return "its image processors resize by the shorter side, which suits only square views"
    return ""


def _processor_config(view: dict[str, Any]) -> dict[str, Any]:
    height, width = height_and_width(view["size"])
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": round(height / view["crop_ratio"])},
        "resample": RESAMPLING[view["interpolation"]],
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": view["mean"],
        "image_std": view["std"],
    }


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
