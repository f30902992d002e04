"""Write the image and text towers of CLIP or SigLIP as a model of open_clip.

`open_clip.create_model_and_transforms("local-dir:FOLDER")` loads it, with open_clip's network
around that of timm. The format is that of open_clip 3.3.0 (factory.py, model.py, timm_model.py).
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ssl_pretrain.eval import run_method
from ssl_pretrain.eval.runs import Run
from ssl_pretrain.schema import image_sizes
from ssl_pretrain.views import tokenizers

CONFIG_FILE, WEIGHTS_FILE = "open_clip_config.json", "open_clip_model.safetensors"
POOLINGS = {"auto": "argmax", "end": "argmax", "first": "first", "last": "last"}
# Arguments of timm's networks that open_clip passes on, and their names in its vision_cfg.
NETWORK_ARGUMENTS = {
    "global_pool": "timm_pool",
    "drop_path_rate": "timm_drop_path",
    "patch_drop_rate": "patch_dropout",
}


def model_config(run: Run) -> dict[str, Any]:
    """Return the arguments of open_clip's class CLIP for the towers of a run.

    The end token has the largest number of all tokens, so `argmax` finds it.
    """
    method: Any = run.config.method
    values = {
        "embed_dim": method.dim,
        "vision_cfg": _vision_config(run),
        "text_cfg": _text_config(run),
    }
    if hasattr(method, "initial_bias"):
        values["init_logit_bias"] = method.initial_bias  # without it, there is no bias
    return values


def _vision_config(run: Run) -> dict[str, Any]:
    backbone = run.config.backbone
    values = {
        "timm_model_name": backbone.name,
        "timm_model_pretrained": False,
        "timm_pool": "",  # the network's own
        "timm_proj": "linear",
        "timm_proj_bias": False,
        "image_size": image_sizes.simplify(run.image_size),
    }
    if backbone.drop_path:
        values["timm_drop_path"] = backbone.drop_path
    for key, value in backbone.args.items():
        if key in NETWORK_ARGUMENTS:
            values[NETWORK_ARGUMENTS[key]] = value
    return values


def _text_config(run: Run) -> dict[str, Any]:
    encoder, text = run.config.text_encoder, run.config.text
    return {
        "context_length": text.length,
        "vocab_size": tokenizers.vocabulary_size(text),
        "tokenizer_kwargs": {"clean": "lower"},
        "width": encoder.width,
        "heads": encoder.heads,
        "layers": encoder.layers,
        "no_causal_mask": not encoder.causal,
        "pool_type": POOLINGS[encoder.pool],
        "proj_type": "linear",
        "proj_bias": False,
    }


def write(run: Run, folder: Path, view: dict[str, Any]) -> None:
    """Write the configuration and the weights of both towers.

    Args:
        run: Run whose towers open_clip has.
        folder: Folder of the export.
        view: The entry `input` of the export's arguments.
    """
    values = {
        "model_cfg": model_config(run),
        "preprocess_cfg": {
            "size": image_sizes.simplify(view["size"]),
            "mode": "RGB",
            "mean": view["mean"],
            "std": view["std"],
            "interpolation": view["interpolation"],
            "resize_mode": "shortest",
        },
    }
    text = json.dumps(values, indent=2)
    (folder / CONFIG_FILE).write_text(f"{text}\n", encoding="utf-8")
    weights = map_weights(load_method(run))
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def map_weights(method: Any) -> dict[str, Tensor]:
    """Return the weights of both towers under open_clip's names.

    Args:
        method: CLIP or SigLIP. Its text encoder is open_clip's, without the projection.
    """
    weights = {
        **_with_prefix("visual.trunk", method.backbone.model),
        **_with_prefix("visual.head.proj", method.image_projection),
        **method.text_encoder.model.transformer.state_dict(),
        "text_projection": method.text_projection.weight.T,  # open_clip multiplies from the right
    }
    for name in ("logit_scale", "logit_bias"):
        if hasattr(method, name):
            weights[name] = getattr(method, name).reshape(())
    return {key: value.detach().contiguous().clone() for key, value in weights.items()}


def _with_prefix(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{prefix}.{key}": value for key, value in module.state_dict().items()}


def load_method(run: Run) -> nn.Module:
    """Return the method of a run with its trained weights, in evaluation mode on the CPU.

    Raises:
        ValueError: If the checkpoint is damaged, or its weights do not fit the configuration.
    """
    architecture = run_method.without_weights(run.config.backbone)
    return run_method.build_method(run, True, architecture).eval()


def reference_texts(run: Run) -> list[str]:
    """Return texts for the comparison of the text towers. The last one is too long for a run."""
    long_text = "a " * run.config.text.length + "long caption"
    return ["a photo of a dog.", "Zoë's 2 CATS &amp; 10 birds", "", long_text]


@torch.no_grad()
def embed(run: Run, images: Tensor, texts: list[str]) -> Tensor:
    """Return the embeddings of images and then of texts, scaled to length 1, by the run's towers.

    Args:
        run: Run of CLIP or SigLIP.
        images: Normalized images, float32 (num_images, channels, height, width).
        texts: Texts.

    Returns:
        Embeddings, float32 (num_images + num_texts, dim).
    """
    method: Any = load_method(run)
    tokens = tokenizers.build(run.config.text)(texts)
    ids, valid = torch.from_numpy(tokens.ids).long(), torch.from_numpy(tokens.valid)
    image_vectors = method.image_projection(method.backbone(images))
    text_vectors = method.text_projection(method.text_encoder(ids, valid))
    return nn.functional.normalize(torch.cat([image_vectors, text_vectors]), dim=1)
