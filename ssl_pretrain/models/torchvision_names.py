"""Rename the weights of torchvision's ViT, Swin and ConvNeXt to timm's names.

torchvision's ResNets, RegNets, VGGs and DenseNets need no rules, because timm uses their names or
ships a converter.
"""

import re

from torch import Tensor

# Each rule is a pattern for the start of a key and its replacement. The first match is used.
Rules = tuple[tuple[str, str], ...]
_LAYER = r"encoder\.layers\.encoder_layer_(\d+)\."
VIT: Rules = (
    (r"class_token$", "cls_token"),
    (r"encoder\.pos_embedding$", "pos_embed"),
    (r"conv_proj\.", "patch_embed.proj."),
    (_LAYER + r"ln_([12])\.", r"blocks.\1.norm\2."),
    (_LAYER + r"self_attention\.in_proj_", r"blocks.\1.attn.qkv."),
    (_LAYER + r"self_attention\.out_proj\.", r"blocks.\1.attn.proj."),
    (_LAYER + r"mlp\.(?:0|linear_1)\.", r"blocks.\1.mlp.fc1."),
    (_LAYER + r"mlp\.(?:3|linear_2)\.", r"blocks.\1.mlp.fc2."),
    (r"encoder\.ln\.", "norm."),
    (r"heads\.head\.", "head."),
)
CONVNEXT: Rules = (
    (r"features\.0\.([01])\.", r"stem.\1."),
    (r"features\.{odd}\.(\d+)\.block\.0\.", r"stages.{stage}.blocks.\1.conv_dw."),
    (r"features\.{odd}\.(\d+)\.block\.2\.", r"stages.{stage}.blocks.\1.norm."),
    (r"features\.{odd}\.(\d+)\.block\.3\.", r"stages.{stage}.blocks.\1.mlp.fc1."),
    (r"features\.{odd}\.(\d+)\.block\.5\.", r"stages.{stage}.blocks.\1.mlp.fc2."),
    (r"features\.{odd}\.(\d+)\.layer_scale$", r"stages.{stage}.blocks.\1.gamma"),
    (r"features\.{even}\.([01])\.", r"stages.{stage}.downsample.\1."),
    (r"classifier\.0\.", "head.norm."),
    (r"classifier\.2\.", "head.fc."),
)
SWIN: Rules = (
    (r"features\.0\.0\.", "patch_embed.proj."),
    (r"features\.0\.2\.", "patch_embed.norm."),
    (r"features\.{odd}\.(\d+)\.mlp\.0\.", r"layers.{stage}.blocks.\1.mlp.fc1."),
    (r"features\.{odd}\.(\d+)\.mlp\.3\.", r"layers.{stage}.blocks.\1.mlp.fc2."),
    (r"features\.{odd}\.(\d+)\.", r"layers.{stage}.blocks.\1."),
    (r"features\.{even}\.", "layers.{stage}.downsample."),
    (r"head\.", "head.fc."),
)
# The rules of each network, by a key that only its weights contain.
NETWORKS: dict[str, Rules] = {
    "encoder.layers.encoder_layer_0.ln_1.weight": VIT,
    "features.1.0.layer_scale": CONVNEXT,
    "features.1.0.attn.relative_position_bias_table": SWIN,
}
NUM_STAGES = 4


def rename(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights under timm's names, or unchanged if no rules apply to them."""
    for marker, rules in NETWORKS.items():
        if marker in weights:
            stage_rules = _expand_stages(rules)
            timm_weights = {_rename_key(key, stage_rules): value for key, value in weights.items()}
            return {
                key: value.flatten() if key.endswith(".gamma") else value
                for key, value in timm_weights.items()
                if not key.endswith("relative_position_index")
            }
    return weights


def _expand_stages(rules: Rules) -> list[tuple[str, str]]:
    """Return the rules with one copy per stage, each with the stage's numbers filled in.

    In torchvision's names, a stage has an odd number and the downsampling before it an even one.
    """
    stage_rules = []
    for pattern, replacement in rules:
        first_stage = 1 if "{even}" in pattern else 0  # no downsampling before stage 0
        for stage in range(first_stage, NUM_STAGES if "{" in pattern else 1):
            numbers = {"{odd}": str(2 * stage + 1), "{even}": str(2 * stage), "{stage}": str(stage)}
            rule = pattern, replacement
            for name, number in numbers.items():
                rule = rule[0].replace(name, number), rule[1].replace(name, number)
            stage_rules.append(rule)
    return stage_rules


def _rename_key(key: str, rules: list[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        if match := re.match(pattern, key):
            return match.expand(replacement) + key[match.end() :]
    return key
