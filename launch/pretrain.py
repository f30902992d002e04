"""Pretrains as a YAML says, then evaluates: python launch/pretrain.py CONFIG [key=value ...]"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone that is not installed, too

from launch import dashboard, local, slurm
from ssl_pretrain import checkpoint, plan
from ssl_pretrain import config as configuration
from ssl_pretrain.config import ConfigError, RunConfig

EVALUATIONS = ("knn", "linear", "spectrum", "retrieval", "robustness", "semi", "finetune", "export", "report")


def main(arguments: Sequence[str] | None = None) -> int:
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
        "--plan", action="store_true", help="print the resolved config, the learning rate and the sizes of everything, then exit"
    )
    options = parser.parse_intermixed_args(arguments)  # key=value after an option, too
    try:
        config = configuration.load(options.config, options.overrides)
        unknown = [name for name in config.evaluation.at_end if name not in EVALUATIONS]
        if unknown:
            raise ConfigError(f"evaluation.at_end: {unknown[0]!r} is not an evaluation; choose among: {', '.join(EVALUATIONS)}")
        submitting = config.launch.cluster == "slurm" or (config.launch.cluster == "auto" and slurm.here() and not config.launch.hosts)
        hosts = max(1, len([host for host in config.launch.hosts.split(",") if host.strip()]))
        ranks = slurm.ranks(config) if submitting else local.ranks_here(config) * hosts
        if options.plan:
            print(plan.describe(config, plan.ranks(config, ranks)))
            if submitting:
                print("\n".join(slurm.describe(config)))
            return 0
        configuration.check(config, ranks)
        if submitting:
            return _submit(config, options.config, options.overrides)
        if config.launch.hosts:
            for host, line in local.host_commands(config, options.config, options.overrides):
                print(f"# on {host}\n{line}")
            return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return pretrain_and_evaluate(config, options.config, options.overrides)[0]


def _submit(config: RunConfig, path: str, overrides: Sequence[str]) -> int:
    jobs = slurm.submit(config, path, overrides)
    chain = config.launch.chain
    print(f"submitted to SLURM: pretraining {', '.join(jobs[:chain])} on {slurm.ranks(config)} ranks")
    for name, job in zip(config.evaluation.at_end, jobs[chain:]):
        print(f"  then {name}: {job}")
    print(f"follow it: tail -f {config.output}/slurm/{jobs[0]}_0_log.out\nstop it:   scancel {' '.join(jobs)}")
    return 0


def pretrain_and_evaluate(
    config: RunConfig, path: str, overrides: Sequence[str], options: dict[str, list[str]] | None = None
) -> tuple[int, dict[str, float]]:
    """(exit status, seconds by phase). A run that stopped before its end is not evaluated.

    Args:
        options: of evaluations by name, such as {"linear": ["--rows", "pretrained"]}.
    """
    seconds: dict[str, float] = {}
    phases = [("pretraining", local.train_command(path, overrides, local.ranks_here(config), config.launch.max_restarts))]
    for name in config.evaluation.at_end:
        phases.append((name, [sys.executable, "-m", f"eval.{name}", config.output, *(options or {}).get(name, [])]))
    for name, command in phases:
        print(f"--- {name}", flush=True)
        start = time.monotonic()
        status = local.run(command)
        seconds[name] = time.monotonic() - start
        if status:
            return status, seconds
        if name == "pretraining" and not _finished(config):
            print(f"stopped before its end; start it again to go on from {checkpoint.newest(config.output).name}", flush=True)
            return 0, seconds
    dashboard.send(Path(config.output))
    return 0, seconds


def _finished(config: RunConfig) -> bool:
    """Whether the newest checkpoint is the run's last: the training wrote it only if it saw the end."""
    manifest = checkpoint.verify(checkpoint.newest(config.output))
    return manifest["step"] >= manifest["last_step"]


if __name__ == "__main__":
    sys.exit(main())
