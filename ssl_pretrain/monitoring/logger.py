"""What a run says while it goes on: metrics.jsonl, the console, pictures, and the same in Weights & Biases."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.monitoring import background_writer, image_grids
from ssl_pretrain.monitoring.console import Console, Warnings
from ssl_pretrain.monitoring.wandb import run as wandb_run
from ssl_pretrain.schema import setting
from ssl_pretrain.system import durable_files

T = TypeVar("T")
KEEP_PLOTS = 500  # steps between two sets of plots sent to W&B, at least; plots.jsonl has all


@dataclass
class LogConfig:
    """Metrics and Weights & Biases."""

    every_steps: int = setting(10, "Steps between two records of metrics.", minimum=1)
    wandb: Literal["auto", "online", "offline", "off"] = setting(
        "auto",
        "Weights & Biases. auto: online if there is an API key, else off. "
        "WANDB_MODE and WANDB_DISABLED are respected.",
    )
    project: str = setting("ssl_pretrain", "W&B project.")
    name: str = setting("", "Name of the W&B run. Empty: the name of the output folder.")
    tags: list[str] = setting([], "Tags of the W&B run.")
    stall_seconds: float = setting(900.0, "Seconds without a record before W&B sends an alert.")
    peak_tflops: float = setting(
        0.0,
        "Peak bfloat16 TFLOP/s of one GPU, for the model FLOPs utilization. "
        "0: taken from the GPU's name if it is known.",
    )


class Logger:
    """Reads the device every `every_steps` and writes one record; rank 0 alone writes.

    Args:
        run: the run's folder.
        first_step, last_step: the steps this run has done already, and will have done at its end.
        facts: manifest entries; `wandb_id` is filled here, so that a resumed run goes on in the same W&B run.
        flops_per_image: floating-point operations of a training step for each image; 0: unknown.
        peak_tflops: of a rank's device; 0: unknown.
        on_failure: where the disk refuses a record: `stop` asks for an end (`must_stop`), `warn` says so and keeps the record.

    Raises:
        SaveError: the records of a run that goes on could not be trimmed, and `on_failure` is `stop`.
    """

    def __init__(
        self,
        settings: LogConfig,
        run: Path,
        *,
        first_step: int,
        last_step: int,
        steps_per_epoch: int,
        global_batch_size: int,
        config: dict[str, Any],
        facts: dict[str, Any],
        flops_per_image: float = 0.0,
        peak_tflops: float = 0.0,
        on_failure: str = "stop",
    ):
        self.settings, self.run, self.last_step = settings, run, last_step
        self.steps_per_epoch, self.global_batch_size = steps_per_epoch, global_batch_size
        self._flops, self._peak = flops_per_image, settings.peak_tflops or peak_tflops
        self._measured: dict[str, Any] = {}
        self._sums: dict[str, Tensor] = {}
        self._since, self._since_step, self._waited = time.monotonic(), first_step, 0.0
        self._plotted, self._skipping = -KEEP_PLOTS, False
        self._plots: dict[str, list[float]] | None = None  # for the next record sent to W&B
        self._wandb: wandb_run.WandbRun | None = None
        self.on_failure, self.must_stop = on_failure, False
        self._problem: str | None = None
        self.past: list[dict[str, Any]] = []
        problem = None
        if process_group.is_main():
            try:
                _keep_records(run / "plots.jsonl", first_step)
                self.past = _keep_records(run / "metrics.jsonl", first_step)
            except OSError as error:
                problem = background_writer.refused(
                    Path(error.filename or run / "metrics.jsonl"), error
                )
        background_writer.settle(problem, on_failure)
        self.console = Console(last_step, self.past)
        self._warnings = Warnings(self.console.warn if process_group.is_main() else None)
        self._warnings.install()
        self._files = background_writer.Writer(self.console.say)
        if process_group.is_main():
            self._wandb = _start_wandb(settings, run, config, facts, self.console.say)

    def waits(self, batches: Iterator[T]) -> Iterator[T]:
        """The same batches; the time spent waiting for them becomes `data_wait`."""
        while True:
            start = time.monotonic()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._waited += time.monotonic() - start
            yield batch

    def step(
        self,
        step: int,
        logs: dict[str, Tensor],
        rates: dict[str, float],
        measured: dict[str, Any] | None = None,
    ) -> None:
        """Takes the logs of the step that ended, `step` steps being done; writes at the interval and at the end.

        Args:
            logs: scalars on the device; their means over the interval are written.
            measured: what is measured now and then (health, k-NN): numbers join the next record; `plots` are curves,
                `neighbours` a picture.
        """
        measured = dict(measured or {})
        self._keep(step, measured.pop("plots", None), measured.pop("neighbours", None))
        self._measured |= measured
        for name, value in logs.items():
            self._sums[name] = (
                self._sums[name] + value.detach() if name in self._sums else value.detach()
            )
        if step % self.settings.every_steps and step != self.last_step:
            return
        record = self._record(step, rates)
        self._sums.clear()
        self._since, self._since_step, self._waited = time.monotonic(), step, 0.0
        if process_group.is_main():
            self._write(record)

    def _record(self, step: int, rates: dict[str, float]) -> dict[str, Any]:
        steps = max(1, step - self._since_step)
        seconds = max(time.monotonic() - self._since, 1e-9)
        own = torch.tensor(
            [
                self._waited / seconds,
                _memory_gib(),
                float(len(self._warnings.waiting)),
                float(self._files.has_news()),
            ]
        )
        sums = torch.stack(
            [
                value.double() if value.device.type == "cpu" else value.float()
                for value in self._sums.values()
            ]
        )
        by_rank = collectives.gather(
            torch.cat([sums, own.to(sums)])[None]
        ).cpu()  # the one read of the device
        means, largest = (
            by_rank[:, : len(sums)].sum(0) / len(by_rank),
            by_rank[:, len(sums) :].amax(0).tolist(),
        )
        if largest[2] > 0:  # the same on every rank
            self._warnings.others(collectives.gather_objects(self._warnings.collected()))
        if largest[3] > 0:
            self._answer_files()
        measured = {
            name: total if name == "skipped_steps" else total / steps
            for name, total in zip(self._sums, means.tolist())
        }
        speed = steps * self.global_batch_size / seconds
        record = {
            "step": step,
            "epoch": step / self.steps_per_epoch,
            **measured,
            **rates,
            "images_per_second": speed,
            "seconds_per_step": seconds / steps,
            "data_wait": largest[0],
            "memory_gib": largest[1],
            **self._flops_of(speed),
            **self._measured,
            "time": time.time(),
        }
        self._measured = {}
        return record

    def _flops_of(self, images_per_second: float) -> dict[str, float]:
        if not self._flops:
            return {}
        tflops = self._flops * images_per_second / process_group.world_size() / 1e12
        return {"model_tflops": tflops} | (
            {"flops_utilization": tflops / self._peak} if self._peak else {}
        )

    def _write(self, record: dict[str, Any]) -> None:
        line = json.dumps({key: _json_number(value) for key, value in record.items()})
        self._files.append(self.run / "metrics.jsonl", line)
        self._send("record", record=record, plots=self._plots)
        self._plots = None
        self.console.progress(record)
        skipped = record.get("skipped_steps", 0) > 0
        if skipped and not self._skipping:
            text = f"step {record['step']}: {record['skipped_steps']:.0f} steps had a gradient that is not finite"
            self.alert("diverging", text, "diverged")
        self._skipping = skipped

    def _keep(
        self, step: int, plots: dict[str, list[float]] | None, neighbours: Tensor | None
    ) -> None:
        if not process_group.is_main():
            return
        if plots is not None:
            line = json.dumps({"step": step, "epoch": step / self.steps_per_epoch, **plots})
            self._files.append(self.run / "plots.jsonl", line)
            if step - self._plotted >= KEEP_PLOTS:
                self._plotted, self._plots = step, plots
        if neighbours is not None:
            path = self.run / "neighbours" / f"step_{step:08d}.png"
            caption = "left: the query; then its nearest training images; green: of its class"
            if self._files.attempt(path, partial(image_grids.save, neighbours, path)):
                self._send(
                    "image",
                    key="Pictures/nearest neighbours",
                    path=str(path),
                    caption=caption,
                    step=step,
                )

    def views(
        self,
        step: int,
        views: list[Tensor],
        mean: list[float],
        std: list[float],
        drawn: Callable[[], list[list[str]]] = list,
    ) -> None:
        """At the first step writes `views.png`: one row an image, its views side by side, as the network sees them, for 8
        images; and `views.json`, what was drawn for each of them, (images, views)."""
        if step > 1 or not process_group.is_main():
            return
        path, words_path, parameters = self.run / "views.png", self.run / "views.json", drawn()
        there = self._files.attempt(
            path, partial(image_grids.save, image_grids.views(views, mean, std), path)
        )
        self._files.attempt(
            words_path,
            partial(durable_files.replace, words_path, json.dumps(parameters, indent=1) + "\n"),
        )
        words = [
            f"image {row + 1}, view {view + 1}: {text}"
            for row, texts in enumerate(parameters)
            for view, text in enumerate(texts)
        ]
        if there:
            self._send(
                "image", key="Pictures/views", path=str(path), caption="\n".join(words), step=step
            )

    def alert(self, title: str, text: str, tag: str = "") -> None:
        """On rank 0: says it, keeps it in alarms.jsonl, alerts in W&B and marks the run there."""
        if not process_group.is_main():
            return
        self.console.warn(f"{title}: {text}")
        self._files.append(
            self.run / "alarms.jsonl",
            json.dumps({"title": title, "text": text, "time": time.time()}),
        )
        self._send("alert", title=title, text=text, tag=tag or title.replace(" ", "-"))

    def _send(self, kind: str, **message: Any) -> None:
        if self._wandb is not None:
            self._wandb.send(kind, **message)

    def close(self, ended_well: bool = True) -> None:
        """Puts the last records on the disk and ends the run in W&B, as crashed where it did not end well."""
        self._files.close()
        self._warnings.remove()
        if self._wandb is not None:
            self._wandb.close(ended_well)
            self._wandb = None

    def __enter__(self) -> Logger:
        return self

    def __exit__(self, kind: object, *_exception: object) -> None:
        """As `close`. Raises SaveError where a file could not be written and `on_failure` is `stop`."""
        self.close(kind is None)
        if kind is None:
            background_writer.settle(self._problem or self._files.take_news(), self.on_failure)

    def _answer_files(self) -> None:
        """On every rank at one step: stop soon, or say which files could not be written."""
        problem = self._files.take_news()
        if self.on_failure == "stop":
            self.must_stop, self._problem = True, problem
        elif problem:
            self.console.warn(f"{problem}. The training goes on, as checkpoint.on_failure is warn")


def _keep_records(path: Path, first_step: int) -> list[dict[str, Any]]:
    """Drops the records after `first_step`, as a run that lost steps writes them again; returns those that stay."""
    if not path.exists():
        return []
    content = path.read_text(errors="replace")
    lines = [
        line for line in content.splitlines() if _step_of(line) <= first_step and first_step > 0
    ]
    remaining = "".join(f"{line}\n" for line in lines)
    if (
        remaining != content
    ):  # written anew beside it and fsynced: what stays is on the disk all the time
        durable_files.replace(path, remaining)
    return [json.loads(line) for line in lines]


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # cut short by a kill


def _json_number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _memory_gib() -> float:
    """Most that this rank has held so far: on its GPU, or of the host's memory where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def _start_wandb(
    settings: LogConfig,
    run: Path,
    config: dict[str, Any],
    facts: dict[str, Any],
    say: Callable[[str], None],
) -> wandb_run.WandbRun | None:
    mode, line = wandb_run.mode_of(settings.wandb)
    if line:
        say(line)
    if mode == "off":
        return None
    facts["wandb_id"] = facts.get("wandb_id") or wandb_run.new_id()
    try:
        return wandb_run.WandbRun(
            run, mode=mode, project=settings.project, name=settings.name or run.name, run_id=facts["wandb_id"], config=config,
            tags=list(settings.tags), say=say, stall_seconds=settings.stall_seconds,
        )  # fmt: skip
    except OSError as error:
        say(
            f"W&B: {run / 'wandb'} could not be written: {durable_files.reason(error)}; the run goes on without it"
        )
        return None
