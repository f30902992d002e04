"""Read the YAML and the overrides of a run, and build its configuration from declared types.

The types are the package's dataclasses, or the classes of `key_reference`, which need no torch.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ssl_pretrain.schema import key_hints, method_name, presets
from ssl_pretrain.schema.former_keys import rename_key, rename_keys
from ssl_pretrain.schema.settings import check
from ssl_pretrain.schema.typed_values import build, parse_override
from ssl_pretrain.schema.yaml_tree import Scalar, merge, parse_yaml, value_at

INTERPOLATION_ERROR = (
    "'${' is not allowed: values are not interpolated, so that no secret from the environment ends "
    "up in a logged configuration; write the value itself"
)


class ConfigError(ValueError):
    """Error in a configuration. The message names the file, key, value and allowed values."""


@dataclass(frozen=True)
class Declarations:
    """The types that a configuration is built from."""

    run: type
    method: Callable[[str], Any]  # type of the section `method`, by the name of the method
    method_names: Callable[[], list[str]]


@contextmanager
def name_file_in_errors(source: str) -> Iterator[None]:
    """Turn a ValueError into a ConfigError whose message starts with the name of the file."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from None


def load(path: str | Path, overrides: Sequence[str], declarations: Declarations) -> Any:
    """Read a configuration from a preset or a YAML file, and apply `key=value` overrides.

    A configuration without an `output` gets runs/NAME, after the name of its file.

    Args:
        path: Name of a preset or path of a YAML file.
        overrides: Settings that replace those of the file.
        declarations: Types of the configuration.

    Raises:
        ConfigError: If a key or a value is not allowed.
    """
    tree = apply_overrides(read_yaml(Path(path)), overrides, str(path), declarations)
    if value_at(tree, "output") in (None, "", Scalar("")):
        tree["output"] = f"runs/{presets.find(path).stem}"
    return build_config(tree, str(path), declarations)


def build_config(tree: dict[str, Any], source: str, declarations: Declarations) -> Any:
    """Build a configuration from the tree of a YAML file or the values of a manifest.

    Raises:
        ConfigError: If a key or a value is not allowed.
    """
    if "${" in str(tree):
        raise ConfigError(f"{source}: {INTERPOLATION_ERROR}")
    with name_file_in_errors(source):
        tree = rename_keys(tree, source)
        config = build(declarations.run, tree, {"method": _method_type(tree, declarations)})
        check(config)
    return config


def apply_overrides(
    values: dict[str, Any], overrides: Sequence[str], source: str, declarations: Declarations
) -> dict[str, Any]:
    """Apply `key=value` overrides to the values of a YAML file or a manifest.

    Raises:
        ConfigError: If an override is not key=value, or its key does not exist.
    """
    pairs = [pair for pair in map(_split_override, overrides) if pair is not None]
    with name_file_in_errors(source):
        values = rename_keys(values, source)
        # method.name is set first, because it decides the types of the method's keys.
        values_with_method = method_name.override_method(values, pairs, declarations.run)
        replacements = {"method": _method_type(values_with_method, declarations)}
        method_name.refuse_other_method(values, values_with_method)
        crops = value_at(values, "views.crops")
        for key, text in pairs:
            key_hints.refuse_misspelled_crop(key, list(crops or {}))
            values = merge(values, parse_override(declarations.run, key, text, replacements))
    return values


def split_values(key: str, text: str) -> list[str]:
    r"""Split the comma-separated values of a sweep.

    A list, a mapping and the value of `output` stay whole. `\,` is a comma inside a value.
    """
    if key == "output" or text.startswith(("[", "{")):
        return [text]
    return [value.replace("\\,", ",") for value in re.split(r"(?<!\\),", text)]


def _split_override(text: str) -> tuple[str, str] | None:
    """Return the key and value of an override, or None if the key no longer has an effect."""
    key, separator, value = text.partition("=")
    if not separator:
        raise ConfigError(f"{text!r}: not an override; {_explain_override(text)}")
    if "${" in text:
        raise ConfigError(f"{key}: {INTERPOLATION_ERROR}")
    current_key = rename_key(key, value)
    return (current_key, value) if current_key else None


def _explain_override(text: str) -> str:
    """Return how to write an override that has no equals sign."""
    if text.endswith(("]", "}")):
        return "quote a list or a mapping: 'views.crops.global.scale=[0.2, 1.0]'"
    key, colon, value = text.partition(":")
    if colon and value and key.replace(".", "").isidentifier():
        return f"write {key}={value.strip()}"
    return "give key=value without spaces, such as optim.base_lr=0.3"


def _method_type(tree: dict[str, Any], declarations: Declarations) -> Any:
    """Return the type of the section `method`, for the method that the tree names."""
    section = value_at(tree, "method")
    if isinstance(section, Scalar) and section.text:
        remedy = key_hints.suggest_assignment("method", section.text)
        raise ValueError(f"method: {section.text!r} is not a section; {remedy}")
    name = method_name.read_name(tree)
    if name is None:
        names = ", ".join(declarations.method_names())
        raise ValueError(f"method.name is missing; choose one of: {names}")
    return declarations.method(name)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file or a preset. Its scalars stay text until the types of its keys are known.

    Raises:
        ConfigError: If there is no such file or preset, or if it is not a YAML mapping in UTF-8.
    """
    text = _read_text(path)
    if "${" in text:
        raise ConfigError(f"{path}: {INTERPOLATION_ERROR}")
    try:
        tree = parse_yaml(text)
    except yaml.YAMLError as error:
        problem = f"not valid YAML{_yaml_problem(error, text)}"
        remedy = "Write each key once, as 'key: value'"
        if "\t" in text and "cannot start any token" in problem:
            remedy = "Indent with spaces instead of tabs"
        raise ConfigError(f"{path}: {problem}. {remedy}") from None
    if tree == Scalar(""):
        return {}
    if not isinstance(tree, dict):
        kind = "a list" if isinstance(tree, list) else f"the text {tree.text!r}"
        raise ConfigError(
            f"{path}: a configuration must be a mapping of keys, got {kind}; write each "
            "key as 'key: value'"
        )
    return tree


def _read_text(path: Path) -> str:
    """Read the text of a YAML file or a preset.

    Raises:
        ConfigError: If there is no such file or preset, or if it is not UTF-8.
    """
    try:
        content = presets.find(path).read_bytes()
    except ValueError as error:
        raise ConfigError(str(error)) from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if path.suffix.lower() not in (".yaml", ".yml"):
            raise ConfigError(f"{path}: not a YAML file; {presets.DATA_HINT}={path}") from None
        line, byte = content.count(b"\n", 0, error.start) + 1, content[error.start]
        problem = f"not UTF-8 text: byte 0x{byte:02x} at line {line}. Save the file as UTF-8"
        raise ConfigError(f"{path}: {problem}") from None


def _yaml_problem(error: yaml.YAMLError, text: str) -> str:
    """Format an error of PyYAML as ` at line N: PROBLEM`."""
    if isinstance(error, yaml.reader.ReaderError):
        character = chr(error.character) if isinstance(error.character, int) else error.character
        line = text.count("\n", 0, max(0, text.find(str(character)))) + 1
        return f" at line {line}: {error.reason}"
    mark = getattr(error, "problem_mark", None)
    line_number = f" at line {mark.line + 1}" if mark else ""
    return f"{line_number}: {getattr(error, 'problem', None) or error}"
