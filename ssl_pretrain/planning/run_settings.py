"""Settings of a run that a program starts, below those that its caller gives."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ssl_pretrain import config as configuration
from ssl_pretrain import schema
from ssl_pretrain.checkpoint.folder import list_checkpoints
from ssl_pretrain.config import RunConfig
from ssl_pretrain.data import sources
from ssl_pretrain.data.config import DataConfig
from ssl_pretrain.data.source_report import open_with_own_channels
from ssl_pretrain.distributed import process_group
from ssl_pretrain.planning import suggestion
from ssl_pretrain.schema import key_hints
from ssl_pretrain.schema.method_name import read_name

DEFAULT_METHOD = "simclr"


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
        method: Name of the method, or None for that of the recipe or of the run so far. The section
            `method` of the overrides has the same name or none.
        data: Values of the section `data`.
        overrides: The caller's settings, as a tree.

    Raises:
        ValueError: If a setting is wrong, or the folder contains a run of another method.
    """
    schema.build(RunConfig, overrides, {"method": dict[str, Any]})  # refuses wrong ones at once
    values = _base_values(folder, config, method, data, overrides)
    values = schema.merge(schema.merge(values, {"data": data}), overrides)
    return configuration.from_dict(values | {"output": str(folder)}, "pretrain")


def default_folder(method: str | None, config: str | Path | None, data_name: str) -> Path:
    """Return runs/METHOD_DATA, with the method of the recipe if the caller names none."""
    if method is None and config is not None:
        method = read_name(configuration.read_yaml(Path(config)))
    return Path(f"runs/{method or DEFAULT_METHOD}_{data_name}")


def choose_method(method: str | None, overrides: Mapping[str, Any]) -> str | None:
    """Return the method that a caller names, as an argument or in the tree of other settings.

    Raises:
        ValueError: If both name one, and they differ.
    """
    name = read_name(overrides)
    if None not in (method, name) and method != name:
        raise ValueError(f"method: {method!r} is not the {name!r} of method__name; give one name")
    return method or name


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
    """Return the settings below the caller's: of a recipe, of the run so far, or chosen ones.

    Raises:
        ValueError: If the recipe or the folder's run is of another method.
    """
    if config is not None:
        named_method = [] if method is None else [f"method.name={method}"]
        return configuration.to_dict(configuration.load(config, named_method))
    if not list_checkpoints(folder):
        return _suggested_values(method or DEFAULT_METHOD, data, overrides)
    values = configuration.to_dict(configuration.load(folder / "config.yaml"))
    name = values["method"]["name"]
    if method not in (None, name):
        raise ValueError(
            f"method: output {folder} is of {name}, not of {method}; leave out the method, or give "
            "another output"
        )
    return values


def _suggested_values(
    method: str, data: dict[str, Any], overrides: dict[str, Any]
) -> dict[str, Any]:
    """Choose the settings for the images and this machine, and print the reasons."""
    data_values = schema.merge(data, overrides.get("data", {}))
    data_config: DataConfig = schema.build(DataConfig, data_values, key="data")
    if "channels" in data_values:
        source = sources.open_source(data_config, "train")
    else:
        data_config, source = open_with_own_channels(data_config)
    chosen = suggestion.suggest(
        data_config,
        source,
        method=method,
        backbone=schema.value_at(overrides, "backbone.name"),
        epochs=overrides.get("epochs"),
        keep_all_images="subset" in overrides.get("data", {}),
        settings={key: value for key, value in overrides.items() if key != "epochs"},
    )
    lines = [f"settings for these {len(source):,} images and this machine:"]
    for key, reason in chosen.reasons.items():
        lines.append(f"  {key}: {chosen.get(key)}    ({reason})")
    process_group.print_once(*lines)
    return chosen.tree
