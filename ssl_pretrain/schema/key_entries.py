"""Describe the keys of configuration dataclasses as plain values, and rebuild classes from them.

A rebuilt class refuses the same values as the original dataclass, with the same messages. It needs
no torch.
"""

import dataclasses
import functools
import math
import operator
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin

from ssl_pretrain.schema.settings import (
    Bounds,
    ResumePolicy,
    field_bounds,
    field_metadata,
    field_types,
    field_unit,
)

NAME = "<name>"  # stands for a name that the user chooses, as in `views.crops.<name>.size`
SECTION, SECTIONS = "section", "sections by name"  # types of keys that hold other keys
CHOICE = "choice"
_SCALARS = {"int": int, "float": float, "bool": bool, "str": str, "any": Any, "null": None}
_SCALAR_NAMES = {kind: name for name, kind in _SCALARS.items()} | {types.NoneType: "null"}
_CONTAINER = re.compile(r"(list|dict)\[(?:str, )?(.*)\]")

Entries = dict[str, dict[str, Any]]  # description of each key, by dotted key


def describe_keys(kind: type, prefix: str = "", policy: ResumePolicy = "same") -> Entries:
    """Return the description of every key of a dataclass and its sections.

    Args:
        kind: The dataclass.
        prefix: Text before each key, such as `optim.`.
        policy: Resume policy of the section, which applies to all of its keys.
    """
    entries: Entries = {}
    for field in dataclasses.fields(kind):
        key, field_type = f"{prefix}{field.name}", field_types(kind)[field.name]
        metadata = field_metadata(kind, field.name)
        own_policy = policy if policy != "same" else metadata.get("on_resume", "same")
        entry = {"help": metadata.get("help", ""), "on_resume": own_policy}
        if dataclasses.is_dataclass(field_type):
            entries[key] = {"type": SECTION, **entry}
            entries |= describe_keys(typing.cast(type, field_type), f"{key}.", own_policy)
        elif get_origin(field_type) is dict and dataclasses.is_dataclass(get_args(field_type)[1]):
            entries[key] = {"type": SECTIONS, **entry}
            entries |= describe_keys(get_args(field_type)[1], f"{key}.{NAME}.", own_policy)
        else:
            entries[key] = _describe_value(field, field_type) | entry
    return entries


def _describe_value(field: dataclasses.Field[Any], kind: Any) -> dict[str, Any]:
    factory = field.default_factory
    default = field.default if factory is dataclasses.MISSING else factory()
    entry: dict[str, Any] = {"type": _name_type(kind), "default": default}
    for alternative in (kind, *get_args(kind)):
        if get_origin(alternative) is Literal:
            entry["choices"] = list(get_args(alternative))
    if holds_numbers(entry["type"]):
        entry["unit"] = field_unit(field)
        bounds = dataclasses.asdict(field_bounds(field))
        high = None if bounds["high"] == math.inf else bounds["high"]  # JSON has no infinity
        entry["bounds"] = bounds | {"high": high}
    return entry


def holds_numbers(type_name: str) -> bool:
    """Return True if a value of the type is a number or a list of numbers."""
    return re.search(r"\b(int|float)\b", type_name) is not None


def _name_type(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return CHOICE
    if origin in (Union, types.UnionType):
        return " | ".join(map(_name_type, arguments))
    if origin in (list, dict):
        return f"{origin.__name__}[{', '.join(map(_name_type, arguments))}]"
    return _SCALAR_NAMES[kind]


def build_section(name: str, entries: Mapping[str, Mapping[str, Any]], prefix: str = "") -> type:
    """Build the dataclass of a section from a description by `describe_keys`.

    Args:
        name: Name of the class.
        entries: Description of every key, including keys of other sections.
        prefix: Text before the keys of this section, such as `optim.`.
    """
    fields = []
    for key, entry in entries.items():
        field_name = key.removeprefix(prefix)
        if key.startswith(prefix) and "." not in field_name:
            metadata = {**entry, "bounds": _build_bounds(entry)}
            field = dataclasses.field(default=None, metadata=metadata)
            fields.append((field_name, _build_type(key, entry, entries), field))
    return dataclasses.make_dataclass(name, fields)


def _build_bounds(entry: Mapping[str, Any]) -> Bounds | None:
    if "bounds" not in entry:
        return None
    high = entry["bounds"]["high"]
    return Bounds(**entry["bounds"] | {"high": math.inf if high is None else high})


def _build_type(key: str, entry: Mapping[str, Any], entries: Mapping[str, Any]) -> Any:
    if entry["type"] == SECTION:
        return build_section(key, entries, f"{key}.")
    if entry["type"] == SECTIONS:
        return types.GenericAlias(dict, (str, build_section(key, entries, f"{key}.{NAME}.")))
    kinds = [_parse_type(text, entry) for text in entry["type"].split(" | ")]
    return functools.reduce(operator.or_, kinds)


def _parse_type(text: str, entry: Mapping[str, Any]) -> Any:
    if text == CHOICE:
        return Literal[tuple(entry["choices"])]
    if container := _CONTAINER.fullmatch(text):
        element = _parse_type(container[2], entry)
        kind, names = (list, ()) if container[1] == "list" else (dict, (str,))
        return types.GenericAlias(kind, (*names, element))
    return _SCALARS[text]
