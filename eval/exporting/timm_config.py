"""Write config.json in the format of timm on the Hugging Face Hub.

`timm.create_model("local-dir:FOLDER", pretrained=True)` reads it. transformers' AutoModel
recognizes it and wraps timm's network.
"""

import json
from pathlib import Path
from typing import Any

from torch import nn

from ssl_pretrain.models.timm_networks import pretrained_cfg
from ssl_pretrain.schema.image_sizes import height_and_width

FILE = "config.json"


def write(folder: Path, model: Any, arguments: dict[str, Any]) -> None:
    """Write the configuration of a network that timm builds.

    Nothing is copied from timm's description of its own weights, such as their license, because
    these are other weights.

    Args:
        folder: Folder of the export.
        model: Network of timm.
        arguments: Content of timm.json.
    """
    view, timms_config = arguments["input"], pretrained_cfg(arguments["architecture"])
    height, width = height_and_width(view["size"])
    builds_for_size = "img_size" in arguments["create_model"]
    model_args = {
        key: value for key, value in arguments["create_model"].items() if key != "num_classes"
    }
    config = {
        "architecture": arguments["architecture"],
        "num_classes": 0,
        "num_features": model.num_features,
        "global_pool": _pooling(model),
        "model_args": model_args,
        "pretrained_cfg": {
            "num_classes": 0,
            "input_size": [view["channels"], height, width],
            "fixed_input_size": builds_for_size and not model_args.get("dynamic_img_size", False),
            "interpolation": view["interpolation"],
            "crop_pct": view["crop_ratio"],
            "crop_mode": "center",
            "mean": view["mean"],
            "std": view["std"],
            "first_conv": timms_config.first_conv,
            "classifier": timms_config.classifier,
        },
    }
    (folder / FILE).write_text(json.dumps(config, indent=2) + "\n")


def _pooling(model: nn.Module) -> str:
    pool = getattr(model, "global_pool", None) or getattr(
        getattr(model, "head", None), "global_pool", ""
    )
    return pool if isinstance(pool, str) else str(getattr(pool, "pool_type", ""))
