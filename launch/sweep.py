"""Several runs: one per combination of values, or a study of configs/sweeps/ with its table.

python launch/sweep.py CONFIG optim.base_lr=0.2,0.3 seed=0,1 [key=value ...]
python launch/sweep.py configs/sweeps/temperature.yaml [key=value ...]
"""

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
from ssl_pretrain.launch import local, pretrain, slurm, slurm_submit, study
from ssl_pretrain.launch.final_evaluations import check_evaluations
from ssl_pretrain.system.exit_status import STOPPED

DESCRIPTION = """\
Pretrain once per combination of the given values, each run in its own folder below `output`.

On a SLURM cluster the runs are one array of jobs. Elsewhere they follow each other. A study of
configs/sweeps/ names its runs itself and ends with a table and a plot. Runs that have ended are not
repeated."""
EXAMPLES = """\
examples:
  four runs on this machine
    python launch/sweep.py configs/simclr_digits.yaml optim.base_lr=0.001,0.002 seed=0,1
  an array of two jobs on SLURM
    python launch/sweep.py configs/byol_imagenet.yaml optim.base_lr=0.2,0.45 launch.cluster=slurm
  the folders of the runs, without starting them
    python launch/sweep.py configs/simclr_digits.yaml seed=0,1,2 --list
  a study with three seeds
    python launch/sweep.py configs/sweeps/ablation.yaml seed=0,1,2
  every method on the CPU preset
    python launch/sweep.py configs/sweeps/methods.yaml data.root=cifar10.zip"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    with local.launching():
        return _main(_parse(arguments))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python launch/sweep.py",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("config", help="a YAML of configs/, or a study of configs/sweeps/")
    add(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="any key of the config; values separated by commas make several runs",
    )
    add("--list", action="store_true", help="print the folders of the runs and start nothing")
    add("--base", metavar="CONFIG", help="study: config to use instead of the study's own")
    add(
        "--table",
        type=Path,
        metavar="FILE.md",
        help="study: file for the table (default: a file beside the runs)",
    )
    add(
        "--table-only",
        action="store_true",
        help="study: train nothing, and write the table of the runs that are done",
    )
    return parser.parse_intermixed_args(arguments)


def _main(options: argparse.Namespace) -> int:
    try:
        definition = study.load(options.config)
        if definition is not None:
            only = "list" if options.list else "table" if options.table_only else ""
            return study.main(
                definition, options.config, options.base, options.overrides, options.table, only
            )
        if not options.overrides:
            raise ConfigError(
                "give the values to try, such as seed=0,1, or a study of configs/sweeps/"
            )
        runs = [
            (configuration.load(options.config, overrides), overrides)
            for overrides in combinations(options.config, options.overrides)
        ]
        submitting = slurm.is_submitted(runs[0][0].launch)
        for run, overrides in runs:
            _check(run, overrides, submitting)
        if options.list:
            print("\n".join(run.output for run, _ in runs))
            return 0
        if submitting:
            jobs = slurm_submit.submit_array(runs, options.config)
            print(f"submitted to SLURM: {', '.join(jobs)}")
            return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return _run_all(runs, options.config)


def _check(run: RunConfig, overrides: Sequence[str], submitting: bool) -> None:
    """Raise ConfigError unless the run can start in a sweep."""
    check_evaluations(run)
    local.check_one_machine(run)
    if not submitting:
        slurm.check_not_submitted(run, overrides)
    configuration.check(run, slurm.num_ranks(run) if submitting else local.num_ranks(run))


def _run_all(runs: Sequence[tuple[RunConfig, list[str]]], path: str) -> int:
    """Pretrain and evaluate one run after the other, and return the exit status."""
    failed = []
    for number, (run, overrides) in enumerate(runs, start=1):
        print(f"=== {number} of {len(runs)}: {run.output}", flush=True)
        status = pretrain.pretrain_and_evaluate(run, path, overrides)[0]
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
    """Return the overrides of each run, with an `output` named by the values that differ.

    Raises:
        ConfigError: An override is not key=value.
    """
    choices: list[tuple[str, list[str]]] = []
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(
                f"{override!r}: an override is key=value, such as optim.base_lr=0.2,0.3"
            )
        choices.append((key, _values(key, value)))
    folders = [values[0] for key, values in choices if key == "output"]
    folder = folders[0] if folders else f"runs/{Path(path).stem}_sweep"
    varying = [key for key, values in choices if len(values) > 1]
    runs = []
    for values in itertools.product(*(values for _, values in choices)):
        value_of = dict(zip((key for key, _ in choices), values))
        name = ",".join(f"{key.rpartition('.')[2]}={value_of[key]}" for key in varying) or "run"
        settings = [f"{key}={value}" for key, value in value_of.items() if key != "output"]
        runs.append([*settings, f"output={folder}/{name}"])
    return runs


def _values(key: str, text: str) -> list[str]:
    r"""Split the values to try at commas.

    A list, a mapping and `output` are one value. `\,` is a comma inside a value.
    """
    if key == "output" or text.startswith(("[", "{")):
        return [text]
    return [value.replace("\\,", ",") for value in re.split(r"(?<!\\),", text)]


if __name__ == "__main__":
    sys.exit(main())
