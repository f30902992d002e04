"""Entry points of torch.hub for the backbone in this folder.

    backbone = torch.hub.load(FOLDER, "backbone", source="local")
    transform = torch.hub.load(FOLDER, "transform", source="local")
    features = backbone(transform(image)[None])

`ssl-pretrain export` copies this file. It needs torch, timm and safetensors.
"""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file

dependencies = ["torch", "timm", "safetensors"]
FOLDER = Path(__file__).resolve().parent


def backbone(pretrained: bool = True) -> torch.nn.Module:
    """Return the backbone in evaluation mode, which maps images to features.

    Args:
        pretrained: Load the exported weights. False for random ones.
    """
    arguments = json.loads((FOLDER / "timm.json").read_text())
    model: torch.nn.Module = timm.create_model(
        arguments["architecture"], **arguments["create_model"]
    )
    if arguments["stem"] != "imagenet":
        _shrink_stem(model, has_unit_stride=arguments["stem"] == "small")
    if pretrained:
        model.load_state_dict(load_file(FOLDER / "model.safetensors"), strict=True)
    return model.eval()


def transform() -> Callable[[Any], torch.Tensor]:
    """Return the function that turns an image into the input of the backbone."""
    # Under the plain name, the file of another export in this process would be returned.
    spec = importlib.util.spec_from_file_location(
        f"preprocessing of {FOLDER}", FOLDER / "preprocessing.py"
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"{FOLDER / 'preprocessing.py'} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function: Callable[[Any], torch.Tensor] = module.transform
    return function


def _shrink_stem(model: Any, has_unit_stride: bool) -> None:
    """Omit the max-pooling of a ResNet, and with `has_unit_stride` the stride of its stem too."""
    model.maxpool = torch.nn.Identity()
    if not has_unit_stride:
        return
    if isinstance(model.conv1, torch.nn.Conv2d):
        channels, width = model.conv1.in_channels, model.conv1.out_channels
        model.conv1 = torch.nn.Conv2d(channels, width, 3, padding=1, bias=False)
        return
    for layer in model.conv1.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.stride = (1, 1)
