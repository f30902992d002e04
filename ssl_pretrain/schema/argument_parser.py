"""An argument parser whose errors are one or two lines that name the remedy."""

import argparse
import re
import sys
from typing import Any, NoReturn

from ssl_pretrain.schema import key_help, key_hints
from ssl_pretrain.system.exit_status import USER_ERROR

SETTINGS = "key=value"  # metavar of the settings of a run, which are optional
UNKNOWN_OPTION = re.compile(r"unrecognized arguments: --?([a-zA-Z][\w.-]*)(?:[= ]([^\s-]\S*))?.*")


class ArgumentParser(argparse.ArgumentParser):
    """Parser that prints no usage with an error, and explains how settings are written.

    Descriptions are printed with the line breaks that they have.

    Args:
        arguments: Positional arguments of `argparse.ArgumentParser`.
        explains_keys: True to let `--help KEY` explain a key of a configuration.
        options: Other arguments of `argparse.ArgumentParser`.
    """

    def __init__(self, *arguments: Any, explains_keys: bool = False, **options: Any):
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        if explains_keys:
            options["add_help"] = False
        super().__init__(*arguments, **options)
        if explains_keys:
            self.add_argument("-h", "--help", action=key_help.HelpAction)

    def error(self, message: str) -> NoReturn:
        """Print the error and exit with the status of a user's mistake."""
        text = message.replace(f", {SETTINGS}", "")  # argparse lists settings as required
        unknown_option = UNKNOWN_OPTION.fullmatch(message)
        takes_settings = any(action.metavar == SETTINGS for action in self._actions)
        remedy = f"`{self.prog} --help` lists the options"
        if unknown_option and takes_settings:
            name, value = unknown_option[1], unknown_option[2] or ""
            remedy = key_hints.explain_option(name, value) or remedy
        print(f"error: {text}. {remedy}", file=sys.stderr, flush=True)
        sys.exit(USER_ERROR)
