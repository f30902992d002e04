"""Write a command for the user to run next, in the way in which this process was started."""

import os
import shlex
import shutil
import sys

# Set by the console script, with the name by which it was started.
PROGRAM_VARIABLE = "SSL_PRETRAIN_PROGRAM"
# Set by a launcher, which runs the next commands itself.
LAUNCHED_VARIABLE = "SSL_PRETRAIN_LAUNCHED"


def is_launched() -> bool:
    """Return True if a launcher started this process and goes on by itself."""
    return LAUNCHED_VARIABLE in os.environ


def format_command(module: str, *arguments: object) -> str:
    """Return the command line that runs a module of this package.

    It begins with `ssl-pretrain` if the user's command did. Otherwise it names Python as that did.

    Args:
        module: Full name of the module, whose last part is a command of `ssl-pretrain`.
        arguments: Arguments of the module.
    """
    if program := os.environ.get(PROGRAM_VARIABLE):
        words = [program, module.rpartition(".")[2]]
    else:
        words = [python_name(), "-m", module]
    return shlex.join([*words, *map(str, arguments)])


def python_name() -> str:
    """Return what to type to start this interpreter, which is how the user started it."""
    if sys.executable and shutil.which("python") == sys.executable:
        return "python"
    return sys.orig_argv[0] if sys.orig_argv else "python"
