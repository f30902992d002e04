"""Every method on the shared CPU preset, and the table of it: python launch/methods.py data.root=CIFAR10.zip"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file from a clone
    sys.path.insert(0, str(ROOT))

from ssl_pretrain import config as configuration
from ssl_pretrain import methods
from ssl_pretrain.config import RunConfig
from ssl_pretrain.eval import results
from ssl_pretrain.launch import local, pretrain, slurm
from ssl_pretrain.schema import FROM_ZERO
from ssl_pretrain.system.exit_status import STOPPED

CONFIG = "configs/methods_cifar10_cpu.yaml"
MARGIN = 3.0  # points above the random backbone that a method should reach


def main(arguments: Sequence[str] | None = None) -> int:
    with local.launching():
        return _main(arguments)


def _main(arguments: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="python launch/methods.py",
        description=f"Pretrains with every method as {CONFIG} says, one after the other, judges each by k-NN and writes one table. "
        "What is done already is not done again: stop it and start it as you like.",
        epilog="""examples:
  python launch/methods.py data.root=cifar10.zip                                  one seed: about an hour on two CPU cores
  python launch/methods.py data.root=cifar10.zip --methods byol vicreg --seeds 0 1 2
  python launch/methods.py --table-only                                           the table of the runs that are there
  python launch/methods.py --table-only --table docs/results/methods_cpu.md       the table of the documentation""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="any key of the config, for all methods"
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=methods.names(),
        default=methods.names(),
        metavar="NAME",
        help="default: all",
    )
    parser.add_argument("--seeds", nargs="+", type=FROM_ZERO, default=[0], metavar="N")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/methods"), help="where the runs are kept"
    )
    parser.add_argument(
        "--table",
        type=Path,
        metavar="FILE.md",
        help="where the table goes (default: methods.md beside the runs)",
    )
    parser.add_argument("--table-only", action="store_true", help="train nothing")
    options = parser.parse_intermixed_args(arguments)
    failed: list[str] = []
    try:
        due = [] if options.table_only else _due(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for number, (config, every) in enumerate(due, start=1):
        print(f"=== {config.method.name}, seed {config.seed}", flush=True)
        status = pretrain.pretrain_and_evaluate(config, str(ROOT / CONFIG), every)[0]
        if status == STOPPED:
            print(
                f"stopped in run {number} of {len(due)}; the same command goes on from there",
                flush=True,
            )
            return STOPPED
        if status:
            failed.append(Path(config.output).name)
    if not list(options.runs.glob("*_*/eval/knn.json")):
        print(
            f"error: {options.runs}: no run there has been evaluated, so no table was written",
            file=sys.stderr,
        )
        return 1 if failed else 2
    page = options.table or options.runs / "methods.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(table(options.runs))
    print(f"{page}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def _due(options: argparse.Namespace) -> list[tuple[RunConfig, list[str]]]:
    """The runs that have no k-NN yet, each with the overrides that make it of the preset."""
    due = []
    for seed in options.seeds:
        for name in options.methods:
            run = options.runs / f"{name}_{seed}"
            if not (run / "eval/knn.json").exists():
                every = [*overrides_of(name), *options.overrides, f"seed={seed}", f"output={run}"]
                config = configuration.load(str(ROOT / CONFIG), every)
                pretrain.check_evaluations(config)
                local.check_one_machine(config)
                slurm.check_here(config, every)
                due.append((config, every))
    return due


def overrides_of(name: str) -> list[str]:
    """What one method changes in the preset: its head for small networks, and its exceptions."""
    module = methods.find(name)
    return [
        f"method.name={name}",
        *(f"method.{key}={value}" for key, value in module.SMALL.items()),
        *getattr(module, "PRESET", []),
    ]


def table(runs: Path) -> str:
    """The runs below `runs` as Markdown: a row a method, mean and standard deviation over its seeds."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run in sorted(path for path in runs.glob("*_*") if (path / "eval/knn.json").exists()):
        found.setdefault(run.name.rpartition("_")[0], []).append(_read(run))
    lines = [
        "# Every method on the CPU preset",
        "",
        f"Made by `python launch/methods.py data.root=CIFAR10.zip` from {CONFIG}: {_settings(runs)}",
        "",
    ]
    baseline = next(iter(found.values()))[0]["rows"]
    lines += [
        "| features | seeds | k-NN, % | above random | effective rank | minutes | k-NN in the run, % |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | | {baseline[name]:.1f} | | | | |"
        for name in ("raw pixels", results.BETTER_RANDOM)
        if name in baseline
    ]
    for name, seeds in sorted(
        found.items(), key=lambda item: -statistics.mean(seed["knn"] for seed in item[1])
    ):
        gain = statistics.mean(seed["knn"] - seed["rows"][results.BETTER_RANDOM] for seed in seeds)
        reached = "" if gain >= MARGIN else f" (under {MARGIN:g})"
        curve = " ".join(f"{value:.0f}" for value in seeds[0]["curve"])
        cells = [
            name,
            str(len(seeds)),
            _mean(seeds, "knn"),
            f"{gain:+.1f}{reached}",
            _mean(seeds, "rank"),
            _mean(seeds, "minutes"),
            curve,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _read(run: Path) -> dict[str, Any]:
    rows = {
        row["features"]: row["metrics"]["clean"]
        for row in json.loads((run / "eval/knn.json").read_text())["rows"]
    }
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = sum(records[i]["time"] - records[i - 1]["time"] for i in range(1, len(records)))
    return {
        "rows": rows,
        "knn": rows["pretrained"],
        "rank": next(
            (record["rankme"] for record in reversed(records) if "rankme" in record), float("nan")
        ),
        "minutes": seconds / 60,
        "curve": [100 * record["knn"] for record in records if "knn" in record],
    }


def _mean(seeds: list[dict[str, Any]], key: str) -> str:
    values = [seed[key] for seed in seeds]
    return f"{statistics.mean(values):.1f}" + (
        f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    )


def _settings(runs: Path) -> str:
    path = next((path for path in sorted(runs.glob("*_*/config.yaml"))), ROOT / CONFIG)
    run = configuration.load(path)
    return (
        f"{run.backbone.name}, {run.data.subset:,} images, batch {run.global_batch_size}, {run.epochs} epochs, {run.optim.name}; "
        f"k {run.evaluation.k}, temperature {run.evaluation.temperature:g}, all 10,000 test images. The effective rank is RankMe of the "
        "embeddings at the run's end; minutes are from the first record to the last."
    )


if __name__ == "__main__":
    sys.exit(main())
