"""Describe argument parsers as plain values, and rebuild them without importing their modules.

The help of a sub-command is printed in this way without importing torch. A rebuilt parser does not
convert values. The command's own parser does that.
"""

import argparse
import functools
import json
import re
from collections.abc import Mapping
from importlib import resources
from typing import Any

from ssl_pretrain.command.subcommands import SUBCOMMANDS
from ssl_pretrain.schema import key_help
from ssl_pretrain.schema.argument_parser import ArgumentParser
from ssl_pretrain.system import program

FILE = "options.json"
PRESET_PATH = re.compile(r"configs/(?:sweeps/)?([a-z0-9_]+)\.yaml")


def describe_parser(parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Return the texts and options of a parser. Its help texts name the console script."""
    formatter = parser._get_formatter()
    options = []
    for action in parser._actions:
        if isinstance(action, (argparse._HelpAction, key_help.HelpAction)):
            continue
        option: dict[str, Any] = {"names": action.option_strings or [action.dest]}
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help for choice in action._choices_actions}
            option["commands"] = {
                name: {"help": helps[name], **describe_parser(choice)}
                for name, choice in action.choices.items()
            }
        else:
            option["help"] = use_script_names(formatter._expand_help(action))
            option["nargs"] = action.nargs
            option["metavar"] = action.metavar
            option["choices"] = None if action.choices is None else [*map(str, action.choices)]
        options.append(option)
    return {
        "explains_keys": any(isinstance(action, key_help.HelpAction) for action in parser._actions),
        "description": use_script_names(parser.description or ""),
        "epilog": use_script_names(parser.epilog or ""),
        "options": options,
    }


def use_script_names(text: str) -> str:
    """Replace module commands in a text by `ssl-pretrain NAME`, and paths of presets by names."""
    for name, subcommand in SUBCOMMANDS.items():
        if not subcommand.arguments:
            module = re.escape(subcommand.module_command)
            text = re.sub(rf"{module}(?![\w.])", f"{program.SCRIPT} {name}", text)
    return PRESET_PATH.sub(r"\1", text)


@functools.cache
def read_specs() -> dict[str, Any]:
    """Return the descriptions of the parsers, by the name of the sub-command."""
    text = (resources.files("ssl_pretrain.command") / FILE).read_text(encoding="utf-8")
    specs = dict(json.loads(text))
    for name, subcommand in SUBCOMMANDS.items():
        if name not in specs:  # it shares the parser of another sub-command, as `plan` does
            module = subcommand.module
            specs[name] = next(
                specs[other] for other in specs if SUBCOMMANDS[other].module == module
            )
    return specs


def find_parser(name: str) -> argparse.ArgumentParser:
    """Build the parser of a sub-command from the generated file."""
    return build_parser(read_specs()[name], program.command(name))


def parse(name: str, words: list[str]) -> argparse.Namespace:
    """Parse the arguments of a sub-command into texts.

    A wrong option or `--help` ends the process.
    """
    has_commands = any("commands" in option for option in read_specs()[name]["options"])
    parser = find_parser(name)
    # argparse does not allow intermixed options and positionals in a parser with commands.
    return parser.parse_args(words) if has_commands else parser.parse_intermixed_args(words)


def build_parser(spec: Mapping[str, Any], name: str) -> argparse.ArgumentParser:
    """Build the parser of a sub-command from its description.

    Args:
        spec: Description by `describe_parser`.
        name: Name of the program in the usage line.
    """
    parser = ArgumentParser(
        name,
        description=_use_program_name(spec["description"]),
        epilog=_use_program_name(spec["epilog"]),
        add_help=False,
    )
    _add_options(parser, spec)
    return parser


def _add_options(parser: argparse.ArgumentParser, spec: Mapping[str, Any]) -> None:
    if spec["explains_keys"]:
        parser.add_argument("-h", "--help", action=key_help.HelpAction)
    else:
        parser.add_argument("-h", "--help", action="help", help="print this help and exit")
    for option in spec["options"]:
        if "commands" in option:
            commands = parser.add_subparsers(dest=option["names"][0], required=True)
            for name, command in option["commands"].items():
                _add_options(
                    commands.add_parser(name, help=command["help"], add_help=False), command
                )
            continue
        help_text = _use_program_name(option["help"]).replace("%", "%%")
        arguments: dict[str, Any] = {"help": help_text}
        if option["nargs"] == 0:
            arguments["action"] = "store_true"
        else:
            arguments |= {key: option[key] for key in ("nargs", "metavar", "choices")}
            if isinstance(option["metavar"], list):  # JSON has no tuples
                arguments["metavar"] = tuple(option["metavar"])
        parser.add_argument(*option["names"], **arguments)


def _use_program_name(text: str) -> str:
    """Write the commands in a text in the form in which the user started this program."""
    return text.replace(f"{program.SCRIPT} ", f"{program.name()} ")
