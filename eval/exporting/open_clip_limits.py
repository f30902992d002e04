"""Find out why open_clip cannot have the towers of a run."""

from typing import Any

from torch import nn

from ssl_pretrain import config
from ssl_pretrain.eval.exporting import open_clip_folder
from ssl_pretrain.eval.runs import Run
from ssl_pretrain.models import custom_network, published_weights, timm_networks
from ssl_pretrain.models.text_encoders import CLIP as CLIP_ENCODER
from ssl_pretrain.schema.image_sizes import describe, height_and_width
from ssl_pretrain.views.tokenizers import CLIP as CLIP_TOKENIZER

IMAGE_TOWER_ALONE = "or export the image tower alone, with another --format"


def find_problem(run: Run) -> str:
    """Return the setting that open_clip does not have, with a remedy, or an empty string.

    The package open_clip is installed.
    """
    if not config.pairs_images_with_texts(run.config):
        return (
            f"method.name: {run.config.method.name} has no image tower and text tower; use this"
            " format for runs of clip and siglip"
        )
    return _find_text_problem(run) or _find_image_problem(run) or _find_other_network(run)


def _find_text_problem(run: Run) -> str:
    encoder, text = run.config.text_encoder, run.config.text
    if encoder.name != CLIP_ENCODER:
        return (
            f"text_encoder.name: {encoder.name} is an encoder of transformers, whose weights cannot"
            f" be stored as open_clip's; train with text_encoder.name=clip, {IMAGE_TOWER_ALONE}"
        )
    if text.tokenizer != CLIP_TOKENIZER:
        return (
            f"text.tokenizer: {text.tokenizer} would receive other texts, because open_clip cleans"
            f" them first; train with text.tokenizer=clip, {IMAGE_TOWER_ALONE}"
        )
    if encoder.pool not in open_clip_folder.POOLINGS:
        return (
            f"text_encoder.pool: {encoder.pool} is not among the poolings of open_clip; train with"
            f" text_encoder.pool=end, first or last, {IMAGE_TOWER_ALONE}"
        )
    return ""


def _find_image_problem(run: Run) -> str:
    backbone, channels = run.config.backbone, run.config.data.channels
    if channels != 3:
        return (
            f"data.channels: {channels} is not possible, because open_clip's image towers take 3"
            " channels; use torchhub, torch_export or onnx for the image tower alone"
        )
    if custom_network.is_custom(backbone.name):
        return (
            f"backbone.name: {backbone.name} is a network of your own, and open_clip builds those"
            " of timm; use torch_export or onnx for the image tower alone"
        )
    if backbone.stem != "imagenet":
        return (
            f"backbone.stem: {backbone.stem} is not in timm's {backbone.name}, which open_clip"
            " builds; train with backbone.stem=imagenet, or use torchhub, torch_export or onnx for"
            " the image tower alone"
        )
    possible = {*open_clip_folder.NETWORK_ARGUMENTS, "in_chans"}
    others = {key: value for key, value in backbone.args.items() if key not in possible}
    if others:
        return (
            f"backbone.args: open_clip cannot pass {others} to timm's {backbone.name}; train a"
            f" network that timm has under a name of its own, {IMAGE_TOWER_ALONE}"
        )
    return _find_size_problem(run)


def _find_size_problem(run: Run) -> str:
    """Return the problem of a network that is built for one image size, such as a ViT."""
    name = run.config.backbone.name
    if "img_size" not in timm_networks.constructor_arguments(name):
        return ""
    native = timm_networks.native_size(name)
    for key, size in (("views.crops", run.view_size), ("evaluation.image_size", run.image_size)):
        if height_and_width(size) != (native, native):
            return (
                f"{key}: {describe(size)} pixels are not possible, because open_clip builds {name}"
                f" for {native} pixels; train with views of {native} pixels and evaluate with as"
                f" many, {IMAGE_TOWER_ALONE}"
            )
    return ""


def _find_other_network(run: Run) -> str:
    """Compare the names and shapes of the backbone's weights with those of open_clip's network."""
    from open_clip.model import CLIP

    backbone: Any = run.backbone
    values = open_clip_folder.model_config(run)
    remedy = f"use the network of timm without backbone.args, {IMAGE_TOWER_ALONE}"
    try:
        network = timm_networks.create_on_meta(lambda: CLIP(**values))
    except Exception as error:  # constructors raise errors of many types
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        return (
            f"backbone.name: open_clip cannot build {values['vision_cfg']}: {reason[0]}; {remedy}"
        )
    expected, actual = _shapes(network.visual.trunk), _shapes(backbone.model)
    problems = published_weights.describe_mismatched_keys(
        sorted(set(expected) - set(actual)),
        sorted(set(actual) - set(expected)),
        [
            f"{key} {actual[key]} for {expected[key]}"
            for key in sorted(set(expected) & set(actual))
            if expected[key] != actual[key]
        ],
    )
    if not problems:
        return ""
    name = run.config.backbone.name
    return (
        f"backbone.name: open_clip builds another {name} than this backbone: {problems}; {remedy}"
    )


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}
