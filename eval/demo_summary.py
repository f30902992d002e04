"""Evaluate the demo's run and print a summary: accuracies, curves and next commands."""

import time
from pathlib import Path

import numpy as np

from ssl_pretrain.eval import command_line, knn, report, result_text, results, runs
from ssl_pretrain.eval.frozen import cached_linear
from ssl_pretrain.eval.html import run_files
from ssl_pretrain.system import program

HELP = """usage: python -m ssl_pretrain.eval.demo_summary RUN [phase=seconds ...]

Evaluate a run as `make demo` does: by k-NN, by a linear classifier with all, 1 and 5 labels per
class, and in a report. Print the accuracy of raw pixels, the random backbone and the pretrained one
side by side, the curves of the run, the duration of each phase, and the commands to try next.

    python -m ssl_pretrain.eval.demo_summary runs/demo training=95"""
SPARKLINE_BLOCKS = "▁▂▃▄▅▆▇█"
NEXT_COMMANDS = """next:
  my images   {inspect} /path/to/my/images
  CIFAR-10    {pretrain} simclr_cifar10_cpu
  all GPUs    {pretrain} simclr_imagenet data.root=/data/imagenet"""


def render_summary(run_path: str | Path, phase_seconds: dict[str, float] | None = None) -> str:
    """Return a text that compares raw pixels, the random backbone and the pretrained one.

    Args:
        run_path: Folder of an evaluated run.
        phase_seconds: Duration of each phase, by the name of the phase.

    Raises:
        ValueError: If the run has no k-NN or linear evaluation.
    """
    path = Path(run_path)
    evaluations = {result["name"]: result for result in results.load_newest(path)}
    for name in ("knn", "linear"):
        if name not in evaluations:
            raise ValueError(
                f"{path}: this run has no {name} evaluation; "
                f"run python -m ssl_pretrain.eval.{name} {path} first"
            )
    protocol, linear_protocol = evaluations["knn"]["protocol"], evaluations["linear"]["protocol"]
    lines = [
        protocol["images"],
        f"network: {protocol['network']}",
        "random backbone: the same network before its first step, with initial or recalibrated "
        "batch norm statistics, whichever is better",
        "",
        result_text.summary_table([evaluations["knn"], evaluations["linear"]]),
        "",
        f"k-NN: k = {protocol['k']}, temperature {protocol['temperature']}, on the test images",
    ]
    if "shifts" in protocol:
        lines.append(f"shifted: {protocol['shifts']}")
    if "few labels" in linear_protocol:
        lines.append(f"linear, n per class: {linear_protocol['few labels']}")
    lines += ["", *_draw_curves(path)]
    if phase_seconds:
        phases = ", ".join(f"{name} {seconds:.0f}" for name, seconds in phase_seconds.items())
        lines.append(f"seconds: {phases}")
    page = path / "report.html"
    report_or_command = page if page.is_file() else f"python -m ssl_pretrain.eval.report {path}"
    commands = {name: program.command(name) for name in ("inspect", "pretrain")}
    next_commands = NEXT_COMMANDS.format(**commands)
    return "\n".join([*lines, f"report: {report_or_command}", "", next_commands])


def _draw_curves(run_path: Path) -> list[str]:
    """Draw the loss and the k-NN accuracy of the run, one line each."""
    metrics = run_files.read_metrics(run_path)
    lines = []
    for title, key, unit in (
        ("loss", "loss", ""),
        ("k-NN", "knn", " %, of held-out training images"),
    ):
        if values := [value for _, value in run_files.metric_points(metrics, key)]:
            lines.append(f"{title}  {sparkline(values)}  {values[0]:.4g} to {values[-1]:.4g}{unit}")
    return lines


def sparkline(values: list[float], width: int = 48) -> str:
    """Draw a curve as at most `width` block characters. Each one shows the mean of a segment."""
    segments = np.array_split(np.array(values, dtype=float), min(width, len(values)))
    means = np.array([segment.mean() for segment in segments])
    levels = (means - means.min()) / (np.ptp(means) or 1) * (len(SPARKLINE_BLOCKS) - 1)
    return "".join(SPARKLINE_BLOCKS[int(level)] for level in levels.round())


def evaluate(run_path: str | Path) -> dict[str, float]:
    """Run the demo's evaluations and report, and return the duration of each in seconds."""
    run = runs.load_run(run_path)
    evaluations = {
        "k-NN": lambda: knn.evaluate(run),
        "linear": lambda: cached_linear.evaluate(run, labels_per_class=[1, 5]),
        "report": lambda: report.write(run),
    }
    seconds = {}
    for name, run_evaluation in evaluations.items():
        results.print_progress(f"{name}:")
        start = time.monotonic()
        run_evaluation()
        seconds[name] = time.monotonic() - start
    return seconds


def main(arguments: list[str]) -> None:
    """Run the command-line interface."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP)
        return
    phase_seconds = {}
    for argument in arguments[1:]:
        name, equals, value = argument.partition("=")
        if not equals or not value.replace(".", "", 1).isdigit():
            raise ValueError(
                f"{argument!r} is not the duration of a phase; give phase=seconds, "
                "such as training=95"
            )
        phase_seconds[name] = float(value)
    phase_seconds |= evaluate(arguments[0])
    print(f"\n{render_summary(arguments[0], phase_seconds)}")


if __name__ == "__main__":
    command_line.execute(main, "ssl_pretrain.eval.demo_summary")
