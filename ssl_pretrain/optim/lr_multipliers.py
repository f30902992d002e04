"""Learning rate multipliers by name, by depth in the backbone, and for the patch embedding."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn

MASK_TOKEN = "mask_token"  # name of a method's own mask token
UNMATCHED = "?"  # name of no parameter; timm puts it into the group after the blocks


def compute(
    module: nn.Module,
    *,
    by_prefix: Mapping[str, float],
    layer_decay: float,
    patch_embed_lr_ratio: float,
) -> dict[str, float]:
    """Return the multiplier of every trained parameter of a module, by name.

    Args:
        module: A method, or any network.
        by_prefix: The multipliers of `optim.lr_multipliers`. The longest matching prefix applies.
        layer_decay: Factor from each block of the backbone to the one before it.
        patch_embed_lr_ratio: Multiplier of the patch embedding.

    Raises:
        ValueError: If a prefix matches no parameter, or a setting needs blocks or a patch embedding
            that the module does not have.
    """
    multipliers = {name: 1.0 for name, p in module.named_parameters() if p.requires_grad}
    if layer_decay != 1:
        for name, exponent in layers_to_the_end(module, layer_decay).items():
            multipliers[name] *= layer_decay**exponent
    if patch_embed_lr_ratio != 1:
        names = [name for name in multipliers if "patch_embed" in name]
        if not names:
            raise ValueError(
                f"optim.patch_embed_lr_ratio: {patch_embed_lr_ratio:g} is for networks with a "
                "patch embedding, and no trained parameter has patch_embed in its name; set it to 1"
            )
        for name in names:
            multipliers[name] *= patch_embed_lr_ratio
    _check_prefixes(by_prefix, multipliers)
    for name in multipliers:
        if prefixes := [prefix for prefix in by_prefix if _starts_with(name, prefix)]:
            multipliers[name] *= by_prefix[max(prefixes, key=len)]
    return multipliers


def layers_to_the_end(module: nn.Module, layer_decay: float) -> dict[str, int]:
    """Return the exponent of the layer decay of each trained parameter of the backbone.

    Patch embedding, positions, class token, registers and mask token are layer 0, block i of n is
    layer i, and everything after the blocks is layer n + 1. The exponent is n + 1 - layer, as in
    DINOv2 (facebookresearch/dinov2 at b8931f7b, dinov2/utils/param_groups.py) and MAE. timm says
    which parameters belong to which block (`group_matcher`), with blocks rather than stages as the
    layers of hierarchical networks.
    """
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    exponents: dict[str, int] = {}
    for prefix, network in _timm_networks(module):
        layers, last = _layers(network)
        trained_layers = {f"{prefix}{name}": layer for name, layer in layers.items()}
        trained_layers = {name: i for name, i in trained_layers.items() if name in trained}
        if trained_layers and last > 1:
            exponents |= {name: last - layer for name, layer in trained_layers.items()}
            if MASK_TOKEN in trained:  # replaces the output of the patch embedding
                exponents[MASK_TOKEN] = last
    if not exponents:
        raise ValueError(
            f"optim.layer_decay: {layer_decay:g} is for networks of timm whose parameters are "
            "assigned to blocks (group_matcher), and this method trains none; set it to 1, or give "
            "optim.lr_multipliers"
        )
    return exponents


def _timm_networks(module: nn.Module) -> list[tuple[str, Any]]:
    """Return the outermost timm networks in a module, each with the prefix of its parameters."""
    networks: list[tuple[str, Any]] = []
    for name, child in module.named_modules():
        prefix = f"{name}." if name else ""
        is_inner = any(prefix.startswith(outer) for outer, _ in networks)
        if hasattr(child, "group_matcher") and not is_inner:
            networks.append((prefix, child))
    return networks


def _layers(network: Any) -> tuple[dict[str, int], int]:
    """Return the layer of each parameter by name, and the number n + 1 of the last layer."""
    from timm.models._manipulate import MATCH_PREV_GROUP, group_with_matcher

    matcher = network.group_matcher(coarse=False)
    if isinstance(matcher, dict):  # timm puts a norm after the blocks into the last block
        matcher = {
            group: [spec for spec in specs if spec[1] != MATCH_PREV_GROUP]
            if isinstance(specs, (list, tuple))
            else specs
            for group, specs in matcher.items()
        }
    named: list[tuple[str, Tensor | None]] = [*network.named_parameters(), (UNMATCHED, None)]
    layers: dict[str, int] = group_with_matcher(iter(named), matcher, reverse=True)
    last = layers.pop(UNMATCHED)
    # The frequencies of a rotary embedding are positions. timm assigns them to no layer.
    return {name: 0 if name.startswith("rope.") else layer for name, layer in layers.items()}, last


def _starts_with(name: str, prefix: str) -> bool:
    return f"{name}.".startswith(f"{prefix.rstrip('.')}.")


def _check_prefixes(prefixes: Iterable[str], names: Iterable[str]) -> None:
    """Raise ValueError if a prefix matches no name. The message suggests similar prefixes."""
    parts = [name.split(".") for name in names]
    known = {".".join(words[:depth]) for words in parts for depth in range(1, len(words) + 1)}
    for prefix in prefixes:
        if prefix.rstrip(".") not in known:
            depth = prefix.rstrip(".").count(".")
            similar = get_close_matches(prefix, [k for k in known if k.count(".") == depth])
            remedy = (
                f"did you mean {' or '.join(map(repr, similar))}?"
                if similar
                else (f"give names such as {', '.join(sorted({words[0] for words in parts}))}")
            )
            raise ValueError(
                f"optim.lr_multipliers: no trained parameter is {prefix!r} or below it; {remedy}"
            )
