"""What a run says while it goes on: metrics.jsonl, one progress line, and the same numbers in Weights & Biases."""

from __future__ import annotations

import json
import math
import netrc
import os
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torchvision.utils import make_grid, save_image

from ssl_pretrain import distributed

T = TypeVar("T")


@dataclass
class LogConfig:
    """Where numbers go. W&B's `auto` is online where there is a key, else off."""

    every_steps: int = 10
    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    project: str = "ssl_pretrain"
    name: str = ""  # of the W&B run; empty: the output folder's name
    tags: list[str] = field(default_factory=list)


class Logger:
    """Reads the device every `every_steps` and writes one record; rank 0 alone writes.

    Args:
        run: the run's folder.
        first_step, last_step: the steps this run has done already, and will have done at its end.
        facts: manifest entries; `wandb_id` is filled here, so that a resumed run goes on in the same W&B run.
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
    ):
        self.settings, self.run, self.last_step = settings, run, last_step
        self.steps_per_epoch, self.global_batch_size = steps_per_epoch, global_batch_size
        self._measured: dict[str, float] = {}
        self.latest_knn: float | None = None
        self._sums: dict[str, Tensor] = {}
        self._since, self._since_step, self._waited = time.monotonic(), first_step, 0.0
        self._shown = 0.0
        self._wandb: Any = None
        if distributed.is_main():
            _keep_records(run / "metrics.jsonl", first_step)
            self._wandb = _start_wandb(settings, run, config, facts)

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

    def step(self, step: int, logs: dict[str, Tensor], rates: dict[str, float], measured: dict[str, float] | None = None) -> None:
        """Takes the logs of the step that ended, `step` steps being done; writes at the interval and at the end.

        Args:
            logs: scalars on the device; their means over the interval are written.
            measured: what is measured now and then (health, k-NN); joins the next record.
        """
        self._measured |= measured or {}
        for name, value in logs.items():
            self._sums[name] = self._sums[name] + value.detach() if name in self._sums else value.detach()
        if step % self.settings.every_steps and step != self.last_step:
            return
        record = self._record(step, rates)
        self._sums.clear()
        self._since, self._since_step, self._waited = time.monotonic(), step, 0.0
        if distributed.is_main():
            self._write(record)

    def _record(self, step: int, rates: dict[str, float]) -> dict[str, Any]:
        steps = max(1, step - self._since_step)
        totals = torch.stack([value.double() if value.device.type == "cpu" else value.float() for value in self._sums.values()])
        means = (distributed.reduce_sum(totals) / distributed.world_size()).tolist()  # the one read of the device
        measured = {name: total if name == "skipped_steps" else total / steps for name, total in zip(self._sums, means)}
        seconds = time.monotonic() - self._since
        record = {
            "step": step,
            "epoch": step / self.steps_per_epoch,
            **measured,
            **rates,
            "images_per_second": steps * self.global_batch_size / max(seconds, 1e-9),
            "data_wait": self._waited / max(seconds, 1e-9),
            **self._measured,
            "time": time.time(),
        }
        self.latest_knn = self._measured.get("knn", self.latest_knn)
        self._measured = {}
        return record

    def _write(self, record: dict[str, Any]) -> None:
        with (self.run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({key: _json_number(value) for key, value in record.items()}) + "\n")
        if self._wandb is not None:
            self._wandb.log({key: value for key, value in record.items() if key != "time"}, step=record["step"])
        now, last = time.monotonic(), record["step"] == self.last_step
        if now - self._shown >= 1 or last:
            self._shown = now
            _show(_progress_line(record, self.last_step, self.global_batch_size, self.latest_knn), last)

    def views(self, step: int, views: list[Tensor], mean: list[float], std: list[float]) -> None:
        """At the first step writes `views.png`: one row an image, its views side by side, as the network sees them, for 8 images."""
        if step > 1 or not distributed.is_main():
            return
        size = max(view.shape[-1] for view in views)
        undo = [view[:8].float().cpu() * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1) for view in views]
        padded = [torch.nn.functional.pad(view, (0, size - view.shape[-1], 0, size - view.shape[-2]), value=1.0) for view in undo]
        grid = make_grid(torch.stack(padded, dim=1).flatten(0, 1), nrow=len(views), padding=2, pad_value=1.0).clamp(0, 1)
        save_image(grid, self.run / "views.png")
        if self._wandb is not None:
            import wandb

            self._wandb.log({"views": wandb.Image(str(self.run / "views.png"))}, step=self._since_step)

    def close(self) -> None:
        if self._wandb is not None:
            self._wandb.finish()


def _keep_records(path: Path, first_step: int) -> None:
    """Drops the records after `first_step`: a run that lost steps writes them again."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines() if _step_of(line) <= first_step and first_step > 0]
        beside = path.with_suffix(".writing")
        beside.write_text("".join(f"{line}\n" for line in lines))
        os.replace(beside, path)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return math.inf  # cut short by a kill


def _json_number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _progress_line(record: dict[str, Any], last_step: int, global_batch_size: int, knn: float | None) -> str:
    speed = record["images_per_second"]
    remaining = int((last_step - record["step"]) * global_batch_size / max(speed, 1e-9))
    shown = [f"step {record['step']}/{last_step}", f"epoch {record['epoch']:.2f}", f"loss {record['loss']:.4f}", f"lr {record['lr']:.4g}"]
    if knn is not None:
        shown.append(f"k-NN {100 * knn:.1f} %")
    shown += [f"{speed:,.0f} images/s", f"data wait {100 * record['data_wait']:.0f} %"]
    if record.get("skipped_steps"):
        shown.append(f"{record['skipped_steps']:.0f} steps skipped")
    return "  ".join([*shown, f"ETA {remaining // 3600}:{remaining // 60 % 60:02d}:{remaining % 60:02d}"])


def _show(line: str, last: bool) -> None:
    if sys.stdout.isatty():
        print(f"\r\x1b[K{line}", end="\n" if last else "", flush=True)
    else:
        print(line, flush=True)


def _start_wandb(settings: LogConfig, run: Path, config: dict[str, Any], facts: dict[str, Any]) -> Any:
    mode = settings.wandb
    if mode == "auto":
        mode = "online" if _has_key() else "off"
    if mode == "off":
        return None
    try:
        import wandb
    except ImportError:
        raise ValueError("log.wandb: wandb is not installed; pip install wandb, or set log.wandb=off") from None
    name = settings.name or run.name
    started = wandb.init(
        project=settings.project, name=name, id=facts.get("wandb_id"), resume="allow", mode=mode, dir=run, config=config, tags=settings.tags
    )
    facts["wandb_id"] = started.id
    return started


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    with suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    return False
