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
    words = key.split(".")
    if words[0] == "method" and len(words) == 2 and words[1] in key_reference.methods():
        return _explain_method(words[1])
    if words[0] == "method" and len(words) == 2 and words[1] != "name":
        return _explain_key_of_methods(key, words[1])
    listed_key, entry = key_reference.find_entry(key)
    if entry["type"] in (SECTION, SECTIONS):
        prefix = f"{listed_key}." if entry["type"] == SECTION else f"{listed_key}.{NAME}."
        return _list_keys(_children(prefix))
    return f"{key} ({describe_type(entry)}, default {format_default(entry)})\n" + _indent(
        f"{entry['help']}\n{describe_range(entry)}\n{ON_RESUME[entry['on_resume']]}"
    )


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
    return format_rows(
        {f"method.{name}": m["summary"] for name, m in key_reference.methods().items()}
    )


def _explain_method(name: str) -> str:
    method = key_reference.methods()[name]
    rows = {key: entry["help"] for key, entry in method["keys"].items() if key != "name"}
    return f"{method['summary']} {method['paper']}\n\n{format_rows(rows)}"


def _explain_key_of_methods(key: str, name: str) -> str:
    rows = {
        f"method.{method}.{name}": f"default {format_default(value['keys'][name])}. "
        + value["keys"][name]["help"]
        for method, value in key_reference.methods().items()
        if name in value["keys"]
    }
    if not rows:
        key_reference.find_entry(f"method.{name}")  # raises the error that lists the methods
    return f"{key} is a key of these methods:\n{format_rows(rows)}"


def _indent(text: str) -> str:
    width, lines = text_width(), [line for line in text.splitlines() if line]
    return "\n".join(
        textwrap.fill(line, width, initial_indent="  ", subsequent_indent="  ") for line in lines
    )
