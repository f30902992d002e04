"""Features of a backbone by name: its pooled output, or parts of its tokens.

- "pooled" is the backbone's own output, the default of every evaluation.
- "prefix" is the class token and the registers of the last layer, concatenated.
- "patch_mean" is the mean of the patches of the last layer, or of a feature map's positions.
- "cls_mean" is the class token and the mean of the patches, as DINO uses for ViT-B.
- "last<n>" is the class tokens of the last n layers, as DINO uses for ViT-S with n = 4.

All tokens are after the network's final norm.
"""

import argparse
import re
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ssl_pretrain.models.timm_networks import architecture
from ssl_pretrain.models.tokens import is_transformer

POOLED = "pooled"
NAME = re.compile(r"pooled|prefix|patch_mean|cls_mean|last[1-9]\d*")
ADVICE = "give pooled, prefix, patch_mean, cls_mean or last<n>, such as last4"
VIT_SMALL_DIM = 384  # token width of a ViT-S
VitFeature = Literal["pooled", "dino", "class_token"]


class Feature:
    """A feature of a backbone, as a function of normalized images.

    Args:
        backbone: Network that computes the feature.
        name: Name of the feature, described above.

    Raises:
        ValueError: If there is no such feature or the backbone does not have it.
    """

    def __init__(self, backbone: nn.Module, name: str):
        check_name(name)
        network: Any = backbone
        self._network, self.name = network, name
        self.num_layers = num_layers(name)
        if name == POOLED:
            self.feature_dim: int = network.feature_dim
            return
        self._check_tokens()
        num_vectors = {"prefix": network.num_prefix_tokens, "patch_mean": 1, "cls_mean": 2}
        self.feature_dim = num_vectors.get(name, self.num_layers) * network.token_dim

    def _check_tokens(self) -> None:
        model = self._network.model
        kind, needs_class = type(model).__name__, self.name not in ("prefix", "patch_mean")
        check_tokens_supported(self._network, self.name, "give --feature pooled")
        if needs_class and getattr(model, "cls_token", None) is None:
            raise ValueError(
                f"--feature {self.name}: {kind} has no class token; give --feature pooled"
            )
        if self.name == "prefix" and not self._network.num_prefix_tokens:
            raise ValueError(
                f"--feature prefix: {kind} has no class token and no registers; give --feature"
                " pooled"
            )
        if self.name.startswith("last") and self.num_layers > len(model.blocks):
            raise ValueError(
                f"--feature {self.name}: {architecture(model)} has {len(model.blocks)} layers; give"
                f" at most last{len(model.blocks)}"
            )

    def __call__(self, images: Tensor) -> Tensor:
        """Return features (batch, feature_dim) of images (batch, channels, height, width)."""
        if self.name == POOLED:
            return self._network(images)
        if self.name.startswith("last"):
            layers = range(-self.num_layers, 0)
            tokens = self._network.tokens(images, layers=layers)
            return torch.cat([layer.prefix[:, 0] for layer in tokens.intermediate], dim=1)
        tokens = self._network.tokens(images)
        if self.name == "prefix":
            return tokens.prefix.flatten(1)
        mean = tokens.patches.mean(dim=1)
        return mean if self.name == "patch_mean" else torch.cat([tokens.prefix[:, 0], mean], dim=1)

    def __str__(self) -> str:
        description = {
            POOLED: "pooled output of the backbone",
            "prefix": "class token and registers of the last layer",
            "patch_mean": "mean patch token of the last layer",
            "cls_mean": "class token and mean patch token of the last block",
            "last1": "class token of the last block",
        }.get(self.name, f"class tokens of the last {self.num_layers} blocks")
        return f"{description}, {self.feature_dim} numbers"


def num_layers(name: str) -> int:
    """Return the number of layers of a feature, which is n for last<n> and else 1."""
    return int(name.removeprefix("last")) if name.startswith("last") else 1


def network_of_feature(backbone: nn.Module, name: str) -> Any:
    """Return the function that computes a feature. For pooled features it is the backbone."""
    return backbone if name == POOLED else Feature(backbone, name)


def published_feature_name(vit_feature: VitFeature, backbone: nn.Module) -> str:
    """Return the name of the feature that a published linear protocol reads.

    Args:
        vit_feature: Feature of a ViT with a class token. "dino" is the one of DINO's README, which
            depends on the network's size. Other networks have their pooled output.
        backbone: Network to evaluate.
    """
    model: Any = backbone.model
    if vit_feature == "pooled" or not is_transformer(model) or model.cls_token is None:
        return POOLED
    if vit_feature == "class_token":
        return POOLED if model.global_pool == "token" else "last1"
    if model.embed_dim > VIT_SMALL_DIM:
        return "cls_mean"
    return f"last{min(4, len(model.blocks))}"


def check_tokens_supported(backbone: Any, name: str, remedy: str) -> None:
    """Raise ValueError unless the tokens or the feature map of the backbone can be computed."""
    if problem := backbone.find_token_problem():
        raise ValueError(f"--feature {name}: {problem}; {remedy}")


def check_name(name: str) -> None:
    """Raise ValueError unless this is the name of a feature."""
    if not NAME.fullmatch(name):
        raise ValueError(f"--feature {name}: is not a feature; {ADVICE}")


def feature_name(text: str) -> str:
    """Return `text` if it is the name of a feature. Used as the `type` of an argparse option."""
    if not NAME.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a feature; {ADVICE}")
    return text


OPTION: dict[str, dict[str, Any]] = {
    "--feature": {
        "type": feature_name,
        "default": POOLED,
        "metavar": "NAME",
        "help": (
            "pooled (default), or of the tokens: prefix (class token and registers), patch_mean,"
            " cls_mean (class token and mean patch) or last<n> (class tokens of the last n layers)"
        ),
    },
}
