"""Help for the keys of a configuration, taken from the fields of its dataclasses."""

import argparse
import dataclasses
import types
import typing
from typing import Any, Literal, Union, get_args, get_origin

from ssl_pretrain import methods, schema
from ssl_pretrain.config.resume_policy import resume_policy
from ssl_pretrain.config.run_config import RunConfig
from ssl_pretrain.methods.base import MethodConfig
from ssl_pretrain.system.output_streams import redirect_to_null

ON_RESUME = {
    "same": "A resumed run must keep this value.",
    "free": "A resumed run may change this value.",
    "warn": "A resumed run may change this value, with a warning.",
}


class HelpAction(argparse.Action):
    """The option `--help [KEY]`, which prints the help of the command or of one key, and exits."""

    def __init__(self, **arguments: Any) -> None:
        help_text = "print this help, or the help of one key, and exit"
        super().__init__(**arguments | {"nargs": "?", "metavar": "KEY", "help": help_text})

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, key: Any, *_: Any) -> None:
        """Print the help and exit. An unknown key is an error."""
        try:
            print(explain_key(key) if key else parser.format_help(), flush=True)
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
    method_config, declared_key = MethodConfig, key
    if key.startswith("method."):
        _, method_name, *names = key.split(".")
        method_config = methods.find(method_name).Config
        declared_key = ".".join(["method", *names])

    def find_type(key: str) -> Any:
        if not key:
            return RunConfig
        return schema.declared_type(RunConfig, key, {"method": method_config})

    key_type = find_type(declared_key)
    if dataclasses.is_dataclass(key_type):
        section = typing.cast(type, key_type)
        helps = {
            field.name: schema.field_metadata(section, field.name)["help"]
            for field in dataclasses.fields(section)
        }
        width = max(map(len, helps))
        return "\n".join(f"{name:{width}}  {text}" for name, text in helps.items())
    parent, _, name = declared_key.rpartition(".")
    section = find_type(parent)
    if not dataclasses.is_dataclass(section):
        raise ValueError(f"{key} has no help of its own; see {key.rpartition('.')[0]}")
    section = typing.cast(type, section)
    type_name, default = _describe_type(schema.field_types(section)[name]), getattr(section(), name)
    text = schema.field_metadata(section, name)["help"]
    on_resume = ON_RESUME[resume_policy(declared_key, method_config)]
    return f"{key} ({type_name}, default {default!r})\n  {text}\n  {on_resume}"


def _describe_type(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " | ".join(choice or repr(choice) for choice in get_args(kind))
    if get_origin(kind) in (Union, types.UnionType):
        return " | ".join(_describe_type(option) for option in get_args(kind))
    if kind is types.NoneType:
        return "null"
    return str(kind) if get_origin(kind) else kind.__name__
