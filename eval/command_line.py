"""Shared command line of the evaluations, with its options, output and exit status."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from ssl_pretrain.data.workers import LostWorkerError
from ssl_pretrain.distributed import process_group
from ssl_pretrain.eval import result_text, results, runs, trained_run
from ssl_pretrain.eval.frozen.evaluation_split import UnlabeledError
from ssl_pretrain.eval.runs import Run
from ssl_pretrain.eval.trained_run import TrainedRun
from ssl_pretrain.schema.argument_parser import ArgumentParser
from ssl_pretrain.system import allocator, durable_files, program
from ssl_pretrain.system.exit_status import (
    DISK_ERROR,
    NO_LABELS,
    PROCESS_LOST,
    USER_ERROR,
    print_error,
)
from ssl_pretrain.system.output_streams import tolerate_lost_output

AnyRun = TypeVar("AnyRun", bound=TrainedRun)

RUN_HELP = "run folder, or a weights file or timm:<tag> together with backbone.name=NAME"
OVERRIDES_HELP = (
    "data.* and evaluation.* settings, such as data.root=/new/place; also backbone.*, views.*, seed"
    " and output for weights without a run"
)
SHARED_OPTIONS: dict[str, dict[str, Any]] = {
    "--checkpoint": {
        "metavar": "FOLDER",
        "help": "checkpoint to evaluate (default: the newest intact one)",
    },
    "--skip-unlabeled": {
        "action": "store_true",
        "help": "print one line and exit with status 77 if required labels are missing",
    },
    "--verbose": {
        "action": "store_true",
        "help": "print the protocol and the numbers of all settings tried, not only save them",
    },
    "--device": {"default": "auto", "help": "cpu or cuda (default: cuda where available)"},
}


def build_parser(
    name: str,
    description: str | None,
    options: Mapping[str, Mapping[str, Any]],
    positionals_metavar: str = "key=value",
    positionals_help: str = OVERRIDES_HELP,
    run_help: str = RUN_HELP,
) -> argparse.ArgumentParser:
    """Return a parser with the shared options and the options of one evaluation.

    Args:
        name: Module to run with `python -m`.
        description: Text above the list of options.
        options: Arguments of `add_argument` for each flag of this evaluation.
        positionals_metavar: Name in the help of the positional arguments after RUN. The parser
            stores them as `overrides`.
        positionals_help: Help text of those arguments.
        run_help: Help text of RUN.
    """
    parser = ArgumentParser(
        program.usage_name(f"python -m {name}"),
        description=description,
    )
    parser.add_argument("run", metavar="RUN", help=run_help)
    parser.add_argument("overrides", nargs="*", metavar=positionals_metavar, help=positionals_help)
    for flag, arguments in {**SHARED_OPTIONS, **options}.items():
        parser.add_argument(flag, **arguments)
    return parser


def build_sentence_parser(
    name: str, description: str | None, options: Mapping[str, Mapping[str, Any]]
) -> argparse.ArgumentParser:
    """Return the parser of an evaluation of sentences, with the arguments of `build_parser`."""
    return build_parser(
        name,
        description,
        options,
        positionals_help="data.* and evaluation.* settings, such as data.root=/new/place",
        run_help="folder of a run of simcse",
    )


def open_run(options: argparse.Namespace) -> Run:
    """Open the run of images that the command line names."""
    return runs.load_run(options.run, options.checkpoint, options.overrides, options.device)


def open_sentence_run(options: argparse.Namespace) -> TrainedRun:
    """Open the run of sentences that the command line names."""
    return trained_run.load_sentence_run(
        options.run, options.checkpoint, options.overrides, options.device
    )


def evaluate_and_print(
    parser: argparse.ArgumentParser,
    arguments: list[str],
    evaluate: Callable[[Run, argparse.Namespace], dict[str, Any]],
) -> None:
    """Open the run on this rank's device, evaluate it, and print the result from the main rank."""
    _evaluate_and_print(parser, arguments, open_run, evaluate)


def evaluate_sentences_and_print(
    parser: argparse.ArgumentParser,
    arguments: list[str],
    evaluate: Callable[[TrainedRun, argparse.Namespace], dict[str, Any]],
) -> None:
    """Do the same with a run whose method embeds sentences."""
    _evaluate_and_print(parser, arguments, open_sentence_run, evaluate)


def _evaluate_and_print(
    parser: argparse.ArgumentParser,
    arguments: list[str],
    open_run: Callable[[argparse.Namespace], AnyRun],
    evaluate: Callable[[AnyRun, argparse.Namespace], dict[str, Any]],
) -> None:
    options = parser.parse_intermixed_args(arguments)
    with join_ranks(options.device) as options.device:
        run = open_run(options)
        result = evaluate(run, options)
        if process_group.is_main():
            print_result(result, run, is_verbose=options.verbose)


def print_result(result: dict[str, Any], run: TrainedRun, *, is_verbose: bool) -> None:
    """Print the table of a result and where its protocol is.

    Args:
        result: Content of the result file.
        run: Run that was evaluated.
        is_verbose: Print the protocol before the table, and the table of all settings tried.
    """
    if is_verbose:
        grid = (
            run.path / "eval" / result["checkpoint"] / f"{result['name']}{results.GRID_SUFFIX}.json"
        )
        shown = [json.loads(grid.read_text())] if grid.exists() else []
        for each in (*shown, result):
            print(f"\n{results.format_fully(each)}")
    print(f"\n{result_text.format_briefly(result, run.path)}")


@contextmanager
def join_ranks(device: str) -> Iterator[str]:
    """Join the ranks that torchrun started and yield this rank's device.

    Without torchrun, `device` is yielded unchanged.

    Raises:
        ValueError: If several ranks would run on the CPU of a machine with GPUs. Their collectives
            would use the GPUs.
    """
    if "RANK" not in os.environ:
        allocator.keep_freed_memory()
        yield device
        return
    if device == "cpu" and torch.cuda.is_available() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "--device cpu: several ranks cannot use the CPU while GPUs are visible; hide the GPUs"
            " with CUDA_VISIBLE_DEVICES= torchrun ..."
        )
    rank_device = process_group.start()
    try:
        yield str(rank_device) if device == "auto" else device
    finally:
        process_group.stop()


def execute(main: Callable[[list[str]], None], name: str) -> None:
    """Run `main` on the arguments of this process and exit with a status if it fails.

    An expected error is printed as one line that starts with `name`. The status is 2 for a user's
    mistake, 74 for a failed write to disk, and 69 for a lost worker. With --skip-unlabeled, it is
    77 for images without labels.
    """
    with tolerate_lost_output():
        try:
            main(sys.argv[1:])
        except (ValueError, OSError, LostWorkerError) as error:
            if isinstance(error, UnlabeledError) and "--skip-unlabeled" in sys.argv[1:]:
                print(f"{name}: skipped: {error}")
                sys.exit(NO_LABELS)
            print_error(f"{name}: {error}")
            if isinstance(error, LostWorkerError):
                sys.exit(PROCESS_LOST)
            sys.exit(DISK_ERROR if durable_files.is_disk_failure(error) else USER_ERROR)
        except KeyboardInterrupt:
            print(f"\n{name}: stopped; the same command starts again", file=sys.stderr)
            sys.exit(130)
