"""Write the files that are generated from the code.

They are `schema/reference.json` (keys and methods), `command/options.json` (options of the
sub-commands) and `docs/reference/configuration.md`. The command is
`python -m ssl_pretrain.command.reference_files`.
"""

import argparse
import importlib
import inspect
import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import ssl_pretrain
from ssl_pretrain import methods
from ssl_pretrain.command import reference_page
from ssl_pretrain.command.option_specs import describe_parser
from ssl_pretrain.command.subcommands import SUBCOMMANDS
from ssl_pretrain.config import RunConfig
from ssl_pretrain.methods.base import Method
from ssl_pretrain.schema import field_metadata, key_entries

PACKAGE = Path(ssl_pretrain.__file__).resolve().parent


class _HelpRequest(Exception):
    """Interrupts a command that prints its help, and carries the parser that it built."""

    def __init__(self, parser: argparse.ArgumentParser):
        super().__init__()
        self.parser = parser


def generate_files() -> dict[Path, str]:
    """Return the path and the text of each generated file."""
    reference = describe_configuration()
    return {
        PACKAGE / "schema/reference.json": _to_json(reference),
        PACKAGE / "command/options.json": _to_json(describe_options()),
        PACKAGE.parent / "docs/reference/configuration.md": reference_page.render(reference),
    }


def describe_configuration() -> dict[str, Any]:
    """Return the description of all keys and methods."""
    policy = field_metadata(RunConfig, "method")["on_resume"]
    return {
        "keys": key_entries.describe_keys(RunConfig),
        "methods": {name: _describe_method(name, policy) for name in methods.names()},
    }


def _describe_method(name: str, policy: Any) -> dict[str, Any]:
    module = methods.find(name)
    (method,) = [
        kind
        for kind in vars(module).values()
        if inspect.isclass(kind) and issubclass(kind, Method) and kind.__module__ == module.__name__
    ]
    return {
        "summary": inspect.cleandoc(method.__doc__ or "").partition("\n")[0],
        "paper": inspect.cleandoc(module.__doc__ or "").partition("\n\n")[0].replace("\n", " "),
        "keys": key_entries.describe_keys(module.Config, policy=policy),
    }


def describe_options() -> dict[str, Any]:
    """Return the description of the parser of each sub-command."""
    return {
        name: describe_parser(_find_parser(subcommand.module))
        for name, subcommand in SUBCOMMANDS.items()
        if not subcommand.arguments
    }


def _find_parser(module_name: str) -> argparse.ArgumentParser:
    """Return the parser that the `main` of a module builds.

    No function returns it, so `main` is asked for its help and interrupted when it prints that.
    """

    def interrupt(parser: argparse.ArgumentParser) -> None:
        raise _HelpRequest(parser)

    module = importlib.import_module(f"ssl_pretrain.{module_name}")
    with mock.patch.object(argparse.ArgumentParser, "print_help", interrupt), suppress(SystemExit):
        try:
            module.main(["--help"])
        except _HelpRequest as request:
            return request.parser
    raise AssertionError(f"{module_name}: --help printed no help")


def _to_json(value: Any) -> str:
    return f"{_format_json(value, '')}\n"


def _format_json(value: Any, indent: str) -> str:
    """Format a tree as JSON, with one line per key or option."""
    is_container = isinstance(value, (dict, list)) and value
    if not is_container or not _has_nested_dict(value):
        return json.dumps(value, ensure_ascii=False)
    inner = f"{indent} "
    if isinstance(value, dict):
        items = [f"{json.dumps(key)}: {_format_json(item, inner)}" for key, item in value.items()]
    else:
        items = [_format_json(item, inner) for item in value]
    start, end = "{}" if isinstance(value, dict) else "[]"
    return f"{start}\n{inner}" + f",\n{inner}".join(items) + f"\n{indent}{end}"


def _has_nested_dict(value: dict[str, Any] | list[Any]) -> bool:
    """Return True unless the value is the description of one key or option."""
    items = value.values() if isinstance(value, dict) else value
    has_nested = any(
        isinstance(item, dict) or (isinstance(item, list) and _has_nested_dict(item))
        for item in items
    )
    return has_nested and "bounds" not in value and "default" not in value


def main() -> int:
    """Write the files and return the exit status."""
    for path, text in generate_files().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
