"""The keys and methods of the package, read from a generated file without importing torch.

`python -m ssl_pretrain.command.reference_files` writes the file from the dataclasses.
"""

import functools
from typing import Any

from ssl_pretrain.schema import key_entries, packaged_reference
from ssl_pretrain.schema.config_file import Declarations
from ssl_pretrain.schema.key_entries import NAME, SECTIONS, Entries
from ssl_pretrain.schema.method_name import is_user_module, unknown_method_error
from ssl_pretrain.schema.typed_values import declared_type


def keys() -> Entries:
    """Return the description of every key except those of the methods, by dotted key."""
    return dict(packaged_reference.read()["keys"])


def methods() -> dict[str, dict[str, Any]]:
    """Return the summary, the paper and the keys of each method, by its name."""
    return dict(packaged_reference.read()["methods"])


@functools.cache
def _run_type() -> type:
    return key_entries.build_section("RunConfig", keys())


@functools.cache
def _method_type(name: str) -> Any:
    """Return the type of the section `method`. The keys of a user's own method are not known."""
    if is_user_module(name, list(methods())):
        return dict[str, Any]
    if name not in methods():
        raise unknown_method_error(name, list(methods()))
    return key_entries.build_section("Config", methods()[name]["keys"])


def declarations() -> Declarations:
    """Return classes that refuse the same keys and values as the package's dataclasses."""
    return Declarations(_run_type(), _method_type, lambda: list(methods()))


def find_entry(key: str) -> tuple[str, dict[str, Any]]:
    """Return the key as it is listed in the file, and its description.

    Args:
        key: A dotted key. A key of a method is `method.NAME.KEY`, with the name of the method.

    Raises:
        ValueError: If there is no such key.
    """
    entries, local_key = keys(), key
    if key.startswith("method.") and key not in entries:
        method, _, local_key = key.removeprefix("method.").partition(".")
        replacements = {"method": _method_type(method)}
        entries = methods()[method]["keys"]
        declared_type(_run_type(), f"method.{local_key}", replacements)  # raises for a wrong key
    else:
        declared_type(_run_type(), key, {})
    local_key = _listed_key(local_key, entries)
    if local_key not in entries:
        raise ValueError(f"{key} has no help of its own; see {key.rpartition('.')[0]}")
    return local_key, entries[local_key]


def _listed_key(key: str, entries: Entries) -> str:
    """Replace a name that the user chose, as in `views.crops.global.size`, by `<name>`."""
    for section, entry in entries.items():
        if entry["type"] == SECTIONS and key.startswith(f"{section}."):
            _, _, rest = key.removeprefix(f"{section}.").partition(".")
            return f"{section}.{NAME}.{rest}" if rest else section
    return key
