"""Destinations of a run's metrics beside `metrics.jsonl`.

All trackers use the names of `metrics.jsonl`. Those that show metrics in sections put the name of
the section first, as in `Learning/loss` (`metric_names.tracker_name`).
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from ssl_pretrain.monitoring.background_writer import BackgroundWriter
from ssl_pretrain.monitoring.csv_tracker import CsvTracker
from ssl_pretrain.monitoring.log_config import LogConfig
from ssl_pretrain.monitoring.tensorboard_tracker import TensorBoardTracker
from ssl_pretrain.monitoring.wandb import run as wandb_run


class Tracker(Protocol):
    """One destination of a run's metrics. No method may delay the training steps."""

    def log_record(
        self, record: dict[str, Any], curves: dict[str, list[float]] | None = None
    ) -> None:
        """Log a record of `metrics.jsonl`.

        Args:
            record: Metrics by name, with the step.
            curves: The newest line of `plots.jsonl`, unless an earlier call already had it.
        """

    def log_picture(self, key: str, path: str, caption: str, step: int) -> None:
        """Log a picture.

        Args:
            key: Name of the picture.
            path: Path of its file.
            caption: Text below the picture.
            step: Optimizer steps done.
        """

    def raise_alert(self, title: str, text: str, tag: str) -> None:
        """Show an alert of the run. Alerts of one kind have the same tag."""

    def close(self, succeeded: bool = True) -> None:
        """Write what is pending. A run that did not succeed may be marked as failed."""


def start(
    settings: LogConfig,
    run: Path,
    config: dict[str, Any],
    *,
    wandb_id: str | None,
    past_records: list[dict[str, Any]],
    num_steps_done: int,
    writer: BackgroundWriter,
    print_line: Callable[[str], None],
) -> list[Tracker]:
    """Start the trackers that the settings choose.

    Args:
        settings: The `log` section of the configuration.
        run: The run's folder.
        config: Resolved configuration, which W&B and TensorBoard show.
        wandb_id: Identifier of the W&B run to continue, or None to start a new one.
        past_records: Records of a resumed run.
        num_steps_done: Number of steps that the run has already done.
        writer: Writer of small files in the background.
        print_line: Function that prints a message of a tracker.
    """
    trackers: list[Tracker] = []
    wandb = wandb_run.start(
        settings.wandb,
        run,
        run_id=wandb_id,
        print_line=print_line,
        project=settings.project,
        name=settings.name,
        config=config,
        tags=list(settings.tags),
        group=settings.group,
        stall_seconds=settings.stall_seconds,
    )
    if wandb is not None:
        trackers.append(wandb)
    if settings.tensorboard:
        config_text = json.dumps(config, indent=1)
        trackers.append(TensorBoardTracker(run, num_steps_done, config_text, print_line))
    if settings.csv:
        trackers.append(CsvTracker(run, writer, past_records))
    return trackers


def find_wandb_id(trackers: list[Tracker]) -> str | None:
    """Return the identifier of the run in W&B, or None without W&B."""
    ids = [tracker.run_id for tracker in trackers if isinstance(tracker, wandb_run.WandbRun)]
    return ids[0] if ids else None
