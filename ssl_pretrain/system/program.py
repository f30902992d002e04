"""Name commands in the form in which the user started this program.

The console script `ssl-pretrain` exists only after an installation. From a clone the same commands
are `python -m ssl_pretrain.cli`.
"""

import os
import shlex
import shutil
import sys
from pathlib import Path

SCRIPT = "ssl-pretrain"
# Environment variable that the console script sets to the name by which it was started. Child
# processes inherit it.
PROGRAM_VARIABLE = "SSL_PRETRAIN_PROGRAM"
# Environment variable of processes that a launcher started. It runs the next commands itself.
LAUNCHED_VARIABLE = "SSL_PRETRAIN_LAUNCHED"

_running_command = ""  # the sub-command of this process, such as `ssl-pretrain knn`


def name() -> str:
    """Return the start of a command line, `ssl-pretrain` or `python -m ssl_pretrain.cli`."""
    return os.environ.get(PROGRAM_VARIABLE) or f"{python_name()} -m ssl_pretrain.cli"


def command(subcommand: str) -> str:
    """Return the command line of a sub-command without its arguments, for messages."""
    return f"{name()} {subcommand}"


def format_command(module: str, *arguments: object) -> str:
    """Return the command line that runs a module of this package, with its arguments.

    It begins with `ssl-pretrain` if the user's command did. Otherwise it starts Python in the way
    the user did.

    Args:
        module: Full name of the module, whose last part is a command of `ssl-pretrain`.
        arguments: Arguments of the module.
    """
    if script := os.environ.get(PROGRAM_VARIABLE):
        words = [script, module.rpartition(".")[2]]
    else:
        words = [python_name(), "-m", module]
    return shlex.join([*words, *map(str, arguments)])


def python_name() -> str:
    """Return the command that starts this interpreter.

    It is `python` if the shell finds this interpreter under that name, or else what the user typed.
    """
    if sys.executable and shutil.which("python") == sys.executable:
        return "python"
    return sys.orig_argv[0] if sys.orig_argv else "python"


def is_launched() -> bool:
    """Return True if a launcher started this process and will run the next commands."""
    return LAUNCHED_VARIABLE in os.environ


def record_script() -> None:
    """Record in the environment whether the console script started this process."""
    script = Path(sys.argv[0])
    if script.stem == SCRIPT:
        os.environ[PROGRAM_VARIABLE] = SCRIPT if _is_first_in_path(script) else str(script)
    else:
        os.environ.pop(PROGRAM_VARIABLE, None)


def _is_first_in_path(script: Path) -> bool:
    path = shutil.which(SCRIPT)
    return path is not None and Path(path).absolute().parent == script.absolute().parent


def run_as(subcommand: str) -> None:
    """Make `usage_name` return the command line of a sub-command. Empty text undoes this."""
    global _running_command
    _running_command = command(subcommand) if subcommand else ""


def usage_name(module_command: str) -> str:
    """Return the name for the usage line of a command.

    Args:
        module_command: How the command starts without the console script, such as
            `python -m ssl_pretrain.eval.knn`.
    """
    return _running_command or module_command
