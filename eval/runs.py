"""Open what is evaluated: a run of this project, or weights that others published."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from ssl_pretrain import config, schema
from ssl_pretrain.checkpoint.folder import newest_checkpoint
from ssl_pretrain.checkpoint.initial_weights import initialize
from ssl_pretrain.checkpoint.tensor_files import read_checkpoint
from ssl_pretrain.config import RunConfig
from ssl_pretrain.distributed import process_group
from ssl_pretrain.models import backbones
from ssl_pretrain.views import recipe

# Sections that an evaluation may override: of a run, and of weights without a run.
FREE = ("data", "evaluation")
RUN_HELP = "folder of the run; or a file of weights, or timm:<tag>, with backbone.name=NAME"
OF_WEIGHTS = ("backbone", "data", "views", "evaluation", "seed", "output")


@dataclass
class Run:
    """A run, and its evaluated network: `backbone`, in evaluation mode, on `device`."""

    path: Path
    config: RunConfig
    backbone: nn.Module
    step: int
    network: str  # student, teacher, ...
    checkpoint_path: Path
    view_size: int  # pixels of the largest training view, for which the backbone was built
    image_size: int  # pixels of the evaluation views
    device: torch.device

    def about(self) -> dict[str, Any]:
        return {"checkpoint": self.checkpoint_path.name, "step": self.step, "network": self.network}


def load_run(
    run: str | Path,
    checkpoint_path: str | Path | None = None,
    overrides: list[str] | None = None,
    device: str = "auto",
) -> Run:
    """Load the network that evaluations measure, from the newest whole checkpoint of a run.

    Args:
        run: The run's folder. Or a file of weights, or timm:<tag>, with backbone.name and data.* among
            the overrides.
        checkpoint_path: One of the run's checkpoints. Default: the newest whole one.
        overrides: key=value for `data` and `evaluation`, such as data.root if the images have moved.
        device: cpu, cuda, ...; auto: cuda if there is one.

    Raises:
        ValueError: There is no run or no whole checkpoint, or the weights are not of this backbone.
    """
    path = Path(run)
    if path.is_file() or str(run).startswith("timm:"):
        if checkpoint_path:
            raise ValueError(
                f"--checkpoint: {checkpoint_path} is of a run, and {run} is weights alone; leave it out"
            )
        return _load_weights(str(run), overrides or [], device)
    if not path.is_dir():
        raise ValueError(
            f"{path}: there is no such run folder; give the `output` of a run's config"
        )
    found = Path(checkpoint_path) if checkpoint_path else newest_checkpoint(path)
    try:
        manifest, tensors = read_checkpoint(found)
    except ValueError as error:
        raise ValueError(
            f"{found.parent}: {error}. Nothing was loaded; give another, or none for the newest whole one"
        ) from None
    run_config = config.from_dict(_with(manifest["config"], overrides or []))
    _check_architecture(path, run_config, found)
    view_size = recipe.expand_counts(run_config.views)[0].size
    image_size = run_config.evaluation.image_size or view_size
    network = replace(run_config.backbone, init="random", init_key="", init_prefix="")
    backbones.check(network, {"views.crops": view_size, "evaluation.image_size": image_size})
    backbone: nn.Module = backbones.build(network, view_size)
    prefix = manifest["evaluated"] + "."
    weights = {
        key.removeprefix(prefix): value
        for key, value in backbones.plain_keys(tensors).items()
        if key.startswith(prefix)
    }
    backbones.load_strict(
        backbone, weights, f"{found}, for backbone.name {run_config.backbone.name}", exact=True
    )
    chosen = _device(device)
    backbone = place(backbone, chosen)
    return Run(
        path,
        run_config,
        backbone,
        manifest["step"],
        manifest["network"],
        found,
        view_size,
        image_size,
        chosen,
    )


def _device(name: str) -> torch.device:
    return torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    )


def _load_weights(weights: str, overrides: list[str], device: str) -> Run:
    """Load a network that was not trained by this project. Its results go to `output`.

    Image size, crop, interpolation, mean and standard deviation are timm's for this network, unless
    the overrides set them.

    Raises:
        ValueError: The network is not named, or the weights are not its own.
    """
    given = {override.partition("=")[0] for override in overrides}
    _check_keys(overrides, OF_WEIGHTS, weights)
    run_config = config.without_method(overrides, weights)
    name, tag = run_config.backbone.name, weights.removeprefix("timm:")
    if not given & {"backbone", "backbone.name"}:
        name, _, tag = tag.partition(".") if weights.startswith("timm:") else ("", "", "")
        if not tag:
            raise ValueError(
                f"{weights}: which network are these weights of? Give its timm name, as in backbone.name=resnet50"
            )
    init = f"timm:{tag}" if weights.startswith("timm:") else weights
    run_config.backbone = replace(run_config.backbone, name=name, init=init)
    size = run_config.evaluation.image_size or backbones.native_size(name)
    _as_timm_says(run_config, name, given)
    backbones.check(run_config.backbone, {"evaluation.image_size": size})
    path = Path(
        run_config.output or f"runs/{Path(weights).stem if init == weights else f'{name}.{tag}'}"
    )
    _claim(path, run_config)
    backbone: nn.Module = backbones.build(run_config.backbone, size)
    notes = initialize(backbone, run_config.backbone)
    if process_group.is_main():
        print(
            "; ".join([f"{weights}: {name} at {size} pixels", *notes, f"results in {path}"]),
            file=sys.stderr,
            flush=True,
        )
    chosen = _device(device)
    return Run(
        path,
        run_config,
        place(backbone, chosen),
        0,
        "published weights",
        Path(init),
        size,
        size,
        chosen,
    )


def _as_timm_says(run_config: RunConfig, name: str, given: set[str]) -> None:
    """Set the mean, standard deviation, crop and interpolation that timm gives for the network."""
    cfg = backbones.pretrained_cfg(name)
    views, evaluation = run_config.views, run_config.evaluation
    if not given & {"views", "views.mean"}:
        views.mean = list(map(float, cfg.mean))
    if not given & {"views", "views.std"}:
        views.std = list(map(float, cfg.std))
    if not given & {"evaluation", "evaluation.crop_ratio"}:
        evaluation.crop_ratio = float(cfg.crop_pct)
    if not given & {"evaluation", "evaluation.interpolation"}:
        evaluation.interpolation = "bicubic" if cfg.interpolation == "bicubic" else "bilinear"


def _claim(path: Path, run_config: RunConfig) -> None:
    """Write the configuration into the folder of the results.

    Raises:
        ValueError: The folder is of a run, or has the results of other weights.
    """
    written = path / "config.yaml"
    there = yaml.safe_load(written.read_text()) if written.is_file() else None
    other = (path / "checkpoints").exists() or (
        there and there.get("backbone") != asdict(run_config.backbone)
    )
    if other:
        raise ValueError(
            f"output: {path} holds a run, or the results of other weights; give another folder with output=FOLDER"
        )
    if process_group.is_main():
        path.mkdir(parents=True, exist_ok=True)
        written.write_text(config.to_yaml(run_config))


def place(backbone: nn.Module, device: torch.device) -> nn.Module:
    """Put the backbone on the device, in evaluation mode and channels-last, which is faster everywhere."""
    return backbone.eval().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def _with(written: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    _check_keys(overrides, FREE, "a run")
    return config.override(written, overrides, "the run's config")


def _check_keys(overrides: list[str], allowed: tuple[str, ...], of: str) -> None:
    listed = f"{', '.join(allowed[:-1])} and {allowed[-1]}"
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or key.split(".")[0] not in allowed:
            whose = "" if of == "a run" else f" of {of}"
            raise ValueError(
                f"{override!r}: an evaluation{whose} takes key=value of {listed} only, such as data.root=/new/place"
            )


def _check_architecture(path: Path, run_config: RunConfig, found: Path) -> None:
    """Refuse a checkpoint whose network is not the one that the run's config.yaml describes."""
    written = path / "config.yaml"
    if not written.is_file():
        return
    described = yaml.safe_load(written.read_text())
    for key, value in (("name", run_config.backbone.name), ("stem", run_config.backbone.stem)):
        other = schema.at(described, f"backbone.{key}")
        if other not in (None, value):
            raise ValueError(
                f"{found}: has backbone.{key} {value}, and {written} says {other}; give a checkpoint of this run"
            )


def parser(name: str, text: str) -> argparse.ArgumentParser:
    """The command line that all evaluations share."""
    made = argparse.ArgumentParser(
        f"python -m {name}", description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("run", metavar="RUN", help=RUN_HELP)
    keys = "for data.* and evaluation.* only, such as data.root=/new/place; of weights also backbone, views, seed, output"
    made.add_argument("overrides", nargs="*", metavar="key=value", help=keys)
    made.add_argument(
        "--checkpoint", metavar="FOLDER", help="judge this one (default: the newest whole one)"
    )
    skipping = "where labels are needed and there are none, end with one line and status 77"
    made.add_argument("--skip-unlabelled", action="store_true", help=skipping)
    made.add_argument(
        "--device", default="auto", help="cpu or cuda (default: cuda where there is one)"
    )
    return made
