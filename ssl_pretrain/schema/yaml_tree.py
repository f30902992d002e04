"""Parse YAML into dicts and lists in which every scalar stays text.

YAML guesses the type of a scalar from its spelling: `010` is 8, and `no` is a boolean. This module
keeps the text of each scalar, and `typed_values` converts it to the declared type of its key.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

MERGE_TAG = "tag:yaml.org,2002:merge"


@dataclass(frozen=True)
class Scalar:
    """Text of a YAML scalar, or of the value in a `key=value` argument."""

    text: str
    plain: bool = True  # False if the scalar is quoted


def parse_yaml(text: str) -> Any:
    """Parse a YAML text into dicts, lists and `Scalar`s.

    Raises:
        yaml.YAMLError: If the text is not YAML, or a mapping contains a key twice.
    """
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)
    try:
        node = loader.get_single_node()
        return Scalar("") if node is None else _build_tree(loader, node, ())
    finally:
        loader.dispose()


def _build_tree(loader: Any, node: yaml.Node, parents: tuple[int, ...]) -> Any:
    if id(node) in parents:
        raise _yaml_error("an alias contains itself", node)
    ancestors = (*parents, id(node))
    if isinstance(node, yaml.ScalarNode):
        return Scalar(node.value, plain=not node.style)  # the style is None or "" without quotes
    if isinstance(node, yaml.SequenceNode):
        return [_build_tree(loader, element, ancestors) for element in node.value]
    assert isinstance(node, yaml.MappingNode), "a YAML node is a scalar, a sequence or a mapping"
    keys: set[str] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _yaml_error("a key is a list or a mapping", key)
        if key.value in keys and key.tag != MERGE_TAG:
            raise _yaml_error(f"found duplicate key {key.value}", key)
        keys.add(key.value)
    loader.flatten_mapping(node)  # resolves `<<: *anchor`; the mapping's own keys win
    return {key.value: _build_tree(loader, value, ancestors) for key, value in node.value}


def _yaml_error(text: str, node: yaml.Node) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, text, node.start_mark)


def merge(tree: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two trees, mapping by mapping. Values of `other` take precedence."""
    result = dict(tree)
    for key, value in other.items():
        old = result.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            value = merge(old, value)
        result[key] = value
    return result


def value_at(tree: Any, key: str) -> Any:
    """Return the value of a dotted key in a tree, or None if it is absent."""
    for name in key.split("."):
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree


def nest(key: str, value: Any) -> dict[str, Any]:
    """Return the tree in which a dotted key has the value and no other key is present."""
    name, dot, rest = key.partition(".")
    return {name: nest(rest, value) if dot else value}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of a tree by dotted key. An empty mapping counts as a value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        is_section = isinstance(value, Mapping) and value
        flat |= flatten(value, f"{prefix}{key}.") if is_section else {f"{prefix}{key}": value}
    return flat
