"""The command `ssl-pretrain`, which a clone runs as `python -m ssl_pretrain.cli`.

Help, lists, completion and messages about wrong keys come from generated files, without importing
torch. The other sub-commands run the command line of their module.
"""

import argparse
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

import ssl_pretrain
from ssl_pretrain.command import completion, name_lists, option_specs, shell_scripts, subcommands
from ssl_pretrain.schema import config_file, key_help, key_reference, presets
from ssl_pretrain.schema.key_text import format_rows
from ssl_pretrain.system import interruption, program
from ssl_pretrain.system.exit_status import USER_ERROR, print_error
from ssl_pretrain.system.output_streams import tolerate_lost_output

DESCRIPTION = "Self-supervised pretraining of image backbones."
EXAMPLES = """\
ssl-pretrain demo
ssl-pretrain inspect photos/
ssl-pretrain pretrain simclr_cifar10_cpu data.root=cifar10.zip
ssl-pretrain knn runs/simclr_cifar10_cpu"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    program.record_script()
    interruption.report_in_one_line()
    name, *words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    with tolerate_lost_output():
        try:
            if name in subcommands.SUBCOMMANDS:
                _check_arguments(name, words)
            else:
                print(_look_up(name, words))
                return 0
        except ValueError as error:
            print_error(f"error: {error}")
            return USER_ERROR
    return subcommands.run(name, words)


def _look_up(name: str, words: list[str]) -> str:
    """Return the output of a command that runs no module.

    Raises:
        ValueError: If there is no such command, or its arguments are wrong.
    """
    if name in ("-h", "--help"):
        return _overview()
    if name == "--version":
        return f"{program.SCRIPT} {ssl_pretrain.__version__}"
    if name == "help":
        return _help(words)
    if name == "list":
        return name_lists.list_names(words)
    if name == "completion":
        return shell_scripts.script(words)
    if name == completion.HIDDEN_COMMAND:
        return "\n".join(completion.complete(words))
    raise ValueError(_describe_unknown_subcommand(name))


def _describe_unknown_subcommand(name: str) -> str:
    """Return the message about a sub-command that does not exist."""
    if name.removesuffix(".yaml").rpartition("/")[2] in presets.list_files():
        return f"{name!r} is a preset, not a sub-command; run `{program.command(f'train {name}')}`"
    nearest = get_close_matches(name, [*subcommands.NAMES, "--version"], n=1)
    hint = f"Did you mean {nearest[0]!r}? " if nearest else ""
    return f"{name!r} is not a sub-command. {hint}`{program.command('--help')}` lists all"


def _overview() -> str:
    sections = [f"usage: {program.name()} COMMAND ...\n\n{DESCRIPTION}"]
    for title, group in subcommands.GROUPS.items():
        rows = {f"  {name}": entry.summary for name, entry in group.items()}
        sections.append(f"{title}\n{format_rows(rows)}")
    rows = {f"  {name}": summary for name, summary in subcommands.LOOK_UP.items()}
    sections.append(f"look up\n{format_rows(rows)}")
    examples = EXAMPLES.replace(program.SCRIPT, f"  {program.name()}")
    sections.append(f"examples\n{examples}")
    sections.append(f"`{program.command('COMMAND --help')}` lists the options of a command.")
    return "\n\n".join(sections)


def _help(words: list[str]) -> str:
    if len(words) > 1:
        raise ValueError(f"help: got {' '.join(words)}; give one key, section or sub-command")
    if words and words[0] in subcommands.SUBCOMMANDS:
        return option_specs.find_parser(words[0]).format_help().rstrip()
    return key_help.explain_key(*words)


def _check_arguments(name: str, words: list[str]) -> None:
    """Check the options, keys and values of a sub-command before torch is imported.

    A wrong option or `--help` ends the process, as usual for argparse.

    Raises:
        ValueError: If a key or a value of the configuration is not allowed.
    """
    options = option_specs.parse(name, words)
    if name == "sweep":
        _check_sweep(options)
    elif "config" in options:
        config_file.load(options.config, options.overrides, key_reference.declarations())


def _check_sweep(options: argparse.Namespace) -> None:
    """Check a sweep with the first value of each key. A study checks its runs itself, later."""
    if "runs" not in config_file.read_yaml(Path(options.config)):
        pairs = [text.partition("=") for text in options.overrides]
        overrides = [
            f"{key}{separator}{config_file.split_values(key, values)[0]}"
            for key, separator, values in pairs
        ]
        config_file.load(options.config, overrides, key_reference.declarations())


if __name__ == "__main__":
    sys.exit(main())
