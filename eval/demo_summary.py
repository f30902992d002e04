"""What `make demo` prints at its end: the numbers of a run's evaluations, its curves in one line each, and what to do next."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from ssl_pretrain.eval import command_line, knn, report, results, runs
from ssl_pretrain.eval.frozen import cached_linear
from ssl_pretrain.eval.html import sections

COMPARED = (
    ("raw pixels", "raw pixels"),
    ("random backbone", results.BETTER_RANDOM),
    ("pretrained", "pretrained"),
)
HELP = """usage: python -m ssl_pretrain.eval.demo RUN [phase=seconds ...]

Measures a run as the demo does (k-NN, linear with all, 1 and 5 labels per class, the report), then prints raw pixels,
the random backbone and the pretrained one side by side, the run's curves, the seconds of each phase, and what to do next.

    python -m ssl_pretrain.eval.demo runs/demo training=95"""
BLOCKS = "▁▂▃▄▅▆▇█"
NEXT = """next:
  my images   python -m ssl_pretrain.data.inspect /path/to/my/images      # counts them and prints a config to start from
  CIFAR-10    python launch/pretrain.py configs/simclr_cifar10_cpu.yaml   # 10 epochs of a small ResNet, on a CPU
  8 GPUs      torchrun --nproc-per-node 8 -m ssl_pretrain.train configs/simclr_imagenet.yaml data.root=/data/imagenet"""


def summary(run: str | Path, seconds: dict[str, float] | None = None) -> str:
    """The numbers of RUN/eval/, raw pixels | random backbone | pretrained, with their split and k, as text.

    Args:
        run: the run's folder, evaluated already.
        seconds: taken by each phase, by its name.

    Raises:
        ValueError: the run has no k-NN or linear evaluation.
    """
    path = Path(run)
    found = {result["name"]: result for result in results.load(path)}
    for name in ("knn", "linear"):
        if name not in found:
            raise ValueError(
                f"{path}: has no {name} evaluation; run python -m ssl_pretrain.eval.{name} {path} first"
            )
    neighbours, classifiers = found["knn"], found["linear"]
    about = [
        neighbours["protocol"]["images"],
        f"network: {neighbours['protocol']['network']}",
        "random backbone: the same network before its first step; the better of its batch norm as built and recalibrated",
    ]
    lines = [_line(neighbours, column, f"k-NN, {column}") for column in results.columns(neighbours)]
    lines += [
        _line(classifiers, column, f"linear, {column}") for column in results.columns(classifiers)
    ]
    numbers = results.table(["accuracy, %", *(title for title, _ in COMPARED)], lines)
    protocol = [
        f"k-NN: k = {neighbours['protocol']['k']}, temperature {neighbours['protocol']['temperature']}, on the test images"
    ]
    if "shifts" in neighbours["protocol"]:
        protocol.append(f"shifted: {neighbours['protocol']['shifts']}")
    if "few labels" in classifiers["protocol"]:
        protocol.append(f"linear, n per class: {classifiers['protocol']['few labels']}")
    phases = (
        [f"seconds: {', '.join(f'{name} {value:.0f}' for name, value in seconds.items())}"]
        if seconds
        else []
    )
    page = path / "report.html"
    written = (
        [f"report: {page}"]
        if page.is_file()
        else [f"report: python -m ssl_pretrain.eval.report {path}"]
    )
    return "\n".join(
        [*about, "", numbers, "", *protocol, "", *_curves(path), *phases, *written, "", NEXT]
    )


def _line(result: dict[str, Any], column: str, title: str) -> list[str]:
    rows = {row["features"]: row for row in result["rows"]}
    return [
        title,
        *(results.number(rows[name], column) if name in rows else "-" for _, name in COMPARED),
    ]


def _curves(run: Path) -> list[str]:
    records = sections.read_metrics(run)
    drawn = []
    for title, key, unit in (("loss", "loss", 1), ("k-NN", "knn", 100)):
        values = [unit * value for _, value in sections.curve(records, key)]
        if values:
            of = " %, of held-out training images" if key == "knn" else ""
            drawn.append(f"{title}  {sparkline(values)}  {values[0]:.4g} to {values[-1]:.4g}{of}")
    return drawn


def sparkline(values: list[float], width: int = 48) -> str:
    """A curve in one line of blocks, from its lowest value to its highest; longer ones are averaged to `width`."""
    means = np.array(
        [
            part.mean()
            for part in np.array_split(np.array(values, dtype=float), min(width, len(values)))
        ]
    )
    span = means.max() - means.min()
    levels = np.zeros(len(means)) if span == 0 else (means - means.min()) / span * (len(BLOCKS) - 1)
    return "".join(BLOCKS[int(level)] for level in levels.round())


def evaluate(path: str | Path) -> dict[str, float]:
    """Runs the evaluations and the report of the demo in one process; returns the seconds that each took."""
    run = runs.load_run(path)
    phases = {
        "k-NN": lambda: knn.evaluate(run),
        "linear": lambda: cached_linear.evaluate(run, labels_per_class=[1, 5]),
        "report": lambda: report.write(run),
    }
    seconds = {}
    for name, phase in phases.items():
        results.print_progress(f"{name}:")
        began = time.monotonic()
        phase()
        seconds[name] = time.monotonic() - began
    return seconds


def main(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP)
        return
    earlier = {}
    for argument in arguments[1:]:
        name, equals, value = argument.partition("=")
        if not equals or not value.replace(".", "", 1).isdigit():
            raise ValueError(f"{argument!r}: give phase=seconds, such as training=95")
        earlier[name] = float(value)
    print(f"\n{summary(arguments[0], earlier | evaluate(arguments[0]))}")


if __name__ == "__main__":
    command_line.execute(main, "ssl_pretrain.eval.demo")
