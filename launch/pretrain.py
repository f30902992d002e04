"""Pretrain and evaluate: `python launch/pretrain.py CONFIG [key=value ...]`."""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

if not __package__:  # run as a file from a clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from ssl_pretrain.system import interruption

    interruption.report_in_one_line()

from ssl_pretrain import config as configuration
from ssl_pretrain.checkpoint.folder import is_finished, list_checkpoints
from ssl_pretrain.eval import result_text
from ssl_pretrain.launch import dashboard, local, slurm, slurm_job
from ssl_pretrain.launch.evaluation_jobs import check_final_evaluations, run_final_evaluations
from ssl_pretrain.planning import plan
from ssl_pretrain.schema.argument_parser import ArgumentParser
from ssl_pretrain.system import program
from ssl_pretrain.system.exit_status import NO_LABELS, STOPPED

DESCRIPTION = """\
Pretrain, then run the evaluations listed in evaluation.at_end.

On a SLURM cluster both are submitted as jobs, and the command returns. Elsewhere the ranks start on
this machine, one per GPU, or launch.ranks of them on CPU. Run the same command again to resume a
run that was stopped."""
EXAMPLES = """\
examples:
  a minute on a laptop
    python launch/pretrain.py configs/simclr_digits.yaml
  half an hour on two CPU cores
    python launch/pretrain.py configs/simclr_cifar10_cpu.yaml data.root=cifar10.zip
  every GPU of this machine
    python launch/pretrain.py configs/simclr_imagenet.yaml data.root=/data/imagenet
  64 GPUs of a SLURM cluster
    python launch/pretrain.py configs/simclr_imagenet.yaml launch.nodes=8 launch.gpus_per_node=8
  show what would run on 8 ranks, without running it
    python launch/pretrain.py configs/simclr_imagenet.yaml --plan launch.ranks=8
  print one torchrun command for each of two hosts
    python launch/pretrain.py configs/simclr_imagenet.yaml launch.hosts=a,b"""

# Maps a run to its `evaluation_args` in `pretrain_and_evaluate`.
EvaluationArgsFor = Callable[[configuration.RunConfig], dict[str, list[str]]]


@local.launcher
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options = _parse(arguments)
    config = configuration.load(options.config, options.overrides)
    check_final_evaluations(config)
    on_slurm = slurm.uses_slurm(config.launch)
    if not on_slurm:
        slurm.check_no_slurm_keys(config, options.overrides)
    hosts = local.host_names(config)
    num_ranks = slurm.num_ranks(config) if on_slurm else local.num_ranks(config) * (len(hosts) or 1)
    if options.plan:
        print(plan.describe(config, plan.num_ranks(config, num_ranks)))
        if on_slurm:
            print("\n".join(slurm.describe_jobs(config)))
        return 0
    configuration.check(config, num_ranks)
    if on_slurm:
        return _submit(config, options.config, options.overrides)
    if hosts:
        for host, command in local.host_commands(config, options.config, options.overrides):
            print(f"# on {host}\n{command}")
        return 0
    return pretrain_and_evaluate(config, options.config, options.overrides)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog=program.usage_name("python launch/pretrain.py"),
        description=DESCRIPTION,
        epilog=EXAMPLES,
        explains_keys=True,
    )
    parser.add_argument("config", help="a preset, such as simclr_cifar10, or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of the config")
    parser.add_argument(
        "--plan",
        action="store_true",
        help="print the resolved config, the learning rate and all sizes, then exit",
    )
    return parser.parse_intermixed_args(arguments)  # key=value may follow an option


def _submit(config: configuration.RunConfig, path: str, overrides: Sequence[str]) -> int:
    job_ids = slurm_job.submit(config, path, overrides)
    chain = config.launch.chain
    pretraining = ", ".join(job_ids[:chain])
    print(f"submitted to SLURM: pretraining {pretraining} on {slurm.num_ranks(config)} ranks")
    for name, job_id in zip(config.evaluation.at_end, job_ids[chain:]):
        print(f"  then {name}: {job_id}")
    log = f"{config.output}/slurm/{job_ids[0]}_0_log.out"
    print(f"follow it: {shlex.join(['tail', '-f', log])}")
    print(f"stop it:   {shlex.join(['scancel', *job_ids])}")
    return 0


def pretrain_and_evaluate(
    config: configuration.RunConfig,
    path: str,
    overrides: Sequence[str],
    evaluation_args: dict[str, list[str]] | None = None,
) -> int:
    """Pretrain, then run the evaluations of `evaluation.at_end` that the last checkpoint lacks.

    If an evaluation fails, the others still run.

    Args:
        config: Configuration of the run.
        path: YAML file that the configuration was read from.
        overrides: Overrides of that file, each as "key=value".
        evaluation_args: Command-line arguments by name of the evaluation, such as
            {"linear": ["--rows", "pretrained"]}.

    Returns:
        The exit status: 0 if the run is finished, 75 if it was asked to stop, 1 if an evaluation
        failed, or the status of training if training failed.
    """
    print("--- pretraining", flush=True)
    num_ranks = local.num_ranks(config)
    command = local.train_command(path, overrides, num_ranks, config.launch.max_restarts)
    status = _training_status(config, local.run(command))
    if status:
        return status
    statuses = run_final_evaluations(config, evaluation_args or {})
    if local.stop_requested():
        return STOPPED
    if statuses:
        dashboard.send_evaluations_unless_training(Path(config.output))
    if config.evaluation.at_end:
        has_export = configuration.takes_images(config)
        lines = result_text.describe_evaluated_run(Path(config.output), has_export=has_export)
        print(f"\n{lines}", flush=True)
    failures = [
        f"{name} (status {status})"
        for name, status in statuses.items()
        if status not in (0, NO_LABELS)
    ]
    if failures:
        message = f"error: {', '.join(failures)} failed; the other evaluations were run"
        print(message, file=sys.stderr, flush=True)
    return 1 if failures else 0


def pretrain_series(
    runs: Sequence[tuple[configuration.RunConfig, list[str]]],
    path: str,
    evaluation_args_for: EvaluationArgsFor = lambda config: {},
) -> int:
    """Pretrain and evaluate one run after the other.

    Args:
        runs: Configuration and overrides of each run.
        path: YAML file that the overrides apply to.
        evaluation_args_for: Function that returns the `evaluation_args` of a run.

    Returns:
        The exit status: 0 if all runs finished, 75 if a run was asked to stop, which also skips the
        runs after it, or 1 if a run failed.
    """
    failed_runs = []
    for number, (config, overrides) in enumerate(runs, start=1):
        print(f"=== {number} of {len(runs)}: {config.output}", flush=True)
        status = pretrain_and_evaluate(config, path, overrides, evaluation_args_for(config))
        if status == STOPPED:
            print(
                f"stopped in run {number} of {len(runs)}; run the same command to continue",
                flush=True,
            )
            return STOPPED
        if status:
            failed_runs.append(config.output)
    if failed_runs:
        print(f"error: these runs failed: {', '.join(failed_runs)}", file=sys.stderr)
    return 1 if failed_runs else 0


def _training_status(config: configuration.RunConfig, status: int) -> int:
    """Return 0 if training finished, 75 if it was stopped, and its own status if it failed."""
    if status == 0 and is_finished(config.output):
        return 0
    # A rank may be killed before it can handle the stop request.
    was_killed = local.stop_requested() and status >= 128
    if status not in (0, STOPPED) and not was_killed:
        return status
    checkpoints = list_checkpoints(config.output)
    next_start = (
        f"resumes from {checkpoints[-1].name}"
        if checkpoints
        else "starts from the beginning, because there is no checkpoint yet"
    )
    print(
        f"stopped before the end of training and not evaluated; the same command {next_start}",
        flush=True,
    )
    return STOPPED


if __name__ == "__main__":
    sys.exit(main())
