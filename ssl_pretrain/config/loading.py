"""Read a configuration from YAML and `key=value` overrides, or from a checkpoint's manifest."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ssl_pretrain import methods
from ssl_pretrain.config.run_config import RunConfig
from ssl_pretrain.methods.base import MethodConfig
from ssl_pretrain.schema import config_file
from ssl_pretrain.schema.config_file import Declarations

NO_METHOD = "none"  # method.name for weights that were not trained by this project


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a configuration from a preset or a YAML file, and apply `key=value` overrides.

    Raises:
        ConfigError: If a key or a value is not allowed.
    """
    config = config_file.load(path, overrides, DECLARATIONS)
    assert isinstance(config, RunConfig), "the schema is RunConfig"
    return config


def from_dict(tree: dict[str, Any], source: str = "the checkpoint's config") -> RunConfig:
    """Build a configuration from the values of a checkpoint's manifest or of a YAML file.

    Raises:
        ConfigError: If a key or a value is not allowed.
    """
    config = config_file.build_config(tree, source, DECLARATIONS)
    assert isinstance(config, RunConfig), "the schema is RunConfig"
    return config


def without_method(overrides: Sequence[str], source: str) -> RunConfig:
    """Return the configuration for evaluating weights that were not trained by this project.

    Raises:
        ConfigError: If an override is not allowed.
    """
    return from_dict(apply_overrides({"method": {"name": NO_METHOD}}, overrides, source), source)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Return the configuration as plain values, as manifests store them."""
    return dataclasses.asdict(config)


def to_yaml(config: RunConfig) -> str:
    """Return the configuration as YAML."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def apply_overrides(
    values: dict[str, Any], overrides: Sequence[str], source: str
) -> dict[str, Any]:
    """Apply `key=value` overrides to the values of a YAML file or a manifest.

    Raises:
        ConfigError: If an override is not key=value, or its key does not exist.
    """
    return config_file.apply_overrides(values, overrides, source, DECLARATIONS)


def _method_config(name: str) -> type[MethodConfig]:
    return MethodConfig if name == NO_METHOD else methods.find(name).Config


DECLARATIONS = Declarations(RunConfig, _method_config, methods.names)
