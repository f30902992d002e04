"""Log metrics, alerts and pictures to the run's folder, the terminal and the trackers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.monitoring import (
    background_writer,
    image_grids,
    metric_names,
    records,
    shown_bands,
    trackers,
)
from ssl_pretrain.monitoring.background_writer import BackgroundWriter
from ssl_pretrain.monitoring.console import Console, WarningCollector
from ssl_pretrain.monitoring.interval import Interval, IntervalSummary
from ssl_pretrain.monitoring.log_config import LogConfig
from ssl_pretrain.monitoring.records import Measurements
from ssl_pretrain.monitoring.trackers import Tracker
from ssl_pretrain.system import durable_files
from ssl_pretrain.views.batch import Batch
from ssl_pretrain.views.recipe import ViewsConfig

T = TypeVar("T")
NEIGHBORS_CAPTION = (
    "query on the left, then its nearest training images, green if their class is the query's"
)


class Logger:
    """Logger of a run. Rank 0 writes one record for all ranks every `log.every_steps` steps.

    Args:
        settings: The `log` section of the configuration.
        run: The run's folder.
        num_steps_done: Number of steps that the run has already done.
        last_step: Number of steps of the whole run.
        steps_per_epoch: Optimizer steps per epoch.
        global_batch_size: Images per optimizer step.
        config: Resolved configuration, shown in W&B.
        wandb_id: Identifier of the W&B run to continue, or None to start a new one.
        flops_per_image: Floating-point operations of a training step per image, or 0 if unknown.
        peak_tflops: Peak TFLOP/s of a rank's device, or 0 if unknown.
        on_failure: Reaction to a record that cannot be written. `stop` sets `must_stop`. `warn`
            prints a warning and keeps the record in memory.

    Attributes:
        past_records: Records that a resumed run has already written, on rank 0.
        must_stop: True on all ranks if the run has to end because a record was not written.
        wandb_id: Identifier of the run in W&B, which its checkpoints store.

    Raises:
        SaveError: If the records of a resumed run cannot be trimmed and `on_failure` is `stop`.
    """

    def __init__(
        self,
        settings: LogConfig,
        run: Path,
        *,
        num_steps_done: int,
        last_step: int,
        steps_per_epoch: int,
        global_batch_size: int,
        config: dict[str, Any],
        wandb_id: str | None = None,
        flops_per_image: float = 0.0,
        peak_tflops: float = 0.0,
        on_failure: str = "stop",
    ):
        self.settings, self.run, self.last_step = settings, run, last_step
        self.steps_per_epoch, self.global_batch_size = steps_per_epoch, global_batch_size
        self.on_failure, self.must_stop = on_failure, False
        self._flops, self._peak_tflops = flops_per_image, settings.peak_tflops or peak_tflops
        self._interval = Interval(num_steps_done)
        self._metrics: dict[str, float] = {}  # monitor results since the last record
        self._curves: dict[str, list[float]] | None = None  # logged with the next record
        self._had_skipped_steps = False  # True if the last record had skipped steps
        self._disk_problem: str | None = None  # message about the file that was not written
        self.past_records = self._trim_records(num_steps_done)
        self.console = Console(last_step, self.past_records)
        self._warnings = WarningCollector(self.console.warn if process_group.is_main() else None)
        self._warnings.install()
        self._writer = BackgroundWriter(self.console.print_line)
        self._trackers: list[Tracker] = []
        if process_group.is_main():
            self._trackers = trackers.start(
                settings,
                run,
                config,
                wandb_id=wandb_id,
                past_records=self.past_records,
                num_steps_done=num_steps_done,
                writer=self._writer,
                print_line=self.console.print_line,
            )
        self.wandb_id = trackers.find_wandb_id(self._trackers) or wandb_id

    def measure_data_wait(self, batches: Iterator[T]) -> Iterator[T]:
        """Yield the batches and record the time spent waiting for them as `data_wait`."""
        return self._interval.measure_data_wait(batches)

    def log_step(
        self,
        step: int,
        logs: dict[str, Tensor],
        learning_rates: dict[str, float],
        measurements: Measurements | None = None,
    ) -> None:
        """Log a step and write a record if one is due.

        Args:
            step: Optimizer steps done, including this one.
            logs: Scalars on the device. Their means over the interval are written.
            learning_rates: Values of the schedules at this step.
            measurements: Results of the monitors.
        """
        if measurements is not None:
            self._metrics |= measurements.metrics
            if process_group.is_main():
                self._save_measurements(step, measurements)
        self._interval.add(logs)
        if step % self.settings.every_steps and step != self.last_step:
            return
        summary = self._interval.summarize_and_restart(
            step, [bool(self._warnings.pending), bool(self._writer.problems)]
        )
        has_warnings, has_disk_problem = summary.flags  # the same on every rank
        if has_warnings:
            self._warnings.show_from_ranks(
                collectives.gather_objects(self._warnings.take_pending())
            )
        if has_disk_problem:
            self._handle_disk_problem()
        if process_group.is_main():
            self._write_record(self._build_record(step, summary, learning_rates))
        self._metrics = {}

    def save_views(
        self,
        step: int,
        batch: Batch,
        views: ViewsConfig,
        describe_views: Callable[[], list[list[str]]] = list,
    ) -> None:
        """Save views.png and views.json at the first step of the run.

        Args:
            step: Optimizer steps done, including this one.
            batch: The views as the network sees them, and their masks.
            views: Recipe of the views.
            describe_views: Function that returns a text per picture in the row of each image.
        """
        if step > 1 or not process_group.is_main():
            return
        descriptions, path = describe_views(), self.run / "views.json"
        text = json.dumps(descriptions, indent=1) + "\n"
        self._writer.try_write(path, partial(durable_files.replace, path, text))
        bands = shown_bands.describe(self.settings.bands, views.num_channels)
        caption = "\n".join(
            f"image {row + 1}, column {column + 1}: {description}"
            for row, texts in enumerate(descriptions)
            for column, description in enumerate(texts)
        )
        caption = "\n".join(filter(None, [bands, caption]))
        grid = image_grids.view_grid(batch, views, self.settings.bands)
        self._save_picture(grid, self.run / "views.png", metric_names.VIEWS_PICTURE, caption, step)

    def raise_alert(self, title: str, text: str, tag: str = "") -> None:
        """Raise an alert on rank 0, in the terminal, in alerts.jsonl and in the trackers.

        Args:
            title: Kind of the alert, in a few words.
            text: What happened, in a sentence.
            tag: Name that the trackers give to this kind of alert. Made of the title by default.
        """
        if not process_group.is_main():
            return
        self.console.warn(f"{title}: {text}")
        line = records.encode({"title": title, "text": text, "time": time.time()})
        self._writer.append(self.run / "alerts.jsonl", line)
        for tracker in self._trackers:
            tracker.raise_alert(title, text, tag or title.replace(" ", "-"))

    def close(self, succeeded: bool = True) -> None:
        """Write the last records, and close the console and the trackers.

        Args:
            succeeded: False if the run failed, which W&B then shows.
        """
        self.console.close()
        self._writer.close()
        self._warnings.uninstall()
        for tracker in self._trackers:
            tracker.close(succeeded)
        self._trackers = []

    def __enter__(self) -> Logger:
        return self

    def __exit__(self, error_type: object, *_exception: object) -> None:
        """Close the logger.

        Raises:
            SaveError: If a file could not be written and `on_failure` is `stop`.
        """
        self.close(error_type is None)
        if error_type is None:
            background_writer.raise_or_warn(
                self._disk_problem or self._writer.take_problems(), self.on_failure
            )

    def _trim_records(self, num_steps_done: int) -> list[dict[str, Any]]:
        """Remove the records after the resumed step. Return the others on rank 0."""
        problem, past_records = None, []
        if process_group.is_main():
            path = self.run / "metrics.jsonl"
            try:
                records.trim(self.run / "plots.jsonl", num_steps_done)
                past_records = records.trim(path, num_steps_done)
            except OSError as error:
                problem = background_writer.write_failure_message(
                    Path(error.filename or path), error
                )
        background_writer.raise_or_warn(problem, self.on_failure)
        return past_records

    def _build_record(
        self, step: int, summary: IntervalSummary, learning_rates: dict[str, float]
    ) -> dict[str, Any]:
        images_per_second = summary.num_steps * self.global_batch_size / summary.seconds
        return {
            "step": step,
            "epoch": step / self.steps_per_epoch,
            **summary.logs,
            **learning_rates,
            "images_per_second": images_per_second,
            "seconds_per_step": summary.seconds / summary.num_steps,
            "data_wait": summary.data_wait_fraction,
            "memory_gib": summary.peak_memory_gib,
            **self._flops_metrics(images_per_second),
            **self._metrics,
            "time": time.time(),
        }

    def _flops_metrics(self, images_per_second: float) -> dict[str, float]:
        if not self._flops:
            return {}
        tflops = self._flops * images_per_second / process_group.world_size() / 1e12
        utilization = {"flops_utilization": tflops / self._peak_tflops} if self._peak_tflops else {}
        return {"model_tflops": tflops} | utilization

    def _write_record(self, record: dict[str, Any]) -> None:
        self._writer.append(self.run / "metrics.jsonl", records.encode(record))
        for tracker in self._trackers:
            tracker.log_record(record, self._curves)
        self._curves = None
        self.console.show_progress(record)
        num_skipped = record.get("skipped_steps", 0)
        if num_skipped and not self._had_skipped_steps:
            text = f"step {record['step']}: {num_skipped:.0f} steps had a non-finite gradient"
            self.raise_alert("diverging", text, "diverged")
        self._had_skipped_steps = num_skipped > 0

    def _save_measurements(self, step: int, measurements: Measurements) -> None:
        if measurements.curves:
            curves = {"step": step, "epoch": step / self.steps_per_epoch, **measurements.curves}
            self._writer.append(self.run / "plots.jsonl", records.encode(curves))
            self._curves = measurements.curves
        if measurements.neighbor_grid is not None:
            self._save_picture(
                measurements.neighbor_grid,
                self.run / "neighbors" / f"step_{step:08d}.png",
                metric_names.NEIGHBORS_PICTURE,
                NEIGHBORS_CAPTION,
                step,
            )

    def _save_picture(self, picture: Tensor, path: Path, key: str, caption: str, step: int) -> None:
        if self._writer.try_write(path, partial(image_grids.save_png, picture, path)):
            for tracker in self._trackers:
                tracker.log_picture(key, str(path), caption, step)

    def _handle_disk_problem(self) -> None:
        """Request a stop or warn about the files, on every rank at the same step."""
        problem = self._writer.take_problems()
        if self.on_failure == "stop":
            self.must_stop, self._disk_problem = True, problem
        elif problem:
            self.console.warn(background_writer.continuation_warning(problem))
