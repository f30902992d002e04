"""One run for each combination of values: python launch/sweep.py CONFIG optim.base_lr=0.2,0.3 seed=0,1 [key=value ...]

Or a question of configs/sweeps/, which ends in a table and a plot: python launch/sweep.py configs/sweeps/temperature.yaml
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file from a clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ssl_pretrain import config as configuration
from ssl_pretrain.config import ConfigError, RunConfig
from ssl_pretrain.launch import local, pretrain, slurm, study
from ssl_pretrain.system.exit_status import STOPPED


def main(arguments: Sequence[str] | None = None) -> int:
    with local.launching():
        return _main(arguments)


def _main(arguments: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="python launch/sweep.py",
        description="Pretrains once for each combination of the values given, each run in a folder of its own below `output`. On a SLURM "
        "cluster that is one array of jobs; elsewhere the runs follow each other. Runs that have ended are not run again.",
        epilog="""examples:
  python launch/sweep.py configs/simclr_digits.yaml optim.base_lr=0.001,0.002 seed=0,1            four runs, here
  python launch/sweep.py configs/byol_imagenet.yaml optim.base_lr=0.2,0.45 launch.cluster=slurm launch.nodes=2 launch.gpus_per_node=8
  python launch/sweep.py configs/simclr_digits.yaml seed=0,1,2 --list                              what would run
  python launch/sweep.py configs/sweeps/ablation.yaml seed=0,1,2                                   a study: its runs, a table, a plot
  python launch/sweep.py configs/sweeps/temperature.yaml --base configs/methods_cifar10_cpu.yaml data.root=cifar10.zip""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="a YAML of configs/, or a study of configs/sweeps/")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="several values, separated by commas, make several runs",
    )
    parser.add_argument("--list", action="store_true", help="print the runs, start nothing")
    parser.add_argument(
        "--base",
        metavar="CONFIG",
        help="for a study: pretrain on this config instead of the study's own",
    )
    parser.add_argument(
        "--table",
        type=Path,
        metavar="FILE.md",
        help="for a study: where its table goes (default: beside the runs)",
    )
    parser.add_argument(
        "--table-only",
        action="store_true",
        help="for a study: train nothing, write the table of the runs that are there",
    )
    options = parser.parse_intermixed_args(arguments)
    try:
        asked = study.load(options.config)
        if asked is not None:
            only = "list" if options.list else "table" if options.table_only else ""
            return study.main(
                asked, options.config, options.base, options.overrides, options.table, only
            )
        if not options.overrides:
            raise ConfigError(
                "give the values to try, such as seed=0,1, or a study of configs/sweeps/"
            )
        runs = [
            (configuration.load(options.config, overrides), overrides)
            for overrides in combinations(options.config, options.overrides)
        ]
        submitting = _submitting(runs[0][0])
        for run, overrides in runs:
            pretrain.check_evaluations(run)
            local.check_one_machine(run)
            if not submitting:
                slurm.check_here(run, overrides)
            configuration.check(run, slurm.ranks(run) if submitting else local.ranks_here(run))
        if options.list:
            print("\n".join(run.output for run, _ in runs))
            return 0
        if submitting:
            print(f"submitted to SLURM: {', '.join(slurm.submit_array(runs, options.config))}")
            return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    failed = []
    for number, (run, overrides) in enumerate(runs, start=1):
        print(f"=== {number} of {len(runs)}: {run.output}", flush=True)
        status = pretrain.pretrain_and_evaluate(run, options.config, overrides)[0]
        if status == STOPPED:
            print(
                f"stopped in run {number} of {len(runs)}; the same command goes on from there",
                flush=True,
            )
            return STOPPED
        if status:
            failed.append(run.output)
    if failed:
        print(f"error: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def combinations(path: str, overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of each run, its `output` among them, named by the values that differ.

    Raises:
        ConfigError: an override is not key=value.
    """
    choices: list[tuple[str, list[str]]] = []
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(
                f"{override!r}: an override is key=value, such as optim.base_lr=0.2,0.3"
            )
        choices.append((key, _values(key, value)))
    folder = next(
        (values[0] for key, values in choices if key == "output"), f"runs/{Path(path).stem}_sweep"
    )
    varying = [key for key, values in choices if len(values) > 1]
    found = []
    for values in itertools.product(*(values for _, values in choices)):
        chosen = dict(zip((key for key, _ in choices), values))
        name = ",".join(f"{key.rpartition('.')[2]}={chosen[key]}" for key in varying) or "run"
        found.append(
            [f"{key}={value}" for key, value in chosen.items() if key != "output"]
            + [f"output={folder}/{name}"]
        )
    return found


def _values(key: str, text: str) -> list[str]:
    """The values to try. A list, a mapping and `output` are one value; `\\,` is a comma inside a value."""
    if key == "output" or text.startswith(("[", "{")):
        return [text]
    return [value.replace("\\,", ",") for value in re.split(r"(?<!\\),", text)]


def _submitting(config: RunConfig) -> bool:
    return config.launch.cluster == "slurm" or (config.launch.cluster == "auto" and slurm.here())


if __name__ == "__main__":
    sys.exit(main())
