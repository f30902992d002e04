"""Pretrains as a YAML says, then evaluates: python launch/pretrain.py CONFIG [key=value ...]"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a file from a clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ssl_pretrain import config as configuration
from ssl_pretrain.checkpoint.folder import is_finished, list_checkpoints, newest_checkpoint
from ssl_pretrain.config import ConfigError, RunConfig
from ssl_pretrain.launch import dashboard, local, slurm
from ssl_pretrain.planning import plan
from ssl_pretrain.system.exit_status import SKIPPED, STOPPED

EVALUATIONS = (
    "knn",
    "linear",
    "spectrum",
    "retrieval",
    "robustness",
    "semi",
    "finetune",
    "export",
    "report",
)


def main(arguments: Sequence[str] | None = None) -> int:
    with local.launching():
        return _main(arguments)


def _main(arguments: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="python launch/pretrain.py",
        description="Pretrains, then runs the evaluations of evaluation.at_end. On a SLURM cluster it submits both and returns; elsewhere "
        "it starts the ranks on this machine (one a GPU; on CPU as launch.ranks says). Started again, it goes on where the run stopped.",
        epilog="""examples:
  python launch/pretrain.py configs/simclr_digits.yaml                                   a minute on a laptop
  python launch/pretrain.py configs/simclr_cifar10_cpu.yaml data.root=cifar10.zip        half an hour on two CPU cores
  python launch/pretrain.py configs/simclr_imagenet.yaml data.root=/data/imagenet        every GPU of this machine
  python launch/pretrain.py configs/simclr_imagenet.yaml launch.nodes=8 launch.gpus_per_node=8 launch.partition=gpu      SLURM
  python launch/pretrain.py configs/simclr_imagenet.yaml --plan launch.ranks=8           what would run, without running it
  python launch/pretrain.py configs/simclr_imagenet.yaml launch.hosts=a,b                the torchrun line for each host""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="a YAML of configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of the config")
    parser.add_argument(
        "--plan",
        action="store_true",
        help="print the resolved config, the learning rate and the sizes of everything, then exit",
    )
    options = parser.parse_intermixed_args(arguments)  # key=value after an option, too
    try:
        config = configuration.load(options.config, options.overrides)
        check_evaluations(config)
        submitting = config.launch.cluster == "slurm" or (
            config.launch.cluster == "auto" and slurm.here() and not config.launch.hosts
        )
        if not submitting:
            slurm.check_here(config, options.overrides)
        hosts = local.host_names(config)
        ranks = slurm.ranks(config) if submitting else local.ranks_here(config) * max(1, len(hosts))
        if options.plan:
            print(plan.describe(config, plan.num_ranks(config, ranks)))
            if submitting:
                print("\n".join(slurm.describe(config)))
            return 0
        configuration.check(config, ranks)
        if submitting:
            return _submit(config, options.config, options.overrides)
        if hosts:
            for host, line in local.host_commands(config, options.config, options.overrides):
                print(f"# on {host}\n{line}")
            return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return pretrain_and_evaluate(config, options.config, options.overrides)[0]


def check_evaluations(config: RunConfig) -> None:
    """Raise ConfigError for a name in `evaluation.at_end` that is no evaluation."""
    unknown = [name for name in config.evaluation.at_end if name not in EVALUATIONS]
    if unknown:
        raise ConfigError(
            f"evaluation.at_end: {unknown[0]!r} is not an evaluation; choose among: {', '.join(EVALUATIONS)}"
        )


def _submit(config: RunConfig, path: str, overrides: Sequence[str]) -> int:
    jobs = slurm.submit(config, path, overrides)
    chain = config.launch.chain
    print(
        f"submitted to SLURM: pretraining {', '.join(jobs[:chain])} on {slurm.ranks(config)} ranks"
    )
    for name, job in zip(config.evaluation.at_end, jobs[chain:]):
        print(f"  then {name}: {job}")
    log = f"{config.output}/slurm/{jobs[0]}_0_log.out"
    print(
        f"follow it: {shlex.join(['tail', '-f', log])}\nstop it:   {shlex.join(['scancel', *jobs])}"
    )
    return 0


def pretrain_and_evaluate(
    config: RunConfig,
    path: str,
    overrides: Sequence[str],
    options: dict[str, list[str]] | None = None,
) -> tuple[int, dict[str, float]]:
    """Pretrain, then run each evaluation of `evaluation.at_end` that the last checkpoint does not have yet.

    If one of them fails, the others are still run.

    Args:
        options: Options of evaluations by name, such as {"linear": ["--rows", "pretrained"]}.

    Returns:
        The exit status and the seconds by phase. The status is 0 for a finished run, 75 for one that
        was asked to stop, 1 if an evaluation failed, and the training's own if that failed.
    """
    seconds: dict[str, float] = {}

    def phase(name: str, command: Sequence[str]) -> int:
        print(f"--- {name}", flush=True)
        start = time.monotonic()
        status = local.run(command)
        seconds[name] = time.monotonic() - start
        return status

    train = local.train_command(
        path, overrides, local.ranks_here(config), config.launch.max_restarts
    )
    status = _status_of_training(config, phase("pretraining", train))
    if status:
        return status, seconds
    failed: list[str] = []
    for due in _due_evaluations(config, options or {}):
        status = phase(due.name, due.command)
        if local.stop_requested():
            print(
                f"stopped in {due.name}, after the pretraining: the same command goes on with it",
                flush=True,
            )
            return STOPPED, seconds
        if status == 0:
            due.note()
        elif status != SKIPPED:
            failed.append(f"{due.name} (status {status})")
    if seconds.keys() > {"pretraining"}:
        dashboard.send(Path(config.output))
    if failed:
        print(
            f"error: failed: {', '.join(failed)}; the other evaluations were run",
            file=sys.stderr,
            flush=True,
        )
    return 1 if failed else 0, seconds


def _status_of_training(config: RunConfig, status: int) -> int:
    """Return 0 for a finished training, 75 for a stopped one, and the status of one that failed."""
    if status == 0 and is_finished(config.output):
        return 0
    killed = local.stop_requested() and status >= 128  # before it could heed the request
    if status not in (0, STOPPED) and not killed:
        return status
    saved = list_checkpoints(config.output)
    where = (
        f"goes on from {saved[-1].name}" if saved else "starts it anew, as nothing was saved yet"
    )
    print(f"stopped before its end, and so not evaluated: the same command {where}", flush=True)
    return STOPPED


@dataclass
class Evaluation:
    """An evaluation of the last checkpoint. The file `place` holds the settings of the last time it was run."""

    name: str
    command: list[str]
    place: Path
    settings: str

    def is_done(self) -> bool:
        with suppress(OSError):
            return self.place.read_text() == self.settings
        return False

    def note(self) -> None:
        self.place.parent.mkdir(parents=True, exist_ok=True)
        self.place.write_text(self.settings)


def _due_evaluations(config: RunConfig, options: dict[str, list[str]]) -> Iterator[Evaluation]:
    """Yield the evaluations that the last checkpoint does not have with these settings.

    The report is due again after any other evaluation has been run.
    """
    written = configuration.to_dict(config)
    folder = Path(config.output) / "eval" / newest_checkpoint(config.output).name
    made = False
    for name in config.evaluation.at_end:
        arguments = options.get(name, [])
        settings = json.dumps(
            {"data": written["data"], "evaluation": written["evaluation"], "arguments": arguments},
            indent=1,
        )
        command = [
            sys.executable,
            "-m",
            f"ssl_pretrain.eval.{name}",
            config.output,
            "--skip-unlabeled",
            *arguments,
        ]
        due = Evaluation(name, command, folder / f".{name}.done", settings)
        if due.is_done() and not (made and name == "report"):
            print(
                f"--- {name}: done before; python -m ssl_pretrain.eval.{name} {config.output} does it again",
                flush=True,
            )
            continue
        yield due
        made = made or due.is_done()


if __name__ == "__main__":
    sys.exit(main())
