"""Name commands in the form in which the user started this program.

The console script `ssl-pretrain` exists only after an installation. From a clone the same commands
are `python -m ssl_pretrain.cli`.
"""

import os
import shutil
import sys
from pathlib import Path

from ssl_pretrain.system.next_command import PROGRAM_VARIABLE, python_name

SCRIPT = "ssl-pretrain"

_running_command = ""  # the sub-command of this process, such as `ssl-pretrain knn`


def name() -> str:
    """Return the start of a command line, `ssl-pretrain` or `python -m ssl_pretrain.cli`."""
    return os.environ.get(PROGRAM_VARIABLE) or f"{python_name()} -m ssl_pretrain.cli"


def command(subcommand: str) -> str:
    """Return the command line of a sub-command without its arguments, for messages."""
    return f"{name()} {subcommand}"


def record_script() -> None:
    """Remember that the console script started this process, if it did."""
    script = Path(sys.argv[0])
    if script.stem == SCRIPT:
        os.environ[PROGRAM_VARIABLE] = SCRIPT if _is_first_in_path(script) else str(script)
    else:
        os.environ.pop(PROGRAM_VARIABLE, None)


def _is_first_in_path(script: Path) -> bool:
    path = shutil.which(SCRIPT)
    return path is not None and Path(path).absolute().parent == script.absolute().parent


def run_as(subcommand: str) -> None:
    """Declare that this process runs a sub-command, whose usage line then names it."""
    global _running_command
    _running_command = command(subcommand) if subcommand else ""


def usage_name(module_command: str) -> str:
    """Return the name for the usage line of a command.

    Args:
        module_command: How the command starts without the console script, such as
            `python -m ssl_pretrain.eval.knn`.
    """
    return _running_command or module_command
