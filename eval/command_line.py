"""Command line of the evaluations: shared options, opening the run, printing, exit status."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

from ssl_pretrain.data.workers import LostWorkerError
from ssl_pretrain.distributed import process_group
from ssl_pretrain.eval import results, runs
from ssl_pretrain.eval.frozen import shards
from ssl_pretrain.eval.frozen.evaluation_split import UnlabeledError
from ssl_pretrain.eval.runs import Run
from ssl_pretrain.system import durable_files
from ssl_pretrain.system.exit_status import DISK_REFUSED, LOST, SKIPPED, USER_ERROR
from ssl_pretrain.system.output_streams import tolerate_lost_output

RUN_HELP = "folder of the run, a file of weights, or timm:<tag>; weights need backbone.name=NAME"
OVERRIDES_HELP = (
    "data.* and evaluation.* settings, such as data.root=/new/place; weights without a run also"
    " accept backbone.*, views.*, seed and output"
)
SHARED_OPTIONS: dict[str, dict[str, Any]] = {
    "--checkpoint": {
        "metavar": "FOLDER",
        "help": "checkpoint to evaluate (default: the newest intact one)",
    },
    "--skip-unlabeled": {
        "action": "store_true",
        "help": "if labels are needed and there are none, print one line and exit with 77",
    },
    "--device": {"default": "auto", "help": "cpu or cuda (default: cuda where available)"},
}


def parser(
    name: str,
    description: str,
    options: Mapping[str, Mapping[str, Any]],
    overrides_metavar: str = "key=value",
    overrides_help: str = OVERRIDES_HELP,
) -> argparse.ArgumentParser:
    """Return the parser that all evaluations share.

    Args:
        name: Module to run with `python -m`.
        description: Text above the list of options.
        options: Options of this evaluation: each flag with its arguments for `add_argument`.
        overrides_metavar: Name of the positional arguments after RUN in the help.
        overrides_help: Help text of those arguments.
    """
    command = argparse.ArgumentParser(
        f"python -m {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("run", metavar="RUN", help=RUN_HELP)
    command.add_argument("overrides", nargs="*", metavar=overrides_metavar, help=overrides_help)
    for flag, arguments in {**SHARED_OPTIONS, **options}.items():
        command.add_argument(flag, **arguments)
    return command


def open_run(options: argparse.Namespace) -> Run:
    """Open the run that the options of `parser` name, in a single process."""
    return runs.load_run(options.run, options.checkpoint, options.overrides, options.device)


def evaluate_and_print(
    command: argparse.ArgumentParser,
    arguments: list[str],
    evaluate: Callable[[Run, argparse.Namespace], dict[str, Any]],
) -> None:
    """Open the run on this rank's device, evaluate it, and print the result from the main rank.

    The table of every setting that was tried, `<name>_grid`, is printed first if there is one.
    """
    options = command.parse_intermixed_args(arguments)
    with shards.ranks(options.device) as options.device:
        run = open_run(options)
        result = evaluate(run, options)
        if not process_group.is_main():
            return
        folder, name = run.path / "eval", result["name"]
        grid = folder / result["checkpoint"] / f"{name}_grid.json"
        if grid.exists():
            print(f"\n{results.text(json.loads(grid.read_text()))}")
        print(f"\n{results.text(result)}")
        print(f"\n{result['seconds']:.0f} s; saved to {folder / name}.json")


def execute(main: Callable[[list[str]], None], name: str) -> None:
    """Run `main` on the arguments of this process and exit with a status.

    An expected error is printed as one line. The status is 2 for a user's mistake, 74 for a disk
    that refuses to write, 69 for a lost worker, and 77 for images without labels if the command was
    told to skip those.
    """
    with tolerate_lost_output():
        try:
            main(sys.argv[1:])
        except UnlabeledError as error:
            if "--skip-unlabeled" not in sys.argv[1:]:
                _exit(name, error, USER_ERROR)
            print(f"{name}: skipped: {error}")
            sys.exit(SKIPPED)
        except (ValueError, OSError) as error:
            _exit(name, error, DISK_REFUSED if durable_files.is_disk_failure(error) else USER_ERROR)
        except LostWorkerError as error:
            _exit(name, error, LOST)
        except KeyboardInterrupt:
            sys.exit(130)


def _exit(name: str, error: Exception, status: int) -> None:
    print(f"{name}: {error}", file=sys.stderr)
    sys.exit(status)
