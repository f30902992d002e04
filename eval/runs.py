"""Open a pretraining run for evaluation."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from ssl_pretrain import config, schema
from ssl_pretrain.checkpoint.folder import newest_checkpoint
from ssl_pretrain.checkpoint.tensor_files import read_checkpoint
from ssl_pretrain.config import RunConfig
from ssl_pretrain.models import backbones, image_size_check
from ssl_pretrain.views import recipe

OVERRIDABLE = ("data", "evaluation")  # sections of a run's config that an evaluation may override


@dataclass
class Run:
    """A run and the network to evaluate: `backbone`, in evaluation mode, on `device`."""

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
        """Return the entries of a result file that say which weights were evaluated."""
        return {"checkpoint": self.checkpoint_path.name, "step": self.step, "network": self.network}


def load_run(
    run: str | Path,
    checkpoint_path: str | Path | None = None,
    overrides: list[str] | None = None,
    device: str = "auto",
) -> Run:
    """Load the network to evaluate from the newest intact checkpoint of a run.

    Args:
        run: Folder of the run. Or a file of weights, or timm:<tag>, with backbone.name and data.*
            among the overrides.
        checkpoint_path: One of the run's checkpoints. Default: the newest intact one.
        overrides: key=value of `data` and `evaluation`, such as data.root if the images have moved.
        device: cpu, cuda, ...; auto stands for cuda where it is available.

    Raises:
        ValueError: If there is no run or no intact checkpoint, or the weights do not fit the
            backbone.
    """
    # A late import, because external_weights imports this module.
    from ssl_pretrain.eval.external_weights import load_external_weights

    path = Path(run)
    if path.is_file() or str(run).startswith("timm:"):
        if checkpoint_path:
            raise ValueError(
                f"--checkpoint {checkpoint_path}: belongs to a run, and {run} is weights without a"
                " run; leave it out"
            )
        return load_external_weights(str(run), overrides or [], device)
    if not path.is_dir():
        raise ValueError(f"{path}: no such run folder; give the `output` of a run's config")
    folder = Path(checkpoint_path) if checkpoint_path else newest_checkpoint(path)
    try:
        manifest, tensors = read_checkpoint(folder)
    except ValueError as error:
        raise ValueError(
            f"{folder.parent}: {error}. Nothing was loaded; give another checkpoint, or none for"
            " the newest intact one"
        ) from None
    check_overrides(overrides or [], OVERRIDABLE)
    run_config = config.from_dict(
        config.override(manifest["config"], overrides or [], "the run's config")
    )
    _check_architecture(path, run_config, folder)
    view_size = recipe.expand_counts(run_config.views)[0].size
    image_size = run_config.evaluation.image_size or view_size
    architecture = replace(run_config.backbone, init="random", init_key="", init_prefix="")
    image_size_check.check(
        architecture, {"views.crops": view_size, "evaluation.image_size": image_size}
    )
    backbone: nn.Module = backbones.build(architecture, view_size)
    prefix = manifest["evaluated"] + "."
    weights = {
        key.removeprefix(prefix): value
        for key, value in backbones.plain_keys(tensors).items()
        if key.startswith(prefix)
    }
    origin = f"{folder}, for backbone.name {run_config.backbone.name}"
    backbones.load_strict(backbone, weights, origin, exact=True)
    torch_device = resolve_device(device)
    return Run(
        path=path,
        config=run_config,
        backbone=to_device(backbone, torch_device),
        step=manifest["step"],
        network=manifest["network"],
        checkpoint_path=folder,
        view_size=view_size,
        image_size=image_size,
        device=torch_device,
    )


def resolve_device(name: str) -> torch.device:
    """Return the named device; "auto" stands for CUDA where it is available."""
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(automatic if name == "auto" else name)


def to_device(
    backbone: nn.Module,
    device: torch.device,
    memory_format: torch.memory_format = torch.channels_last,
) -> nn.Module:
    """Put a network on the device in evaluation mode, by default channels-last for speed."""
    layout: Any = {"memory_format": memory_format}  # missing in torch's types
    return backbone.eval().to(device, **layout)


def check_overrides(overrides: list[str], sections: tuple[str, ...], weights: str = "") -> None:
    """Raise ValueError for an override outside of these sections of the configuration."""
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or key.split(".")[0] not in sections:
            raise ValueError(
                f"{override!r}: an evaluation{f' of {weights}' if weights else ''} takes key=value"
                f" of {', '.join(sections[:-1])} and {sections[-1]} only, such as"
                " data.root=/new/place"
            )


def _check_architecture(path: Path, run_config: RunConfig, folder: Path) -> None:
    """Refuse a checkpoint whose network is not the one in the run's config.yaml."""
    file = path / "config.yaml"
    if not file.is_file():
        return
    described = yaml.safe_load(file.read_text())
    for key in ("name", "stem"):
        value = getattr(run_config.backbone, key)
        other = schema.value_at(described, f"backbone.{key}")
        if other not in (None, value):
            raise ValueError(
                f"{folder}: has backbone.{key} {value}, and {file} says {other};"
                " give a checkpoint of this run"
            )
