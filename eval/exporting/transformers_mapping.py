"""Descriptions of a network in the terms of the library transformers."""

from dataclasses import dataclass
from typing import Any

from timm.layers import GELU, GELUTanh, QuickGELU
from torch import Tensor, nn


@dataclass(frozen=True)
class MappedNetwork:
    """A network of transformers that computes the features of one of timm.

    Attributes:
        model_type: Name of the kind of network in config.json.
        class_name: Class that `transformers.AutoModel` builds.
        config: Settings of the network.
        weights: Weights under the names of published checkpoints.
        feature_code: Python expression of the features, from `model` and its `outputs`.
    """

    model_type: str
    class_name: str
    config: dict[str, Any]
    weights: dict[str, Tensor]
    feature_code: str


def activation_name(module: nn.Module) -> str:
    """Return the name of an activation in transformers, or an empty string if it has none."""
    if isinstance(module, nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu_pytorch_tanh"
    if isinstance(module, nn.SiLU):
        return "silu"
    names = {GELU: "gelu", GELUTanh: "gelu_pytorch_tanh", QuickGELU: "quick_gelu"}
    return names.get(type(module), "relu" if isinstance(module, nn.ReLU) else "")


def is_exactly(module: object, *kinds: type) -> bool:
    """Return True if a module is of one of these classes. A subclass may compute something else."""
    return type(module) in kinds
