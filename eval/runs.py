"""Open a pretraining run, or weights that this project did not train, for evaluation."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ssl_pretrain import config, schema
from ssl_pretrain.checkpoint.initial_weights import initialize
from ssl_pretrain.config import RunConfig, channels
from ssl_pretrain.distributed import process_group
from ssl_pretrain.eval import saved_settings
from ssl_pretrain.eval.exporting import export_folder, reference
from ssl_pretrain.eval.results import print_progress
from ssl_pretrain.eval.trained_run import (
    RUN_SECTIONS,
    OpenedCheckpoint,
    TrainedRun,
    check_channels,
    check_overrides,
    check_takes_images,
    choose_device,
    open_checkpoint,
)
from ssl_pretrain.models import backbones, image_size_check, timm_networks
from ssl_pretrain.schema.image_sizes import describe
from ssl_pretrain.views import recipe

# Sections and single keys that an evaluation of external weights may override.
EXTERNAL_SECTIONS = (
    "backbone",
    "data",
    "views",
    "evaluation",
    "log.bands",
    "parallel.precision",
    "seed",
    "output",
)


@dataclass
class Run(TrainedRun):
    """A run of images and its network to evaluate, which is in evaluation mode on `device`."""

    backbone: nn.Module
    view_size: int | list[int]  # largest training view, for which the backbone is built
    image_size: int | list[int]  # evaluation view: side in pixels, or height and width


def load_run(
    run: str | Path,
    checkpoint_path: str | Path | None = None,
    overrides: list[str] | None = None,
    device: str = "auto",
    is_evaluated: bool = True,
) -> Run:
    """Load the network to evaluate from the newest intact checkpoint of a run.

    Args:
        run: Folder of the run or of an export, a file of weights, or timm:<tag>. With weights, the
            overrides must set data.* and, unless the tag names the network, backbone.name.
        checkpoint_path: One of the run's checkpoints. Default: the newest intact one.
        overrides: key=value settings of `RUN_SECTIONS`, such as data.root if the images have moved.
        device: A torch device, or auto for cuda if it is available and cpu otherwise.
        is_evaluated: True to create the folder for the results of weights without a run.

    Raises:
        ValueError: If there is no run, it has no intact checkpoint, the weights do not fit the
            backbone, or the method learns from sentences alone.
    """
    path, overrides = Path(run), overrides or []
    device = choose_device(device)
    if path.is_file() or str(run).startswith("timm:"):
        if checkpoint_path:
            raise ValueError(
                f"--checkpoint {checkpoint_path}: {run} is not a run and has no checkpoints; leave"
                " the option out"
            )
        return load_external_weights(str(run), overrides, torch.device(device), is_evaluated)
    if export_folder.is_export(path):
        if checkpoint_path:
            raise ValueError(
                f"--checkpoint {checkpoint_path}: {run} is an export and has no checkpoints; leave"
                " the option out"
            )
        return load_export(path, overrides, torch.device(device), is_evaluated)
    checkpoint = open_checkpoint(path, checkpoint_path, overrides)
    folder, manifest, run_config = checkpoint.path, checkpoint.manifest, checkpoint.config
    check_takes_images(path, run_config)
    _check_architecture(path, checkpoint)
    view_size = recipe.crop_per_view(run_config.views)[0].size
    image_size = run_config.evaluation.image_size or view_size
    architecture = replace(run_config.backbone, init="random", init_key="", init_prefix="")
    image_size_check.check(
        architecture, {"views.crops": view_size, "evaluation.image_size": image_size}
    )
    backbone: nn.Module = backbones.build(architecture, view_size)
    prefix = manifest["evaluated"] + "."
    weights = {
        key.removeprefix(prefix): value
        for key, value in backbones.strip_wrapper_prefixes(checkpoint.tensors).items()
        if key.startswith(prefix)
    }
    origin = f"{folder}, for backbone.name {run_config.backbone.name}"
    backbones.load_strict(backbone, weights, origin, exact=True)
    return Run(
        path=path,
        config=run_config,
        backbone=prepare_for_evaluation(backbone, torch.device(device)),
        step=manifest["step"],
        network=manifest["network"],
        checkpoint_path=folder,
        view_size=view_size,
        image_size=image_size,
        device=torch.device(device),
    )


def load_external_weights(
    weights: str, overrides: list[str], device: torch.device, is_evaluated: bool = True
) -> Run:
    """Load a network that this project did not train. Its results go to the folder `output`.

    Image size, crop, interpolation, mean and standard deviation default to timm's values for this
    network.

    Args:
        weights: A file of weights, or timm:<tag>.
        overrides: key=value settings of the sections in `EXTERNAL_SECTIONS`. For a file of weights,
            backbone.name must be one of them.
        device: Device of the network.
        is_evaluated: True to create the folder of the results.

    Raises:
        ValueError: If the name of the network is missing or the weights do not fit it.
    """
    check_overrides(overrides, EXTERNAL_SECTIONS, weights)
    run_config, is_timm = config.without_method(overrides, weights), weights.startswith("timm:")
    overridden_keys = {override.partition("=")[0] for override in overrides}
    name, tag = run_config.backbone.name, weights.removeprefix("timm:")
    if not overridden_keys & {"backbone", "backbone.name"}:
        name, _, tag = tag.partition(".") if is_timm else ("", "", "")
        if not tag:
            raise ValueError(
                f"{weights}: the network of these weights is unknown; give its timm name, as in"
                " backbone.name=resnet50"
            )
    init = f"timm:{tag}" if is_timm else weights
    run_config.backbone = replace(run_config.backbone, name=name, init=init)
    size = run_config.evaluation.image_size or timm_networks.native_size(name)
    _set_timm_defaults(run_config, name, overridden_keys)
    channels.fit(run_config)
    image_size_check.check(run_config.backbone, {"evaluation.image_size": size})
    path = Path(run_config.output or f"runs/{f'{name}.{tag}' if is_timm else Path(weights).stem}")
    if is_evaluated:
        _write_config(path, run_config)
    backbone: nn.Module = backbones.build(run_config.backbone, size)
    notes = initialize(backbone, run_config.backbone)
    destination = [f"results in {path}"] if is_evaluated else []
    print_progress(
        "; ".join([f"{weights}: {name} at {describe(size)} pixels", *notes, *destination])
    )
    return Run(
        path=path,
        config=run_config,
        backbone=prepare_for_evaluation(backbone, device),
        step=0,
        network="published weights",
        checkpoint_path=Path(init),
        view_size=size,
        image_size=size,
        device=device,
    )


def load_export(
    folder: Path, overrides: list[str], device: torch.device, is_evaluated: bool = True
) -> Run:
    """Load an exported backbone. Its results go to the folder `output`.

    The transform is that of the run's evaluations.

    Args:
        folder: Folder of the export.
        overrides: key=value settings of the sections in `RUN_SECTIONS`, and `output`.
        device: Device of the network.
        is_evaluated: True to create the folder of the results.

    Raises:
        ValueError: If a file of the export is missing or damaged, or a setting is not allowed.
    """
    check_overrides(overrides, (*RUN_SECTIONS, "output"), str(folder))
    arguments = reference.read_arguments(folder)
    check_channels(overrides, {"data": {"channels": arguments["input"]["channels"]}})
    run_config = export_folder.evaluation_config(folder, arguments, overrides)
    size = run_config.evaluation.image_size or arguments["input"]["size"]
    image_size_check.check(run_config.backbone, {"evaluation.image_size": size})
    path = Path(run_config.output or f"runs/{folder.resolve().name}")
    if is_evaluated:
        _write_config(path, run_config)
        print_progress(f"{folder}: {arguments['architecture']}; results in {path}")
    return Run(
        path=path,
        config=run_config,
        backbone=prepare_for_evaluation(export_folder.load(folder), device),
        step=arguments["step"],
        network=arguments["network"],
        checkpoint_path=Path(arguments["checkpoint"]),
        view_size=arguments["built_for"],
        image_size=size,
        device=device,
    )


def prepare_for_evaluation(
    backbone: nn.Module,
    device: torch.device,
    memory_format: torch.memory_format = torch.channels_last,
) -> nn.Module:
    """Move a network to the device and to evaluation mode, by default channels-last for speed."""
    layout: Any = {"memory_format": memory_format}  # torch's annotations lack this argument
    return backbone.eval().to(device, **layout)


@contextmanager
def on_cpu(run: Run) -> Iterator[nn.Module]:
    """Yield the run's backbone on the CPU in PyTorch's default layout, and move it back."""
    try:
        yield prepare_for_evaluation(run.backbone, torch.device("cpu"), torch.contiguous_format)
    finally:
        prepare_for_evaluation(run.backbone, run.device)


def _check_architecture(path: Path, checkpoint: OpenedCheckpoint) -> None:
    """Raise ValueError if the checkpoint's network differs from that in the run's config.yaml."""
    saved_config = saved_settings.read(path)
    for key in ("name", "stem"):
        value = getattr(checkpoint.config.backbone, key)
        saved_value = schema.value_at(saved_config, f"backbone.{key}")
        if saved_value not in (None, value):
            raise ValueError(
                f"{checkpoint.path}: has backbone.{key} {value}, but {path}/config.yaml has "
                f"{saved_value}; give a checkpoint of this run"
            )


def _set_timm_defaults(run_config: RunConfig, name: str, overridden_keys: set[str]) -> None:
    """Set timm's mean, standard deviation, crop and interpolation, except for overridden keys."""
    timm_config = timm_networks.pretrained_cfg(name)
    is_bicubic = timm_config.interpolation == "bicubic"
    for section, key, value in (
        ("views", "mean", list(map(float, timm_config.mean))),
        ("views", "std", list(map(float, timm_config.std))),
        ("evaluation", "crop_ratio", float(timm_config.crop_pct)),
        ("evaluation", "interpolation", "bicubic" if is_bicubic else "bilinear"),
    ):
        if not overridden_keys & {section, f"{section}.{key}"}:
            setattr(getattr(run_config, section), key, value)


def _write_config(path: Path, run_config: RunConfig) -> None:
    """Write the configuration to the folder of the results, from the main rank only.

    Raises:
        ValueError: If the folder contains a run or the results of other weights.
    """
    previous = saved_settings.read(path)
    has_other_weights = bool(previous) and previous.get("backbone") != asdict(run_config.backbone)
    if (path / "checkpoints").exists() or has_other_weights:
        raise ValueError(
            f"output: {path} contains a run or the results of other weights; give another folder"
            " with output=FOLDER"
        )
    if process_group.is_main():
        path.mkdir(parents=True, exist_ok=True)
        (path / saved_settings.FILE_NAME).write_text(config.to_yaml(run_config))
