"""Evaluate a run's checkpoints: `python launch/evaluate.py RUN [--watch] [key=value ...]`."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file from a clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from ssl_pretrain.system import interruption

    interruption.report_in_one_line()

from ssl_pretrain.checkpoint.folder import is_finished
from ssl_pretrain.fault_tolerance.run_lock import find_holder
from ssl_pretrain.launch import held_checkpoints, local
from ssl_pretrain.launch.evaluation_jobs import (
    EVALUATIONS,
    HELD_FOLDER,
    EvaluationJobs,
    check_evaluation_names,
    report_stop,
)
from ssl_pretrain.schema import POSITIVE_FLOAT
from ssl_pretrain.schema.argument_parser import ArgumentParser
from ssl_pretrain.system import program

DESCRIPTION = """\
Run the evaluations that a run's checkpoints do not have yet.

Each evaluation runs in its own process on this machine, or as a SLURM job. Results are written to
RUN/eval/<checkpoint>/<name>.json, and those of the newest checkpoint also to RUN/eval/<name>.json.
They are sent to the run's W&B page, if it has one, and shown in RUN/report.html. Finished
evaluations are not repeated."""
EXAMPLES = """\
examples:
  the evaluations of evaluation.at_end, for every checkpoint
    python launch/evaluate.py runs/simclr_imagenet
  k-NN for every checkpoint, and for every new one until the training has ended
    python launch/evaluate.py runs/simclr_imagenet --watch --jobs knn
  two evaluations of the newest checkpoint
    python launch/evaluate.py runs/simclr_imagenet --newest --jobs linear spectrum
  on SLURM, once job 1234 has succeeded
    python launch/evaluate.py runs/simclr_imagenet --after 1234"""


@local.launcher
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options = parse_options(arguments)
    check_options(options)
    run = options.run
    while options.watch and not (run / "config.yaml").is_file():  # training has not started
        local.wait(options.every_seconds)
        if local.stop_requested():
            return report_stop()
    if not (run / "config.yaml").is_file():
        raise ValueError(f"{run}: has no config.yaml, so it is no run; give the output of one")
    held_checkpoints.remove_abandoned_folders(run / "eval" / HELD_FOLDER)
    jobs = EvaluationJobs(run, options)
    if options.after:
        ids = ", ".join(jobs.submit_after(options.after))
        print(f"submitted to SLURM, after {options.after}: {ids}")
        return 0
    return watch(jobs, options) if options.watch else jobs.run_due_evaluations()


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(
        prog=program.usage_name("python launch/evaluate.py"),
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    add = parser.add_argument
    add("run", metavar="RUN", type=Path, help="folder of the run")
    add(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="keys of data.* and evaluation.* only, such as data.root=/data/images",
    )
    add(
        "--jobs",
        nargs="+",
        metavar="NAME",
        help=f"one or more of {', '.join(EVALUATIONS)} (default: evaluation.at_end of the run)",
    )
    add(
        "--watch",
        action="store_true",
        help="also evaluate new checkpoints, until the training has ended",
    )
    add("--newest", action="store_true", help="evaluate the newest checkpoint only")
    add("--checkpoint", type=Path, metavar="FOLDER", help="evaluate this checkpoint only")
    add(
        "--device",
        default="auto",
        help="cpu or cuda (default: cuda, unless there is none or RUN is training on this machine)",
    )
    add("--share-gpu", action="store_true", help="use the GPU even while RUN is training on it")
    add(
        "--cluster",
        choices=["auto", "local", "slurm"],
        help="run the jobs on this machine or on SLURM (default: launch.cluster of the run)",
    )
    add(
        "--after",
        default="",
        metavar="JOB",
        help="submit to SLURM, to start once the training job with this id has succeeded",
    )
    add(
        "--every-seconds",
        type=POSITIVE_FLOAT,
        default=30.0,
        help="with --watch: seconds between searches for new checkpoints (default: 30)",
    )
    add(
        "--give-up-minutes",
        type=POSITIVE_FLOAT,
        default=60.0,
        help="with --watch: minutes without a training process before giving up (default: 60)",
    )
    return parser.parse_intermixed_args(arguments)


def check_options(options: argparse.Namespace) -> None:
    """Raise ValueError if the run, an evaluation or the device cannot be used."""
    if not options.watch and not options.run.is_dir():
        raise ValueError(
            f"{options.run}: there is no such run folder; give the `output` of a run's config, "
            "or add --watch to wait for it"
        )
    check_evaluation_names(options.jobs or [], "--jobs")
    trainer = find_holder(options.run)
    wants_gpu = options.device.startswith("cuda") and not options.share_gpu
    if wants_gpu and trainer and trainer.is_on_this_host():
        raise ValueError(
            f"--device {options.device}: process {trainer.pid} is training in {options.run} on "
            "this machine and uses its GPUs; add --share-gpu to share them, or --device cpu"
        )


def watch(jobs: EvaluationJobs, options: argparse.Namespace) -> int:
    """Evaluate every new checkpoint until the training has ended.

    Returns:
        The exit status, which is 0, 1 if an evaluation failed, or 75 after a stop request.
    """
    idle_since = None
    while True:
        status = jobs.run_due_evaluations()
        if local.stop_requested() or (is_finished(jobs.run) and not jobs.due_evaluations()):
            return status
        idle_since = None if find_holder(jobs.run) else idle_since or time.monotonic()
        if idle_since and time.monotonic() - idle_since > 60 * options.give_up_minutes:
            print(
                f"gave up: no process has trained in {jobs.run} for {options.give_up_minutes:g} "
                "minutes, and the run is not finished; resume the run, then watch it again",
                flush=True,
            )
            return status
        local.wait(options.every_seconds)
        if local.stop_requested():
            return report_stop()


if __name__ == "__main__":
    sys.exit(main())
