"""Open a checkpoint of a run, of images or of sentences, for evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssl_pretrain import config, schema
from ssl_pretrain.checkpoint.folder import newest_checkpoint
from ssl_pretrain.checkpoint.tensor_files import read_checkpoint
from ssl_pretrain.config import RunConfig
from ssl_pretrain.data.config import DataConfig
from ssl_pretrain.parallel.execution import Execution
from ssl_pretrain.system import program

SENTENCE_EVALUATIONS = ("sts", "text_pairs")  # all that runs without images have
# Sections and single keys that an evaluation of a run may override.
RUN_SECTIONS = ("data", "evaluation", "text.templates", "log.bands", "parallel.precision")


@dataclass
class TrainedRun:
    """A run and the checkpoint to evaluate on `device`."""

    path: Path
    config: RunConfig
    step: int
    network: str  # such as "student" or "teacher"
    checkpoint_path: Path
    device: torch.device

    @property
    def execution(self) -> Execution:
        """Number format of forward passes, by the run's `parallel.precision` and the device."""
        return Execution.resolve(self.config.parallel, self.device)

    def describe_precision(self) -> str:
        """Describe the number format of forward passes, as an entry of the saved protocol."""
        return "bfloat16 autocast" if self.execution.autocast else "float32"

    def provenance(self) -> dict[str, Any]:
        """Return the entries of a result file that identify the weights."""
        return {"checkpoint": self.checkpoint_path.name, "step": self.step, "network": self.network}


@dataclass(frozen=True)
class OpenedCheckpoint:
    """Content of a checkpoint, and the run's configuration with the overrides."""

    path: Path
    config: RunConfig
    manifest: dict[str, Any]
    tensors: dict[str, Tensor]


def load_sentence_run(
    run: str | Path,
    checkpoint_path: str | Path | None = None,
    overrides: list[str] | None = None,
    device: str = "auto",
) -> TrainedRun:
    """Open the newest intact checkpoint of a run that learned from sentences alone.

    Args:
        run: Folder of the run.
        checkpoint_path: One of the run's checkpoints. Default: the newest intact one.
        overrides: key=value settings of `RUN_SECTIONS`, such as data.root if the texts have moved.
        device: A torch device, or auto for cuda if it is available and cpu otherwise.

    Raises:
        ValueError: If there is no run, it has no intact checkpoint, or its method takes images.
    """
    path, torch_device = Path(run), torch.device(choose_device(device))
    checkpoint = open_checkpoint(path, checkpoint_path, overrides or [])
    if config.takes_images(checkpoint.config):
        raise ValueError(
            f"{path}: {' and '.join(SENTENCE_EVALUATIONS)} need a method of sentences, and "
            f"{checkpoint.config.method.name} learns from images; evaluate a run of simcse, or "
            f"this run with `{program.format_command('ssl_pretrain.eval.knn', path)}`"
        )
    return TrainedRun(
        path=path,
        config=checkpoint.config,
        step=checkpoint.manifest["step"],
        network=checkpoint.manifest["network"],
        checkpoint_path=checkpoint.path,
        device=torch_device,
    )


def check_takes_images(path: Path, run_config: RunConfig) -> None:
    """Raise ValueError if the run's method learns from sentences alone."""
    if not config.takes_images(run_config):
        commands = " or ".join(
            f"`{program.format_command(f'ssl_pretrain.eval.{name}', path)}`"
            for name in SENTENCE_EVALUATIONS
        )
        raise ValueError(
            f"{path}: method {run_config.method.name} learns from sentences and has no network of "
            f"images; evaluate it with {commands}"
        )


def open_checkpoint(
    path: Path, checkpoint_path: str | Path | None, overrides: list[str]
) -> OpenedCheckpoint:
    """Read a checkpoint of a run, and its configuration with the overrides.

    Raises:
        ValueError: If there is no run, it has no intact checkpoint, or an override is not allowed.
    """
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
    check_overrides(overrides, RUN_SECTIONS)
    check_channels(overrides, manifest["config"])
    run_config = config.from_dict(
        config.apply_overrides(manifest["config"], overrides, "the run's config")
    )
    return OpenedCheckpoint(folder, run_config, manifest, tensors)


def choose_device(name: str) -> str:
    """Return the torch device of this name. `auto` is cuda where it is available, else cpu.

    Raises:
        ValueError: If there is no such device on this machine.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: {name!r} is not a device; give auto, cpu or cuda") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device: {name} is not on this machine, where torch sees {torch.cuda.device_count()} "
            "GPUs; give cpu or auto"
        )
    return name


def check_overrides(overrides: list[str], sections: Sequence[str], weights: str = "") -> None:
    """Raise ValueError for an override outside of these sections of the configuration."""
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not {key, key.split(".")[0]} & set(sections):
            raise ValueError(
                f"{override!r}: an evaluation{f' of {weights}' if weights else ''} only accepts"
                f" key=value settings of {', '.join(sections[:-1])} and {sections[-1]}, such as"
                " data.root=/new/place"
            )


def check_channels(overrides: list[str], saved_config: dict[str, Any]) -> None:
    """Raise ValueError if `data.channels` is overridden, because the network takes the run's."""
    saved_channels = schema.value_at(saved_config, "data.channels") or DataConfig().channels
    for override in overrides:
        key, _, channels = override.partition("=")
        if key == "data.channels" and channels.strip() != str(saved_channels):
            raise ValueError(
                f"data.channels: {channels} is not {saved_channels}, the number of channels that "
                "the run's network takes; leave it out, and evaluate the run on images of that many"
            )
