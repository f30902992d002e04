"""Add an evaluation's result to the files that its run keeps for TensorBoard and spreadsheets.

Weights & Biases gets results from its own client (`ssl_pretrain.launch.dashboard`).
"""

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ssl_pretrain.eval import saved_settings
from ssl_pretrain.monitoring import metric_names, tensorboard_tracker
from ssl_pretrain.system import durable_files, optional_packages

# Evaluations have a folder of their own. They run beside the training, and TensorBoard reads only
# the newest file of a folder.
TENSORBOARD_FOLDER = f"{tensorboard_tracker.FOLDER_NAME}/evaluations"
TABLE_NAME = "evaluations.csv"
# Results of a run, by the name of the evaluation and the step.
Results = dict[str, dict[int, dict[str, Any]]]
COLUMNS = ("evaluation", "step", "features", "metric", "value", "standard_deviation")


def track(run_path: Path, result: dict[str, Any], load_results: Callable[[], Results]) -> None:
    """Add a result to the files that the run's settings `log.tensorboard` and `log.csv` turn on.

    Args:
        run_path: Folder of the run.
        result: The new result.
        load_results: Returns all results of the run. It is called only for the table.
    """
    settings = saved_settings.read(run_path).get("log", {})
    if settings.get("tensorboard") and optional_packages.is_installed("tensorboard"):
        _write_events(run_path / TENSORBOARD_FOLDER, result)
    if settings.get("csv"):
        durable_files.replace(run_path / TABLE_NAME, _format_table(load_results()))


def _write_events(folder: Path, result: dict[str, Any]) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for name, value in metric_names.evaluation_metrics(result).items():
            writer.add_scalar(name, value, result["step"])


def _format_table(results: Results) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    for name, by_step in sorted(results.items()):
        for step, result in by_step.items():
            for row in result["rows"]:
                for metric, value in row["metrics"].items():
                    deviation = row["spread"].get(metric, "")
                    writer.writerow([name, step, row["features"], metric, value, deviation])
    return buffer.getvalue()
