"""Help for the keys of a configuration, from the generated reference."""

import argparse
import textwrap
from collections.abc import Mapping
from typing import Any

from ssl_pretrain.schema import key_reference
from ssl_pretrain.schema.key_entries import NAME, SECTION, SECTIONS
from ssl_pretrain.schema.key_text import (
    ON_RESUME,
    describe_range,
    describe_type,
    format_default,
    format_rows,
    text_width,
)
from ssl_pretrain.system.output_streams import redirect_to_null


class HelpAction(argparse.Action):
    """The option `--help [KEY]` of commands that take keys, which exits after printing the help."""

    def __init__(self, **arguments: Any) -> None:
        help_text = "print this help, or the help of one key, and exit"
        super().__init__(**arguments | {"nargs": "?", "metavar": "KEY", "help": help_text})

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, key: Any, *_: Any) -> None:
        """Print the help and exit. An unknown key is an error."""
        try:
            if key:
                print(explain_key(key), flush=True)
            else:
                parser.print_help()
                print(f"\nkeys, explained by --help KEY:\n{explain_key()}", flush=True)
        except ValueError as error:
            parser.error(str(error))
        except BrokenPipeError:  # the reader, such as `head`, has exited
            redirect_to_null(1)
        parser.exit()


def explain_key(key: str = "") -> str:
    """Return the help of a key, or the keys of a section. An empty key lists the sections.

    A method's name comes before its keys, as in `method.simclr.temperature`.

    Raises:
        ValueError: If there is no such key.
    """
    if not key:
        return _list_keys(_children(""))
    if key == "method":
        return _list_keys(_children("method.")) + "\n\n" + _list_methods()
    section, _, name = key.partition(".")
    if section == "method" and name in key_reference.methods():
        return _explain_method(name)
    if section == "method" and "." not in name and name != "name":
        return _explain_key_of_methods(name)
    listed_key, entry = key_reference.find_entry(key)
    if entry["type"] in (SECTION, SECTIONS):
        prefix = f"{listed_key}." if entry["type"] == SECTION else f"{listed_key}.{NAME}."
        return _list_keys(_children(prefix))
    heading = f"{key} ({describe_type(entry)}, default {format_default(entry)})"
    lines = [entry["help"], describe_range(entry), ON_RESUME[entry["on_resume"]]]
    return "\n".join([heading, *(_indent(line) for line in lines if line)])


def _children(prefix: str) -> dict[str, dict[str, Any]]:
    """Return the entries of the keys directly in a section, by their names in it."""
    return {
        key.removeprefix(prefix): entry
        for key, entry in key_reference.keys().items()
        if key.startswith(prefix) and "." not in key.removeprefix(prefix)
    }


def _list_keys(entries: Mapping[str, Mapping[str, Any]]) -> str:
    return format_rows({name: entry["help"] for name, entry in entries.items()})


def _list_methods() -> str:
    methods = key_reference.methods()
    return format_rows({f"method.{name}": method["summary"] for name, method in methods.items()})


def _explain_method(name: str) -> str:
    method = key_reference.methods()[name]
    rows = {key: entry["help"] for key, entry in method["keys"].items() if key != "name"}
    return f"{method['summary']} {method['paper']}\n\n{format_rows(rows)}"


def _explain_key_of_methods(name: str) -> str:
    """Return the help of a key in each method that has it.

    Raises:
        ValueError: If no method has such a key.
    """
    rows = {}
    for method, description in key_reference.methods().items():
        if name in description["keys"]:
            entry = description["keys"][name]
            rows[f"method.{method}.{name}"] = f"default {format_default(entry)}. {entry['help']}"
    if not rows:
        key_reference.find_entry(f"method.{name}")  # raises an error with a suggestion
    return f"method.{name} is a key of these methods:\n{format_rows(rows)}"


def _indent(line: str) -> str:
    return textwrap.fill(line, text_width(), initial_indent="  ", subsequent_indent="  ")
