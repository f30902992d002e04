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
sys.path.insert(0, str(ROOT))  # runs from a clone that is not installed, too

from eval import results
from launch import pretrain
from ssl_pretrain import config as configuration
from ssl_pretrain import methods

CONFIG = "configs/methods_cifar10_cpu.yaml"
MARGIN = 3.0  # points above the random backbone that a method should reach


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python launch/methods.py",
        description=f"Pretrains with every method as {CONFIG} says, one after the other, judges each by k-NN and writes one table. "
        "What is done already is not done again: stop it and start it as you like.",
        epilog="""examples:
  python launch/methods.py data.root=cifar10.zip                                  one seed: about an hour on two CPU cores
  python launch/methods.py data.root=cifar10.zip --methods byol vicreg --seeds 0 1 2
  python launch/methods.py --table-only                                           the table of the runs that are there""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of the config, for all methods")
    parser.add_argument("--methods", nargs="+", choices=methods.names(), default=methods.names(), metavar="NAME", help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N")
    parser.add_argument("--runs", type=Path, default=Path("runs/methods"), help="where the runs are kept")
    parser.add_argument("--table", type=Path, default=ROOT / "docs/results/methods_cpu.md")
    parser.add_argument("--table-only", action="store_true", help="train nothing")
    options = parser.parse_intermixed_args(arguments)
    failed = []
    for seed in options.seeds:
        for name in [] if options.table_only else options.methods:
            run = options.runs / f"{name}_{seed}"
            if not (run / "eval/knn.json").exists() and _pretrain(name, seed, run, options.overrides):
                failed.append(run.name)
    options.table.parent.mkdir(parents=True, exist_ok=True)
    options.table.write_text(table(options.runs))
    print(f"{options.table}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def overrides_of(name: str) -> list[str]:
    """What one method changes in the preset: its head for small networks, and its exceptions."""
    module = methods.find(name)
    return [f"method.name={name}", *(f"method.{key}={value}" for key, value in module.SMALL.items()), *getattr(module, "PRESET", [])]


def _pretrain(name: str, seed: int, run: Path, overrides: Sequence[str]) -> int:
    print(f"=== {name}, seed {seed}", flush=True)
    every = [*overrides_of(name), *overrides, f"seed={seed}", f"output={run}"]
    path = str(ROOT / CONFIG)
    return pretrain.pretrain_and_evaluate(configuration.load(path, every), path, every)[0]


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
    if not found:
        return "\n".join([*lines, "Not run."]) + "\n"
    baseline = next(iter(found.values()))[0]["rows"]
    lines += [
        "| features | seeds | k-NN, % | above random | effective rank | minutes | k-NN in the run, % |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [f"| {name} | | {baseline[name]:.1f} | | | | |" for name in ("raw pixels", results.BETTER) if name in baseline]
    for name, seeds in sorted(found.items(), key=lambda item: -statistics.mean(seed["knn"] for seed in item[1])):
        gain = statistics.mean(seed["knn"] - seed["rows"][results.BETTER] for seed in seeds)
        reached = "" if gain >= MARGIN else f" (under {MARGIN:g})"
        curve = " ".join(f"{value:.0f}" for value in seeds[0]["curve"])
        cells = [name, str(len(seeds)), _mean(seeds, "knn"), f"{gain:+.1f}{reached}", _mean(seeds, "rank"), _mean(seeds, "minutes"), curve]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _read(run: Path) -> dict[str, Any]:
    rows = {row["features"]: row["metrics"]["clean"] for row in json.loads((run / "eval/knn.json").read_text())["rows"]}
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = sum(records[i]["time"] - records[i - 1]["time"] for i in range(1, len(records)))
    return {
        "rows": rows,
        "knn": rows["pretrained"],
        "rank": next((record["rankme"] for record in reversed(records) if "rankme" in record), float("nan")),
        "minutes": seconds / 60,
        "curve": [100 * record["knn"] for record in records if "knn" in record],
    }


def _mean(seeds: list[dict[str, Any]], key: str) -> str:
    values = [seed[key] for seed in seeds]
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


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
