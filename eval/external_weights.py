"""Load weights that this project did not train, so that they can be evaluated like a run."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from ssl_pretrain import config
from ssl_pretrain.checkpoint.initial_weights import initialize
from ssl_pretrain.config import RunConfig
from ssl_pretrain.distributed import process_group
from ssl_pretrain.eval.results import print_progress
from ssl_pretrain.eval.runs import Run, check_overrides, resolve_device, to_device
from ssl_pretrain.models import backbones, image_size_check, timm_networks

OVERRIDABLE = ("backbone", "data", "views", "evaluation", "seed", "output")


def load_external_weights(weights: str, overrides: list[str], device: str) -> Run:
    """Load a network that this project did not train. Its results go to `output`.

    Image size, crop, interpolation, mean and standard deviation are timm's for this network unless
    the overrides set them.

    Args:
        weights: A file of weights, or timm:<tag>.
        overrides: key=value settings of the sections in `OVERRIDABLE`. For a file of weights, one
            of them names the network.
        device: cpu, cuda, ... or auto.

    Raises:
        ValueError: If the network is not named or the weights do not fit it.
    """
    keys = {override.partition("=")[0] for override in overrides}
    check_overrides(overrides, OVERRIDABLE, weights)
    run_config = config.without_method(overrides, weights)
    from_timm = weights.startswith("timm:")
    name, tag = run_config.backbone.name, weights.removeprefix("timm:")
    if not keys & {"backbone", "backbone.name"}:
        name, _, tag = tag.partition(".") if from_timm else ("", "", "")
        if not tag:
            raise ValueError(
                f"{weights}: the network of these weights is not known; give its timm name, as in"
                " backbone.name=resnet50"
            )
    init = f"timm:{tag}" if from_timm else weights
    run_config.backbone = replace(run_config.backbone, name=name, init=init)
    size = run_config.evaluation.image_size or timm_networks.native_size(name)
    _set_timm_defaults(run_config, name, keys)
    image_size_check.check(run_config.backbone, {"evaluation.image_size": size})
    path = Path(run_config.output or f"runs/{f'{name}.{tag}' if from_timm else Path(weights).stem}")
    _write_config(path, run_config)
    backbone: nn.Module = backbones.build(run_config.backbone, size)
    notes = initialize(backbone, run_config.backbone)
    summary = [f"{weights}: {name} at {size} pixels", *notes, f"results in {path}"]
    print_progress("; ".join(summary))
    torch_device = resolve_device(device)
    return Run(
        path=path,
        config=run_config,
        backbone=to_device(backbone, torch_device),
        step=0,
        network="published weights",
        checkpoint_path=Path(init),
        view_size=size,
        image_size=size,
        device=torch_device,
    )


def _set_timm_defaults(run_config: RunConfig, name: str, keys: set[str]) -> None:
    """Set timm's mean, standard deviation, crop and interpolation, except for overridden keys."""
    timm_config = timm_networks.pretrained_cfg(name)
    bicubic = timm_config.interpolation == "bicubic"
    defaults: dict[str, dict[str, Any]] = {
        "views": {
            "mean": list(map(float, timm_config.mean)),
            "std": list(map(float, timm_config.std)),
        },
        "evaluation": {
            "crop_ratio": float(timm_config.crop_pct),
            "interpolation": "bicubic" if bicubic else "bilinear",
        },
    }
    for section, values in defaults.items():
        for key, value in values.items():
            if not keys & {section, f"{section}.{key}"}:
                setattr(getattr(run_config, section), key, value)


def _write_config(path: Path, run_config: RunConfig) -> None:
    """Write the configuration to the folder of the results, on the main rank only.

    Raises:
        ValueError: If the folder belongs to a run, or holds the results of other weights.
    """
    file = path / "config.yaml"
    previous = yaml.safe_load(file.read_text()) if file.is_file() else None
    other_weights = previous and previous.get("backbone") != asdict(run_config.backbone)
    if (path / "checkpoints").exists() or other_weights:
        raise ValueError(
            f"output: {path} holds a run, or the results of other weights; give another folder"
            " with output=FOLDER"
        )
    if process_group.is_main():
        path.mkdir(parents=True, exist_ok=True)
        file.write_text(config.to_yaml(run_config))
