"""Read the folder of an exported backbone: its arguments, its network and its transform."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from ssl_pretrain import config as configuration
from ssl_pretrain.config import RunConfig
from ssl_pretrain.eval.exporting.reference import ARGUMENTS_FILE, WEIGHTS, check, read_arguments
from ssl_pretrain.models import backbones, components, timm_networks
from ssl_pretrain.system.durable_files import sha256


def is_export(path: Path) -> bool:
    """Return True if the folder is an export. A run that contains one is not."""
    return (path / ARGUMENTS_FILE).is_file() and not (path / "checkpoints").exists()


def load(folder: str | Path) -> components.Backbone:
    """Load an exported backbone in evaluation mode on the CPU.

    The features of the reference images are checked against the exported ones.

    Raises:
        ValueError: If a file is missing or damaged, a key is missing or unexpected, or the features
            differ.
    """
    folder = Path(folder)
    arguments = read_arguments(folder)
    if sha256(folder / WEIGHTS) != arguments["sha256"]:
        raise ValueError(
            f"{folder / WEIGHTS}: is damaged: its SHA-256 differs from the one in {ARGUMENTS_FILE};"
            " copy or export it again"
        )
    config = timm_networks.BackboneConfig(
        arguments["architecture"], arguments["stem"], args=arguments["args"]
    )
    backbone = backbones.build(config, arguments["built_for"])
    backbones.load_strict(backbone, load_file(folder / WEIGHTS), str(folder / WEIGHTS), exact=True)
    check(backbone, folder)
    return backbone.eval()


def evaluation_config(folder: Path, arguments: dict[str, Any], overrides: list[str]) -> RunConfig:
    """Return the configuration that evaluates an exported backbone as its run was evaluated.

    Args:
        folder: Folder of the export.
        arguments: Content of timm.json.
        overrides: key=value settings, which take precedence over the exported ones.

    Raises:
        ValueError: If a setting is not allowed.
    """
    view = arguments["input"]
    config = configuration.without_method(overrides, str(folder))
    config.backbone = replace(
        config.backbone,
        name=arguments["architecture"],
        stem=arguments["stem"],
        args=arguments["args"],
        init=str(folder / WEIGHTS),
    )
    overridden_keys = {override.partition("=")[0] for override in overrides}
    for section, key, value in (
        ("data", "channels", view["channels"]),
        ("data", "range", view["range"]),
        ("views", "mean", view["mean"]),
        ("views", "std", view["std"]),
        ("evaluation", "image_size", view["size"]),
        ("evaluation", "crop_ratio", view["crop_ratio"]),
        ("evaluation", "interpolation", view["interpolation"]),
        ("parallel", "precision", arguments.get("precision", "auto")),
    ):
        if not overridden_keys & {section, f"{section}.{key}"}:
            setattr(getattr(config, section), key, value)
    return config


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file in the folder of an export, by its path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256(path) for path in paths}
