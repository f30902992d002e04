"""Settings of a run that a program starts, below those that its caller gives."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ssl_pretrain import config as configuration
from ssl_pretrain import schema
from ssl_pretrain.checkpoint.folder import list_checkpoints
from ssl_pretrain.config import RunConfig
from ssl_pretrain.data import sources
from ssl_pretrain.data.sources import DataConfig
from ssl_pretrain.distributed import process_group
from ssl_pretrain.planning import suggestion
from ssl_pretrain.schema import key_hints


def choose(
    folder: Path,
    config: str | Path | None,
    method: str | None,
    data: dict[str, Any],
    overrides: dict[str, Any],
) -> RunConfig:
    """Return the configuration of a run.

    Args:
        folder: Folder of the run. If it contains a run already, its settings are kept.
        config: Name of a shipped recipe or path of a YAML, or None to choose the settings.
        method: Name of the method, or None for that of the recipe or of the run so far.
        data: Values of the section `data`.
        overrides: The caller's settings, as a tree.

    Raises:
        ValueError: If a setting is wrong, or the folder contains a run of another method.
    """
    schema.build(RunConfig, overrides, {"method": dict[str, Any]})  # refuses wrong ones at once
    values = _base_values(folder, config, method, data, overrides)
    values = schema.merge(schema.merge(values, {"data": data}), overrides)
    return configuration.from_dict(values | {"output": str(folder)}, "pretrain")


def build_tree(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as a tree. A double underscore or a dot separates a section from its key.

    Raises:
        ValueError: If there is no such section or key at the top.
    """
    tree: dict[str, Any] = {}
    for key, value in overrides.items():
        _require_known_argument(key)
        value = _to_plain_value(value)
        tree = schema.merge(tree, schema.nest(key.replace("__", "."), value))
    return tree


def _require_known_argument(key: str) -> None:
    """Raise ValueError, with the likely argument, unless the key starts with a section or a key."""
    allowed = [field.name for field in dataclasses.fields(RunConfig)]
    if key.replace("__", ".").partition(".")[0] not in allowed:
        raise ValueError(key_hints.describe_unknown_argument(key, allowed))


def _to_plain_value(value: Any) -> Any:
    """Return NumPy's numbers, arrays and paths as the plain values of a YAML."""
    if isinstance(value, Mapping):
        return {name: _to_plain_value(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_plain_value(each) for each in value]
    if isinstance(value, Path):
        return str(value)
    return value.tolist() if isinstance(value, (np.generic, np.ndarray)) else value


def _base_values(
    folder: Path,
    config: str | Path | None,
    method: str | None,
    data: dict[str, Any],
    overrides: dict[str, Any],
) -> dict[str, Any]:
    """Return the settings below the caller's: of the run so far, of a recipe, or chosen ones.

    Raises:
        ValueError: If the folder contains a run of another method.
    """
    if config is not None:
        values = configuration.to_dict(configuration.load(config))
    elif list_checkpoints(folder):
        values = yaml.safe_load((folder / "config.yaml").read_text())
    else:
        return _suggested_values(method or "simclr", data, overrides)
    name = values["method"]["name"]
    if method not in (None, name):
        origin = f"config {config}" if config is not None else f"output {folder}"
        remedy = "config" if config is not None else "output"
        raise ValueError(
            f"method: {origin} is of {name}, not of {method}; leave out the method, or give "
            f"another {remedy}"
        )
    return values


def _suggested_values(
    method: str, data: dict[str, Any], overrides: dict[str, Any]
) -> dict[str, Any]:
    """Choose the settings for the images and this machine, and print the reasons."""
    data_values = schema.merge(data, overrides.get("data", {}))
    data_config: DataConfig = schema.build(DataConfig, data_values, key="data")
    source = sources.open_source(data_config, "train")
    chosen = suggestion.suggest(
        data_config,
        source,
        method=method,
        backbone=schema.value_at(overrides, "backbone.name"),
        epochs=overrides.get("epochs"),
    )
    lines = [f"settings for these {len(source):,} images and this machine:"]
    for key, reason in chosen.reasons.items():
        lines.append(f"  {key}: {chosen.get(key)}    ({reason})")
    process_group.print_once(*lines)
    return chosen.tree
