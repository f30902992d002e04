"""Read dataclasses from YAML and `key=value` text. The declared type of a key decides how its value is read.

YAML guesses a scalar's type from its looks: `010` is 8, `1e5` is a number, `no` is a boolean. This
module takes only the structure from YAML. A text key takes its text unchanged, a number key takes a
number, and `null` has a meaning only for a key that may be empty.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import types
import typing
import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml

BOOLEANS = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}
NULLS = ("", "~", "null", "none")  # spellings of "no value", for keys that may be empty
MAX_INT = 2**31 - 1  # upper bound of whole numbers whose field sets none
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
MERGE = "tag:yaml.org,2002:merge"

# Former names of keys, as old YAMLs, command lines and runs have them. Both are of one section.
RENAMED = {
    "local_batch_size": "micro_batch_size",
    "method.centre_momentum": "method.center_momentum",
}
# Keys that are ignored. A text is the only value that is; None stands for every value.
REMOVED = {"plan.calibration": None, "plan.gpu": "here"}

T = TypeVar("T")
Policy = Literal["same", "free", "warn"]


@dataclass(frozen=True)
class Scalar:
    """The text of a YAML scalar or of the part after `key=`. `plain` means written without quotes."""

    text: str
    plain: bool = True


@dataclass(frozen=True)
class Bounds:
    """The range of a number. Both ends belong to it unless they are open."""

    low: float = 0
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def contains(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return math.isfinite(value) and above and below

    def __str__(self) -> str:
        low = f"{'>' if self.open_low else '>='} {self.low:,}".replace(",", "")
        high = f"{'<' if self.open_high else '<='} {self.high:,}".replace(",", "")
        return low if self.high == math.inf else f"{low} and {high}"


# Ranges of fields whose metadata has none, by the field's name.
BY_NAME: tuple[tuple[re.Pattern[str], Bounds], ...] = (
    (re.compile(r"(.*_)?temperature"), Bounds(open_low=True)),
    (re.compile(r"(.*_)?seconds|hours"), Bounds(high=1e9)),
    (re.compile(r"(.*_)?dims?"), Bounds(1, 2**20)),
    (re.compile(r"(.*_)?momentum"), Bounds(high=1)),
    (re.compile(r"(.*_)?(threads|workers)"), Bounds(high=1024)),
    (re.compile(r"port"), Bounds(high=65535)),
    (re.compile(r"k"), Bounds(1, MAX_INT)),
)


def setting(
    default: T,
    help: str,
    *,
    on_resume: Policy = "same",
    minimum: float | None = None,
    maximum: float = math.inf,
    above: float | None = None,
    below: float | None = None,
) -> T:
    """Declare a field of a configuration dataclass.

    Args:
        default: Default value. Every instance gets its own copy of a list, dict or section.
        help: Meaning, unit and special values, in sentences.
        on_resume: Whether a resumed run may change the value. same: no. free: yes, because it does
            not change what is computed. warn: yes, with a warning. A section's policy covers its
            keys.
        minimum: Smallest number allowed. Default: 0, unless `BY_NAME` has a range for the name.
        maximum: Largest number allowed.
        above: Exclusive lower end, instead of `minimum`.
        below: Exclusive upper end, instead of `maximum`.
    """
    limits = None
    if (minimum, maximum, above, below) != (None, math.inf, None, None):
        limits = Bounds(
            low=above if above is not None else minimum or 0,
            high=below if below is not None else maximum,
            open_low=above is not None,
            open_high=below is not None,
        )
    metadata = {"help": help, "on_resume": on_resume, "bounds": limits}
    if isinstance(default, (list, dict)) or dataclasses.is_dataclass(default):
        return typing.cast(
            T, dataclasses.field(default_factory=lambda: deepcopy(default), metadata=metadata)
        )
    return typing.cast(T, dataclasses.field(default=default, metadata=metadata))


def metadata(kind: type, name: str) -> Mapping[str, Any]:
    """Return what `setting` recorded for a field. A subclass that changes a default inherits it."""
    for ancestor in kind.__mro__:
        field = getattr(ancestor, "__dataclass_fields__", {}).get(name)
        if field is not None and field.metadata:
            return typing.cast(Mapping[str, Any], field.metadata)
    return {}


def bounds(field: dataclasses.Field[Any]) -> Bounds:
    """Return the range of a number: declared, else usual for its name, else finite and at least 0."""
    declared = field.metadata.get("bounds")
    if declared is not None:
        return typing.cast(Bounds, declared)
    return next((usual for pattern, usual in BY_NAME if pattern.fullmatch(field.name)), Bounds())


@cache
def hints(kind: type) -> dict[str, Any]:
    """The type of every field of a dataclass, by its name."""
    return typing.get_type_hints(kind)


def parse_yaml(text: str) -> Any:
    """Parse a YAML text into dicts, lists and `Scalar`s.

    Raises:
        yaml.YAMLError: The text is not YAML, or a mapping has a key twice.
    """
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)
    try:
        node = loader.get_single_node()
        return Scalar("") if node is None else _structure(loader, node, ())
    finally:
        loader.dispose()


def _structure(loader: Any, node: yaml.Node, parents: tuple[int, ...]) -> Any:
    if id(node) in parents:
        raise _problem("an alias contains itself", node)
    path = (*parents, id(node))
    if isinstance(node, yaml.ScalarNode):
        return Scalar(node.value, plain=not node.style)  # without quotes: None or "", by loader
    if isinstance(node, yaml.SequenceNode):
        return [_structure(loader, each, path) for each in node.value]
    assert isinstance(node, yaml.MappingNode), "a YAML node is a scalar, a sequence or a mapping"
    own: dict[str, Any] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _problem("a key is a list or a mapping", key)
        if key.value in own and key.tag != MERGE:
            raise _problem(f"found duplicate key {key.value}", key)
        own[key.value] = None
    loader.flatten_mapping(node)  # `<<: *anchor`; the mapping's own keys come last and win
    return {key.value: _structure(loader, value, path) for key, value in node.value}


def _problem(text: str, node: yaml.Node) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, text, node.start_mark)


def declared(kind: Any, key: str, instead: Mapping[str, Any]) -> Any:
    """The declared type of a dotted key.

    Args:
        kind: The dataclass that the key starts at.
        key: Names joined by dots, such as `optim.base_lr`.
        instead: Types that replace the declared ones, by dotted key.

    Raises:
        ValueError: There is no such key. The message suggests one.
    """
    parents: list[str] = []
    for name in key.split("."):
        if dataclasses.is_dataclass(kind):
            _check_name(typing.cast(type, kind), ".".join([*parents, name]))
            kind = hints(typing.cast(type, kind))[name]
        elif get_origin(kind) is dict:
            kind = get_args(kind)[1]
        elif kind is not Any:
            raise ValueError(f"{key}: no such key. {'.'.join(parents)} is a single value")
        parents.append(name)
        kind = instead.get(".".join(parents), kind)
    return kind


def _check_name(kind: type, key: str) -> None:
    allowed = [field.name for field in dataclasses.fields(kind)]
    name = key.rpartition(".")[2]
    if name not in allowed:
        close = get_close_matches(name, allowed, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{key}: no such key.{hint} Allowed: {', '.join(allowed)}")


def override(kind: Any, key: str, text: str, instead: Mapping[str, Any]) -> dict[str, Any]:
    """The tree that `key=text` sets. Only lists, mappings and untyped values are parsed as YAML.

    Raises:
        ValueError: There is no such key, or the text of a list or a mapping is not YAML.
    """
    kind = declared(kind, key, instead)
    value: Any = Scalar(text)
    if (
        dataclasses.is_dataclass(kind)
        or get_origin(kind) in (list, dict)
        or (kind is Any and text[:1] in ("[", "{", "'", '"'))
    ):
        try:
            value = parse_yaml(text)
        except yaml.YAMLError as error:
            raise ValueError(
                f"{key}: {text!r} is not YAML: {getattr(error, 'problem', None) or error}"
            ) from None
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def merge(tree: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two trees, mapping by mapping. Where both have a value, the other's wins."""
    merged = dict(tree)
    for key, value in other.items():
        old = merged.get(key)
        merged[key] = (
            merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
        )
    return merged


def at(tree: Any, key: str) -> Any:
    """The value of a dotted key in a tree, or None if it is absent."""
    for name in key.split("."):
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree


def rename_keys(tree: dict[str, Any], source: str) -> dict[str, Any]:
    """Return a tree with the present names of its keys, with one warning that lists the former ones.

    Raises:
        ValueError: A key is there under both names.
    """
    tree, notices = deepcopy(tree), []
    for old in (*RENAMED, *REMOVED):
        section, _, name = old.rpartition(".")
        keys = at(tree, section) if section else tree
        if not isinstance(keys, dict) or name not in keys:
            continue
        if old in RENAMED:
            new = RENAMED[old]
            if new.rpartition(".")[2] in keys:
                raise ValueError(f"{source}: {old} is the former name of {new}; give one of them")
            keys[new.rpartition(".")[2]] = keys.pop(name)
            notices.append(f"{old} is now {new}")
        elif REMOVED[old] in (None, keys[name], getattr(keys[name], "text", None)):
            del keys[name]
            notices.append(f"{old}{f'={REMOVED[old]}' if REMOVED[old] else ''} is ignored")
    if notices:
        warnings.warn(f"{source}: {', '.join(notices)}", stacklevel=3)
    return tree


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values by dotted key. An empty mapping is a value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, Mapping) and value
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def build(kind: Any, tree: Any, instead: Mapping[str, Any] | None = None, key: str = "") -> Any:
    """Build a value of the declared type.

    Args:
        kind: A dataclass, or the type of one value.
        tree: Dicts, lists and `Scalar`s of YAML, or the plain values of a manifest.
        instead: Types that replace the declared ones, by dotted key.
        key: Dotted key of the value, for messages.

    Raises:
        ValueError: A value does not have its key's type. The message names both and what is allowed.
    """
    kind = (instead or {}).get(key, kind)
    if dataclasses.is_dataclass(kind):
        return _build_section(typing.cast(type, kind), tree, instead or {}, key)
    if kind is Any:
        return _guess(tree)
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _build_union(inner, tree, key)
    if origin is list:
        if not isinstance(tree, (list, tuple)):
            raise ValueError(f"{key}: {shown(tree)} is not a list; write it as [a, b]")
        return [build(inner[0], each, key=f"{key}[{number}]") for number, each in enumerate(tree)]
    if origin is dict:
        return {
            str(name): build(inner[1], value, instead, f"{key}.{name}")
            for name, value in _mapping(tree, key).items()
        }
    if origin is Literal:
        text = tree.text if isinstance(tree, Scalar) else tree
        if text not in inner:
            raise ValueError(
                f"{key}: {shown(tree)} is not known; choose one of: {', '.join(each or repr(each) for each in inner)}"
            )
        return text
    assert kind in BUILDERS, f"{key}: a field of type {kind} cannot be configured"
    return BUILDERS[kind](tree, key)


def _build_section(kind: type, tree: Any, instead: Mapping[str, Any], key: str) -> Any:
    section = _mapping(tree, key)
    values = {}
    for name, value in section.items():
        full = f"{key}.{name}".lstrip(".")
        _check_name(kind, full)
        values[name] = build(hints(kind)[name], value, instead, full)
    return kind(**values)


def _mapping(tree: Any, key: str) -> Mapping[str, Any]:
    if tree is None or tree == Scalar(""):  # a section whose every line is a comment
        return {}
    if not isinstance(tree, Mapping):
        raise ValueError(
            f"{key}: {shown(tree)} is not a section; write its keys below it, or as {{key: value}}"
        )
    return tree


def _build_union(kinds: Sequence[Any], tree: Any, key: str) -> Any:
    empty = isinstance(tree, Scalar) and tree.plain and tree.text.lower() in NULLS
    if types.NoneType in kinds and (tree is None or empty):
        return None
    problems = []
    for kind in kinds:
        if kind is not types.NoneType:
            try:
                return build(kind, tree, key=key)
            except ValueError as error:
                problems.append(str(error))
    raise ValueError(problems[-1] + (", or null" if types.NoneType in kinds else ""))


def _text(tree: Any, key: str) -> str:
    if isinstance(tree, Scalar):
        return tree.text
    if isinstance(tree, str):
        return tree
    raise ValueError(f"{key}: {shown(tree)} is not text; put it in quotes")


def _bool(tree: Any, key: str) -> bool:
    if isinstance(tree, bool):
        return tree
    word = tree.text.lower() if isinstance(tree, Scalar) else ""
    if word not in BOOLEANS:
        raise ValueError(f"{key}: {shown(tree)} is not a truth value; give true or false")
    return BOOLEANS[word]


def _int(tree: Any, key: str) -> int:
    if isinstance(tree, int) and not isinstance(tree, bool):
        return tree
    if isinstance(tree, Scalar):
        try:
            return int(tree.text)
        except ValueError:
            pass
    raise ValueError(
        f"{key}: {shown(tree)} is not a whole number; write one in decimal digits, such as 100"
    )


def _float(tree: Any, key: str) -> float:
    if isinstance(tree, (int, float)) and not isinstance(tree, bool):
        return _finite(float(tree) if abs(tree) < 1e300 else math.inf, tree, key)
    if isinstance(tree, Scalar):
        text = tree.text.strip().lower()
        signed = text[1:] if text[:1] in ("+", "-") else text
        try:
            return _finite(math.inf if signed in (".inf", ".nan") else float(text), tree, key)
        except ValueError as error:
            if str(error).startswith(key):
                raise
    raise ValueError(f"{key}: {shown(tree)} is not a number; write one such as 0.3 or 1e-6")


def _finite(value: float, tree: Any, key: str) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{key}: {shown(tree)} is not a finite number; give one such as 0.3")
    return value


BUILDERS: dict[Any, Any] = {str: _text, bool: _bool, int: _int, float: _float}


def _guess(tree: Any) -> Any:
    """The value of a key without a declared type. Quotes make it text; else its looks decide."""
    if isinstance(tree, Mapping):
        return {str(key): _guess(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_guess(each) for each in tree]
    if not isinstance(tree, Scalar):
        return tree
    if not tree.plain:
        return tree.text
    if tree.text.lower() in ("true", "false"):
        return tree.text.lower() == "true"
    if tree.text.lower() in NULLS:
        return None
    if re.fullmatch(r"[-+]?\d+", tree.text):
        return int(tree.text)
    return float(tree.text) if NUMBER.fullmatch(tree.text) else tree.text


def shown(tree: Any) -> str:
    """Describe a value in a message."""
    if isinstance(tree, Scalar):
        return repr(tree.text)
    if isinstance(tree, Mapping):
        return "a mapping"
    return "a list" if isinstance(tree, (list, tuple)) else repr(tree)


def check(section: Any, key: str = "") -> None:
    """Check every number below a dataclass against its field's range, and every text for NUL characters.

    Raises:
        ValueError: Names the key, the value and the range.
    """
    for field in dataclasses.fields(section):
        _check_value(getattr(section, field.name), f"{key}.{field.name}".lstrip("."), bounds(field))


def _check_value(value: Any, key: str, allowed: Bounds) -> None:
    if dataclasses.is_dataclass(value):
        check(value, key)
    elif isinstance(value, str):
        if "\0" in value:
            raise ValueError(
                f"{key}: {value!r} holds a NUL character, which no name or path can; leave it out"
            )
    elif isinstance(value, (list, tuple)):
        for number, each in enumerate(value):
            _check_value(each, f"{key}[{number}]", allowed)
    elif isinstance(value, Mapping):
        for name, each in value.items():
            _check_value(
                each,
                f"{key}.{name}",
                Bounds(-math.inf) if not dataclasses.is_dataclass(each) else allowed,
            )
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        whole = isinstance(value, int)
        if whole and allowed.high == math.inf:
            allowed = dataclasses.replace(allowed, high=MAX_INT)
        if not (abs(value) < 2**64 if whole else True) or not allowed.contains(value):
            raise ValueError(
                f"{key}: {value} is out of range; give a {'whole ' if whole else 'finite '}number {allowed}"
            )


def ranged(kind: type[int] | type[float], allowed: Bounds) -> Any:
    """A `type` for argparse that converts an option's text to a number and checks its range."""

    def read(text: str) -> float:
        try:
            value = build(kind, Scalar(text), key="option")
        except ValueError:
            value = math.nan
        if not allowed.contains(value):
            number = "a whole number" if kind is int else "a finite number"
            raise argparse.ArgumentTypeError(f"{text!r} is out of range; give {number} {allowed}")
        return value

    return read


COUNT = ranged(int, Bounds(1, MAX_INT))  # for options that count something
FROM_ZERO = ranged(int, Bounds(0, MAX_INT))
POSITIVE = ranged(float, Bounds(open_low=True))
NOT_NEGATIVE = ranged(float, Bounds())
SHARE = ranged(float, Bounds(high=1, open_low=True))
BELOW_ONE = ranged(float, Bounds(high=1, open_high=True))
PERCENT = ranged(float, Bounds(high=100, open_low=True))
COSINE = ranged(float, Bounds(-1, 1))
THREADS = ranged(int, Bounds(1, 1024))
QUALITY = ranged(int, Bounds(1, 100))
PORT = ranged(int, Bounds(0, 65535))
