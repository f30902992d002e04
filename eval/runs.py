"""A finished run, opened to be judged: its config, and its backbone with 100 % of the weights."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from ssl_pretrain import backbones, checkpoint, config, schema
from ssl_pretrain.config import RunConfig
from ssl_pretrain.views import recipe

FREE = ("data", "evaluation")  # what an evaluation may be told otherwise than the run was


@dataclass
class Run:
    """A run and the network of it that is judged: `backbone`, in evaluation mode, on `device`."""

    path: Path
    config: RunConfig
    backbone: nn.Module
    step: int
    network: str  # student, teacher, ...
    checkpoint_path: Path
    view_size: int  # of the largest training view, for which the backbone was built, in pixels
    image_size: int  # of the evaluation views
    device: torch.device

    def about(self) -> dict[str, Any]:
        return {"checkpoint": self.checkpoint_path.name, "step": self.step, "network": self.network}


def load_run(run: str | Path, checkpoint_path: str | Path | None = None, overrides: list[str] | None = None, device: str = "auto") -> Run:
    """The network of a run that evaluations judge, from the newest whole checkpoint.

    Args:
        run: the run's folder.
        checkpoint_path: one of its checkpoints; default: the newest whole one.
        overrides: key=value for `data` and `evaluation`, such as data.root when the images have moved.
        device: cpu, cuda, ...; auto: cuda where there is one.

    Raises:
        ValueError: no run, no whole checkpoint, or its weights are not those of this backbone; the message names both.
    """
    path = Path(run)
    if not path.is_dir():
        raise ValueError(f"{path}: there is no such run folder; give the `output` of a run's config")
    found = Path(checkpoint_path) if checkpoint_path else checkpoint.newest(path)
    try:
        manifest, tensors = checkpoint.read(found)
    except ValueError as error:
        raise ValueError(f"{found.parent}: {error}. Nothing was loaded; give another, or none for the newest whole one") from None
    run_config = config.from_dict(_with(manifest["config"], overrides or []))
    _check_architecture(path, run_config, found)
    view_size = recipe.each(run_config.views)[0].size
    backbone: nn.Module = backbones.build(replace(run_config.backbone, init="random"), view_size)
    prefix = manifest["evaluated"] + "."
    weights = {key.removeprefix(prefix): value for key, value in backbones.plain_keys(tensors).items() if key.startswith(prefix)}
    backbones.load_strict(backbone, weights, f"{found}, for backbone.name {run_config.backbone.name}")
    chosen = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    image_size = run_config.evaluation.image_size or view_size
    backbone = place(backbone, chosen)
    return Run(path, run_config, backbone, manifest["step"], manifest["network"], found, view_size, image_size, chosen)


def place(backbone: nn.Module, device: torch.device) -> nn.Module:
    """In evaluation mode on the device, its convolutions in the memory order that is faster on CPU and GPU alike."""
    return backbone.eval().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def _with(written: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or key.split(".")[0] not in FREE:
            raise ValueError(f"{override!r}: an evaluation takes key=value of {' and '.join(FREE)} only, such as data.root=/new/place")
    return config.override(written, overrides, "the run's config")


def _check_architecture(path: Path, run_config: RunConfig, found: Path) -> None:
    """The run's own config.yaml may describe another network than a checkpoint that was given: refused."""
    written = path / "config.yaml"
    if not written.is_file():
        return
    described = yaml.safe_load(written.read_text())
    for key, value in (("name", run_config.backbone.name), ("stem", run_config.backbone.stem)):
        other = schema.at(described, f"backbone.{key}")
        if other not in (None, value):
            raise ValueError(f"{found}: has backbone.{key} {value}, and {written} says {other}; give a checkpoint of this run")


def parser(name: str, text: str) -> argparse.ArgumentParser:
    """The part of the command line that all evaluations share."""
    made = argparse.ArgumentParser(f"python -m {name}", description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("run", metavar="RUN", help="folder of the run")
    made.add_argument("overrides", nargs="*", metavar="key=value", help="for data.* and evaluation.* only, such as data.root=/new/place")
    made.add_argument("--checkpoint", metavar="FOLDER", help="judge this one (default: the newest whole one)")
    skipping = "where labels are needed and there are none, end with one line and status 77"
    made.add_argument("--skip-unlabelled", action="store_true", help=skipping)
    made.add_argument("--device", default="auto", help="cpu or cuda (default: cuda where there is one)")
    return made
