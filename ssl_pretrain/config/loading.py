"""Read a configuration from YAML and `key=value` overrides, or from a checkpoint's manifest."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from ssl_pretrain import methods, schema
from ssl_pretrain.config.run_config import RunConfig
from ssl_pretrain.methods.base import MethodConfig
from ssl_pretrain.schema import Scalar

NO_METHOD = "none"  # method.name for weights that were not trained by this project
INTERPOLATION_ERROR = (
    "'${' is not allowed: values are not interpolated, so that no secret from the environment ends "
    "up in a logged configuration; write the value itself"
)


class ConfigError(ValueError):
    """Error in a configuration. The message names the file, key, value and allowed values."""


@contextmanager
def name_file_in_errors(source: str) -> Iterator[None]:
    """Turn a ValueError into a ConfigError whose message starts with the name of the file."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from None


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a configuration from a YAML file and apply `key=value` overrides.

    Raises:
        ConfigError: If a key or a value is not allowed.
    """
    tree = apply_overrides(read_yaml(Path(path)), overrides, str(path))
    if schema.value_at(tree, "output") in (None, "", Scalar("")):
        tree["output"] = f"runs/{Path(path).stem}"
    return from_dict(tree, str(path))


def from_dict(tree: dict[str, Any], source: str = "the checkpoint's config") -> RunConfig:
    """Build a configuration from the values of a checkpoint's manifest or of a YAML file.

    Raises:
        ConfigError: If a key or a value is not allowed.
    """
    if "${" in str(tree):
        raise ConfigError(f"{source}: {INTERPOLATION_ERROR}")
    with name_file_in_errors(source):
        tree = schema.rename_keys(tree, source)
        config = schema.build(RunConfig, tree, {"method": _method_config(tree)})
        schema.check(config)
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
    pairs = [pair for pair in map(_split_override, overrides) if pair is not None]
    with name_file_in_errors(source):
        values = schema.rename_keys(values, source)
        # method.name is set first, because it decides the types of the method's keys.
        values_with_method = values
        for key, text in pairs:
            if key in ("method", "method.name"):
                tree = schema.parse_override(RunConfig, key, text, {"method": dict[str, str]})
                values_with_method = schema.merge(values_with_method, tree)
        replacements = {"method": _method_config(values_with_method)}
        for key, text in pairs:
            values = schema.merge(values, schema.parse_override(RunConfig, key, text, replacements))
    return values


def _split_override(text: str) -> tuple[str, str] | None:
    """Return the key and value of an override, or None if the key no longer has an effect."""
    key, separator, value = text.partition("=")
    if not separator:
        raise ConfigError(f"{text!r}: not an override; give key=value, such as optim.base_lr=0.3")
    if "${" in text:
        raise ConfigError(f"{key}: {INTERPOLATION_ERROR}")
    current_key = schema.rename_key(key, value)
    return (current_key, value) if current_key else None


def _method_config(tree: dict[str, Any]) -> type[MethodConfig]:
    """Return the configuration class of the method that the tree names."""
    name = schema.value_at(tree, "method.name")
    name = name.text if isinstance(name, Scalar) else name
    if not name or name == "???":
        raise ValueError(f"method.name is missing; choose one of: {', '.join(methods.names())}")
    return MethodConfig if name == NO_METHOD else methods.find(str(name)).Config


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file. Its scalars stay text until the types of their keys are known.

    Raises:
        ConfigError: If the file does not exist or is not a YAML mapping in UTF-8.
    """
    if not path.is_file():
        yaml_files = sorted(map(str, path.parent.glob("*.yaml"))) if path.parent.is_dir() else []
        hint = "Give the path of a YAML file, such as configs/simclr_digits.yaml"
        if yaml_files:
            hint = f"Choose one of: {', '.join(yaml_files)}"
        raise ConfigError(f"{path}: no such file. {hint}")
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = content.count(b"\n", 0, error.start) + 1, content[error.start]
        problem = f"not UTF-8 text: byte 0x{byte:02x} at line {line}. Save the file as UTF-8"
        raise ConfigError(f"{path}: {problem}") from None
    if "${" in text:
        raise ConfigError(f"{path}: {INTERPOLATION_ERROR}")
    try:
        tree = schema.parse_yaml(text)
    except yaml.YAMLError as error:
        problem = f"not valid YAML{_yaml_problem(error, text)}"
        raise ConfigError(f"{path}: {problem}. Write each key once, as 'key: value'") from None
    if tree == Scalar(""):
        return {}
    if not isinstance(tree, dict):
        kind = "a list" if isinstance(tree, list) else f"the text {tree.text!r}"
        raise ConfigError(f"{path}: a configuration must be a mapping of keys, got {kind}")
    return tree


def _yaml_problem(error: yaml.YAMLError, text: str) -> str:
    """Format an error of PyYAML as ` at line N: PROBLEM`."""
    if isinstance(error, yaml.reader.ReaderError):
        character = chr(error.character) if isinstance(error.character, int) else error.character
        line = text.count("\n", 0, max(0, text.find(str(character)))) + 1
        return f" at line {line}: {error.reason}"
    mark = getattr(error, "problem_mark", None)
    line_number = f" at line {mark.line + 1}" if mark else ""
    return f"{line_number}: {getattr(error, 'problem', None) or error}"
