"""Start several runs: one per combination of values, or a study of configs/sweeps/ with its table.

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
from ssl_pretrain.launch import local, pretrain, slurm, slurm_job, study
from ssl_pretrain.launch.evaluation_jobs import check_names

DESCRIPTION = """\
Pretrain once per combination of the given values, each run in its own folder below `output`.

On a SLURM cluster the runs form one array of jobs. Elsewhere they start one after the other. A
study of configs/sweeps/ lists its own runs and ends with a table and a plot. Finished runs are not
repeated."""
EXAMPLES = """\
examples:
  four runs on this machine
    python launch/sweep.py configs/simclr_digits.yaml optim.base_lr=0.001,0.002 seed=0,1
  an array of two jobs on SLURM
    python launch/sweep.py configs/byol_imagenet.yaml optim.base_lr=0.2,0.45 launch.cluster=slurm
  print the folders of the runs without starting them
    python launch/sweep.py configs/simclr_digits.yaml seed=0,1,2 --list
  a study with three seeds
    python launch/sweep.py configs/sweeps/ablation.yaml seed=0,1,2
  every method on the CPU preset
    python launch/sweep.py configs/sweeps/methods.yaml data.root=cifar10.zip"""


@local.launcher
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options = _parse(arguments)
    path, overrides = options.config, options.overrides
    definition = study.load(path)
    if definition is not None:
        return study.run_and_compare(definition, options)
    if not overrides:
        raise configuration.ConfigError(
            "give the values to try, such as seed=0,1, or a study of configs/sweeps/"
        )
    runs = [(configuration.load(path, each), each) for each in combinations(path, overrides)]
    on_slurm = slurm.is_submitted(runs[0][0].launch)
    for config, run_overrides in runs:
        check_names(config.evaluation.at_end, "evaluation.at_end")
        local.check_one_machine(config)
        if not on_slurm:
            slurm.check_no_slurm_keys(config, run_overrides)
        num_ranks = slurm.num_ranks(config) if on_slurm else local.num_ranks(config)
        configuration.check(config, num_ranks)
    if options.list:
        print("\n".join(config.output for config, _ in runs))
        return 0
    if on_slurm:
        print(f"submitted to SLURM: {', '.join(slurm_job.submit_array(runs, path))}")
        return 0
    return pretrain.pretrain_series(runs, path)


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
    add("--list", action="store_true", help="print the folders of the runs without starting them")
    add("--base", metavar="CONFIG", help="study: base configuration that replaces the study's")
    add(
        "--table",
        type=Path,
        metavar="FILE.md",
        help="study: file to write the table to (default: a file beside the runs)",
    )
    add(
        "--table-only",
        action="store_true",
        help="study: write the table of the finished runs without training",
    )
    return parser.parse_intermixed_args(arguments)


def combinations(path: str, overrides: Sequence[str]) -> list[list[str]]:
    """Return the overrides of each run. Its `output` is named by the values that differ.

    Raises:
        ConfigError: If an override is not key=value.
    """
    choices: dict[str, list[str]] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise configuration.ConfigError(
                f"{override!r}: an override is key=value, such as optim.base_lr=0.2,0.3"
            )
        choices[key] = _split_values(key, value)
    (folder,) = choices.pop("output", [f"runs/{Path(path).stem}_sweep"])
    varying = [key for key, values in choices.items() if len(values) > 1]
    runs = []
    for values in itertools.product(*choices.values()):
        settings = dict(zip(choices, values))
        name = ",".join(f"{key.rpartition('.')[2]}={settings[key]}" for key in varying) or "run"
        run_overrides = [f"{key}={value}" for key, value in settings.items()]
        runs.append([*run_overrides, f"output={folder}/{name}"])
    return runs


def _split_values(key: str, text: str) -> list[str]:
    r"""Split the values to try at commas.

    A list, a mapping and `output` are one value. `\,` is a comma inside a value.
    """
    if key == "output" or text.startswith(("[", "{")):
        return [text]
    return [value.replace("\\,", ",") for value in re.split(r"(?<!\\),", text)]


if __name__ == "__main__":
    sys.exit(main())
