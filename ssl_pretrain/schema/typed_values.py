"""Convert text and YAML trees to the declared types of keys.

The declared type decides, not the spelling. `010` is the number 10 for a number key and the text
"010" for a text key. `null` means no value for a key that may be empty.
"""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from ssl_pretrain.schema import key_hints
from ssl_pretrain.schema.settings import field_types
from ssl_pretrain.schema.yaml_tree import Scalar, nest, parse_yaml

BOOLEANS = dict.fromkeys(("true", "yes", "on", "1"), True)
BOOLEANS |= dict.fromkeys(("false", "no", "off", "0"), False)
NULLS = ("", "~", "null", "none")  # spellings of "no value", for keys that may be empty
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def declared_type(kind: Any, key: str, replacements: Mapping[str, Any]) -> Any:
    """Return the declared type of a dotted key.

    Args:
        kind: The dataclass in which the key starts.
        key: Names joined by dots, such as `optim.base_lr`.
        replacements: Types to use instead of the declared ones, by dotted key.

    Raises:
        ValueError: If there is no such key. The message suggests a similar one.
    """
    parents: list[str] = []
    for name in key.split("."):
        if dataclasses.is_dataclass(kind):
            _require_field(typing.cast(type, kind), ".".join([*parents, name]))
            kind = field_types(typing.cast(type, kind))[name]
        elif get_origin(kind) is dict:
            kind = get_args(kind)[1]
        elif kind is not Any:
            suggestions = key_hints.keys_named(name)[: key_hints.MAX_SUGGESTIONS]
            hint = f". Did you mean {' or '.join(map(repr, suggestions))}?" if suggestions else ""
            raise ValueError(f"{key}: no such key. {'.'.join(parents)} is a single value{hint}")
        parents.append(name)
        kind = replacements.get(".".join(parents), kind)
    return kind


def _require_field(kind: type, key: str) -> None:
    """Raise ValueError unless the last name of a dotted key is a field of a dataclass."""
    allowed = [field.name for field in dataclasses.fields(kind)]
    name = key.rpartition(".")[2]
    if name not in allowed:
        raise ValueError(key_hints.describe_unknown_key(key, allowed))


def parse_override(
    kind: Any, key: str, text: str, replacements: Mapping[str, Any]
) -> dict[str, Any]:
    """Return `key=text` as a tree. The text is YAML for lists, mappings and untyped values.

    Raises:
        ValueError: If there is no such key, or the text of a list or a mapping is not YAML.
    """
    kind = declared_type(kind, key, replacements)
    is_structured = dataclasses.is_dataclass(kind) or get_origin(kind) in (list, dict)
    is_list = bool(_list_types(kind)) and text[:1] == "["
    value: Any = Scalar(text)
    if is_structured or is_list or (kind is Any and text[:1] in ("[", "{", "'", '"')):
        try:
            value = parse_yaml(text)
        except yaml.YAMLError as error:
            problem = getattr(error, "problem", None) or error
            raise ValueError(f"{key}: {text!r} is not YAML: {problem}") from None
    return nest(key, value)


def build(
    kind: Any, tree: Any, replacements: Mapping[str, Any] | None = None, key: str = ""
) -> Any:
    """Build a value of the declared type.

    Args:
        kind: A dataclass, or the type of one value.
        tree: Dicts, lists and `Scalar`s of YAML, or the plain values of a manifest.
        replacements: Types to use instead of the declared ones, by dotted key.
        key: Dotted key of the value.

    Raises:
        ValueError: If a value does not have its key's type. The message says what is allowed.
    """
    replacements = replacements or {}
    kind = replacements.get(key, kind)
    origin, type_arguments = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _build_section(typing.cast(type, kind), tree, replacements, key)
    if kind is Any:
        return _guess_value(tree)
    if origin in (Union, types.UnionType):
        return _build_union(type_arguments, tree, key)
    if origin is list:
        if not isinstance(tree, (list, tuple)):
            raise ValueError(f"{key}: {_describe(tree)} is not a list; write it as [a, b]")
        return [
            build(type_arguments[0], value, key=f"{key}[{index}]")
            for index, value in enumerate(tree)
        ]
    if origin is dict:
        return {
            str(name): build(type_arguments[1], value, replacements, f"{key}.{name}")
            for name, value in _require_mapping(tree, key).items()
        }
    if origin is Literal:
        return _build_choice(type_arguments, tree, key)
    assert kind in BUILDERS, f"{key}: a field of type {kind} cannot be configured"
    return BUILDERS[kind](tree, key)


def _build_section(kind: type, tree: Any, replacements: Mapping[str, Any], key: str) -> Any:
    values = {}
    for name, value in _require_mapping(tree, key).items():
        full_key = f"{key}.{name}".lstrip(".")
        _require_field(kind, full_key)
        values[name] = build(field_types(kind)[name], value, replacements, full_key)
    return kind(**values)


def _require_mapping(tree: Any, key: str) -> Mapping[str, Any]:
    """Return the keys of a section, or raise ValueError if the tree is a value or a list."""
    if tree is None or tree == Scalar(""):  # a section whose lines are all comments
        return {}
    if not isinstance(tree, Mapping):
        text = tree.text if isinstance(tree, Scalar) else str(tree)
        remedy = key_hints.suggest_assignment(key, text)
        raise ValueError(
            f"{key}: {_describe(tree)} is not a section; "
            f"{remedy or 'write its keys below it, or as {key: value}'}"
        )
    return tree


def _build_union(kinds: Sequence[Any], tree: Any, key: str) -> Any:
    is_null = isinstance(tree, Scalar) and tree.plain and tree.text.lower() in NULLS
    if types.NoneType in kinds and (tree is None or is_null):
        return None
    list_types = [kind for kind in kinds if get_origin(kind) is list]
    if list_types and isinstance(tree, (list, tuple)):
        return build(list_types[0], tree, key=key)
    problem = ""
    for kind in kinds:
        if kind is not types.NoneType and kind not in list_types:
            try:
                return build(kind, tree, key=key)
            except ValueError as error:
                problem = str(error)
    alternatives = ", or a list as [a, b]" if list_types else ""
    raise ValueError(problem + alternatives + (", or null" if types.NoneType in kinds else ""))


def _list_types(kind: Any) -> list[Any]:
    """Return the types of lists among the alternatives of a union."""
    is_union = get_origin(kind) in (Union, types.UnionType)
    return [option for option in get_args(kind) if is_union and get_origin(option) is list]


def _build_choice(allowed: Sequence[str], tree: Any, key: str) -> str:
    text = tree.text if isinstance(tree, Scalar) else tree
    if text not in allowed:
        choices = ", ".join(choice or repr(choice) for choice in allowed)
        raise ValueError(f"{key}: {_describe(tree)} is not known; choose one of: {choices}")
    return typing.cast(str, text)


def _build_text(tree: Any, key: str) -> str:
    text = tree.text if isinstance(tree, Scalar) else tree
    if not isinstance(text, str):
        raise ValueError(f"{key}: {_describe(tree)} is not text; put it in quotes")
    return text


def _build_bool(tree: Any, key: str) -> bool:
    if isinstance(tree, bool):
        return tree
    word = tree.text.lower() if isinstance(tree, Scalar) else ""
    if word not in BOOLEANS:
        raise ValueError(f"{key}: {_describe(tree)} is not a boolean; give true or false")
    return BOOLEANS[word]


def _build_int(tree: Any, key: str) -> int:
    if isinstance(tree, int) and not isinstance(tree, bool):
        return tree
    if isinstance(tree, Scalar):
        with suppress(ValueError):
            return int(tree.text)
    raise ValueError(
        f"{key}: {_describe(tree)} is not a whole number; write one in decimal digits, such as 100"
    )


def _build_float(tree: Any, key: str) -> float:
    value = _parse_float(tree)
    if value is None:
        raise ValueError(f"{key}: {_describe(tree)} is not a number; write one such as 0.3 or 1e-6")
    if not math.isfinite(value):
        raise ValueError(f"{key}: {_describe(tree)} is not a finite number; give one such as 0.3")
    return value


def _parse_float(tree: Any) -> float | None:
    """Return the value of a number, infinity if it is too large, or None if it is no number."""
    number: str | float
    if isinstance(tree, Scalar):  # YAML writes .inf and .nan
        number = tree.text.strip().lower().replace(".inf", "inf").replace(".nan", "nan")
    elif isinstance(tree, (int, float)) and not isinstance(tree, bool):
        number = tree
    else:
        return None
    try:
        return float(number)
    except OverflowError:
        return math.inf
    except ValueError:
        return None


BUILDERS: dict[Any, Callable[[Any, str], Any]] = {
    str: _build_text,
    bool: _build_bool,
    int: _build_int,
    float: _build_float,
}


def _guess_value(tree: Any) -> Any:
    """Return the value of a key without a declared type. A value in quotes is text."""
    if isinstance(tree, Mapping):
        return {str(key): _guess_value(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_guess_value(value) for value in tree]
    if not isinstance(tree, Scalar):
        return tree
    text, word = tree.text, tree.text.lower()
    if not tree.plain:
        return text
    if word in ("true", "false"):
        return word == "true"
    if word in NULLS:
        return None
    if re.fullmatch(r"[-+]?\d+", text):
        return int(text)
    return float(text) if NUMBER.fullmatch(text) else text


def _describe(tree: Any) -> str:
    """Describe a value for an error message."""
    if isinstance(tree, Scalar):
        return repr(tree.text)
    if isinstance(tree, Mapping):
        return "a mapping"
    return "a list" if isinstance(tree, (list, tuple)) else repr(tree)
