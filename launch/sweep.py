"""Start several runs: one per combination of values, or all runs of a study in configs/sweeps/.

python launch/sweep.py CONFIG optim.base_lr=0.2,0.3 seed=0,1 [key=value ...]
python launch/sweep.py configs/sweeps/temperature.yaml [key=value ...]
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file from a clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from ssl_pretrain.system import interruption

    interruption.report_in_one_line()

from ssl_pretrain import config as configuration
from ssl_pretrain.launch import local, pretrain, slurm, slurm_job, study, study_plan
from ssl_pretrain.launch.evaluation_jobs import check_final_evaluations
from ssl_pretrain.schema.argument_parser import ArgumentParser
from ssl_pretrain.schema.config_file import split_values
from ssl_pretrain.system import program

DESCRIPTION = """\
Pretrain once per combination of the given values, each run in its own folder below `output`.

On a SLURM cluster the runs form one job array. Elsewhere they run one after the other. A study in
configs/sweeps/ lists its own runs and ends with a table and a plot. Finished runs are not
repeated."""
EXAMPLES = """\
examples:
  four runs on this machine
    python launch/sweep.py configs/simclr_digits.yaml optim.base_lr=0.001,0.002 seed=0,1
  a job array of two runs on SLURM
    python launch/sweep.py configs/byol_imagenet.yaml optim.base_lr=0.2,0.45 launch.cluster=slurm
  print the folders of the runs without starting them
    python launch/sweep.py configs/simclr_digits.yaml seed=0,1,2 --list
  a study with three seeds
    python launch/sweep.py configs/sweeps/ablation.yaml seed=0,1,2
  every method with the CPU preset
    python launch/sweep.py configs/sweeps/methods.yaml data.root=cifar10.zip"""


@local.launcher
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options = _parse(arguments)
    path, overrides = options.config, options.overrides
    definition = study_plan.load(path)
    if definition is not None:
        return study.run_and_compare(definition, options)
    if not overrides:
        raise configuration.ConfigError(
            f"{path}: there are no values to combine; add some, such as seed=0,1, or give a study "
            "in configs/sweeps/"
        )
    runs = [
        study_plan.with_group(configuration.load(path, run_overrides), run_overrides)
        for run_overrides in combine_values(path, overrides)
    ]
    on_slurm = slurm.uses_slurm(runs[0][0].launch)
    for config, run_overrides in runs:
        check_final_evaluations(config)
        local.check_no_hosts(config)
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
    parser = ArgumentParser(
        prog=program.usage_name("python launch/sweep.py"),
        description=DESCRIPTION,
        epilog=EXAMPLES,
        explains_keys=True,
    )
    add = parser.add_argument
    add("config", help="a preset, a study such as ablation, or a YAML file")
    add(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="any configuration key; comma-separated values start one run each",
    )
    add("--list", action="store_true", help="print the folders of the runs without starting them")
    add("--base", metavar="CONFIG", help="study: configuration to use instead of the study's own")
    add(
        "--table",
        type=Path,
        metavar="FILE.md",
        help="study: file to write the table to (default: a file next to the runs)",
    )
    add(
        "--table-only",
        action="store_true",
        help="study: write the table of the finished runs without training",
    )
    return parser.parse_intermixed_args(arguments)


def combine_values(path: str, overrides: Sequence[str]) -> list[list[str]]:
    """Combine the given values into the overrides of each run.

    The `output` of a run is named after its values of the keys that have several.

    Raises:
        ConfigError: If an override is not key=value.
    """
    choices: dict[str, list[str]] = {}
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise configuration.ConfigError(
                f"{override!r}: not an override; give key=value, such as optim.base_lr=0.2,0.3"
            )
        choices[key] = split_values(key, value)
    (folder,) = choices.pop("output", [f"runs/{Path(path).stem}_sweep"])
    varying_keys = [key for key, values in choices.items() if len(values) > 1]
    runs = []
    for values in itertools.product(*choices.values()):
        settings = dict(zip(choices, values))
        name = (
            ",".join(f"{key.rpartition('.')[2]}={settings[key]}" for key in varying_keys) or "run"
        )
        run_overrides = [f"{key}={value}" for key, value in settings.items()]
        runs.append([*run_overrides, f"output={folder}/{name}"])
    return runs


if __name__ == "__main__":
    sys.exit(main())
