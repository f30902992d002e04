"""The name of a configuration's method, which decides the keys of the section `method`."""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ssl_pretrain.schema.typed_values import parse_override
from ssl_pretrain.schema.yaml_tree import Scalar, merge, value_at
from ssl_pretrain.system import program

UNSET = "???"  # default of method.name, which every configuration has to set


def read_name(tree: Mapping[str, Any]) -> str | None:
    """Return the name of the method in a tree of YAML or of plain values, or None without one."""
    name = value_at(tree, "method.name")
    name = name.text if isinstance(name, Scalar) else name
    return None if name in (None, "", UNSET) else str(name)


def override_method(
    tree: Mapping[str, Any], pairs: Iterable[tuple[str, str]], run_type: type
) -> dict[str, Any]:
    """Apply the overrides that may name a method: `method.name=NAME` and `method={name: NAME}`.

    Args:
        tree: Values before the overrides.
        pairs: Key and value of every override. The others are skipped.
        run_type: The dataclass of the configuration.

    Raises:
        ValueError: If the value of `method` is not YAML.
    """
    tree = dict(tree)
    for key, text in pairs:
        if key in ("method", "method.name"):
            tree = merge(tree, parse_override(run_type, key, text, {"method": dict[str, str]}))
    return tree


def refuse_other_method(values: Mapping[str, Any], new_values: Mapping[str, Any]) -> None:
    """Raise ValueError if overrides replace the method that a YAML was written for.

    The new method would keep the YAML's learning rate and views, which belong to the old one. A
    YAML whose section `method` has only a name, such as the base of a study, suits any method.

    Args:
        values: Values of the YAML.
        new_values: The values after the overrides.
    """
    old_name, name = read_name(values), read_name(new_values)
    if old_name in (None, name) or len(values["method"]) < 2:
        return
    raise ValueError(
        f"method.name: {name} would keep the learning rate, the views and the network that this "
        f"file has for {old_name}; take a recipe of {name} "
        f"(`{program.command('list configs')}`), or write one for your images: "
        f"`{program.command('inspect')} DATA --method {name} --write my.yaml`"
    )


def is_user_module(name: str, method_names: Sequence[str]) -> bool:
    """Return True if a method's name is that of a module outside the package."""
    return "." in name or (name not in method_names and Path(f"{name}.py").is_file())


def unknown_method_error(name: str, names: Sequence[str]) -> ValueError:
    """Return the error for a method that does not exist."""
    close = get_close_matches(name.lower(), names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return ValueError(
        f"method.name: {name!r} is not a method.{hint} `{program.command('list methods')}` lists "
        "all; a method of your own is package.module"
    )
