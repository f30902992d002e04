"""Tokens of networks that output feature maps, such as a ResNet. Each position is a token."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ssl_pretrain.models.timm_networks import architecture, input_channels
from ssl_pretrain.schema.image_sizes import ImageSize, height_and_width


def compute(model: Any, images: Tensor, layers: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """Return the last feature map and those of `layers`, each (B, rows * columns, channels).

    They are not normalized. A ResNet has no final norm, and a ConvNeXt's is for pooled features.

    Args:
        model: A timm network that computes feature maps.
        images: Images of shape (B, C, height, width).
        layers: Indices of maps in the order of `forward_intermediates`. Negative ones count from
            the end.

    Raises:
        ValueError: If the network outputs no feature map, or a layer does not exist.
    """
    if not layers:
        return _flatten(_last_map(model, images)), []
    if not hasattr(model, "forward_intermediates"):
        raise ValueError(
            f"backbone.name: {architecture(model)} gives no intermediate feature maps; choose a "
            "network with timm's forward_intermediates, such as resnet50"
        )
    last, maps = model.forward_intermediates(images)
    for layer in layers:
        if not -len(maps) <= layer < len(maps):
            raise ValueError(
                f"layer {layer} does not exist: {architecture(model)} has {len(maps)} feature "
                f"maps, numbered 0 to {len(maps) - 1}, or -{len(maps)} to -1"
            )
    last = _checked_map(model, last)
    # The maps are channels first in every network.
    return _flatten(last), [_flatten(maps[layer]) for layer in layers]


def probe(model: Any, image_size: ImageSize) -> Any:
    """Return the output before pooling for black images, or None without `forward_features`.

    The network runs on meta tensors if it can, so that usually nothing is computed.
    """
    if not hasattr(model, "forward_features"):
        return None
    try:
        return _forward_on_meta(_Features(model), image_size)
    except Exception:  # meta tensors can fail in any way, and then the real ones decide
        weight = next(model.parameters())
        shape = (1, input_channels(model), *height_and_width(image_size))
        image = torch.zeros(shape, device=weight.device, dtype=weight.dtype)
        with torch.no_grad(), torch.random.fork_rng(devices=[]), _evaluation_mode(model):
            return _features(model, image)


def describe_problem(features: Any) -> str:
    """Return why the output before pooling is no feature map, or an empty string if it is one.

    A vision transformer outputs tokens (B, N, D), which would pass for a transposed map.
    """
    if features is None:
        return "has no forward_features"
    if not isinstance(features, Tensor):
        kind = f"a {type(features).__name__}"
    elif features.ndim != 4:
        kind = f"features of shape {tuple(features.shape)}"
    else:
        return ""
    return f"gives {kind} instead of a map (B, channels, rows, columns)"


def measure(model: nn.Module, image_size: ImageSize) -> tuple[int, int, int]:
    """Return the channels, rows and columns of the last feature map.

    The network runs on meta tensors, so nothing is computed.
    """
    shape = _forward_on_meta(_LastMap(model), image_size).shape
    return int(shape[1]), int(shape[2]), int(shape[3])


class _Features(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        return _features(self.model, images)


class _LastMap(_Features):
    def forward(self, images: Tensor) -> Tensor:
        return _last_map(self.model, images)


def _forward_on_meta(module: "_Features", image_size: ImageSize) -> Any:
    """Return the output of a module for two images, computed with meta copies of its weights."""
    state = {
        name: torch.empty_like(tensor, device="meta")
        for tensors in (module.named_parameters(), module.named_buffers())
        for name, tensor in tensors
    }
    shape = (2, input_channels(module.model), *height_and_width(image_size))
    images = torch.empty(shape, device="meta", dtype=_dtype(state))
    with torch.no_grad(), torch.random.fork_rng(devices=[]), _evaluation_mode(module):
        return torch.func.functional_call(module, state, images)


def _last_map(model: Any, images: Tensor) -> Tensor:
    """Return the last feature map, channels first."""
    return _checked_map(model, _features(model, images))


def _features(model: Any, images: Tensor) -> Any:
    return model.forward_features(images) if hasattr(model, "forward_features") else None


def _checked_map(model: Any, features: Any) -> Tensor:
    """Return the output of a network channels first, or raise ValueError if it is not a map."""
    if problem := describe_problem(features):
        raise ValueError(
            f"backbone.name: {architecture(model)} {problem}, so this method cannot use it; choose "
            "a vision transformer (vit_*, deit*, eva02*), or a network such as resnet50 or "
            "convnext_tiny"
        )
    return _channels_first(model, features)


def _channels_first(model: Any, features: Tensor) -> Tensor:
    is_channels_last = str(getattr(model, "output_fmt", "NCHW")) == "NHWC"
    return features.permute(0, 3, 1, 2) if is_channels_last else features


def _flatten(features: Tensor) -> Tensor:
    return features.flatten(2).transpose(1, 2)


def _dtype(state: dict[str, Tensor]) -> torch.dtype:
    return next(tensor.dtype for tensor in state.values() if tensor.is_floating_point())


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Turn off what depends on other ranks or on random numbers, such as batch norm and dropout."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, is_training in modes:
            module.training = is_training
