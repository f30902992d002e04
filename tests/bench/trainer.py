"""Compare the trainer's whole step with a bare forward, loss, backward and optimizer step.

PYTHONPATH=. .venv/bin/python tests/bench/trainer.py [--backbone resnet18] [--images 64]

The trainer is `train.train` itself, with schedules, masks, collapse metrics, NaN guard, logs and stop
requests. Its loader yields one batch from memory. Before each batch a bare step is taken and timed on
a copy of the network, so the two alternate.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from measure import versions

from ssl_pretrain import build, config, train
from ssl_pretrain.data.readers import ReaderKind
from ssl_pretrain.optim import optimizers as optim
from ssl_pretrain.optim.schedules import Progress
from ssl_pretrain.parallel.execution import Execution
from ssl_pretrain.views.batch import Batch

HALFWAY = Progress(50, 100, 1)

CPU = torch.device("cpu")


class Alternating:
    """A loader of one batch, in whose waits the bare steps are taken."""

    reader = SimpleNamespace(kind=ReaderKind.PROCESSES, num_workers=1)
    num_read, reading_seconds = 0, 0.0
    steps_per_epoch = 10

    def __init__(self, batch: Batch, bare: Any, steps: int):
        self.batch, self.bare, self.steps = batch, bare, steps
        self.source = NoLabels()
        self.of_trainer: list[
            tuple[float, float]
        ] = []  # seconds by the clock, and of this process's processors
        self.of_bare: list[tuple[float, float]] = []

    def describe_views(self, step: int, num_images: int) -> list[list[str]]:
        return [["made up"] * len(self.batch.views)] * num_images

    def count_replaced(self, step: int, every_steps: int, last_step: int) -> dict[str, int]:
        return {}

    def starting_at(self, step: int) -> Iterator[Batch]:
        for number in range(self.steps):
            start = _now()
            self.bare()
            between = _now()
            yield self.batch
            end = _now()
            if number:  # the first pays for what is made once
                self.of_bare.append((between[0] - start[0], between[1] - start[1]))
                self.of_trainer.append((end[0] - between[0], end[1] - between[1]))


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


class NoLabels:
    fingerprint, labels = "one batch", np.full(64, -1)

    def __len__(self) -> int:
        return 64


def bare_step(settings: config.RunConfig, batch: Batch) -> Any:
    """A step as a script would write it: no masks, no norms, no measures."""
    method = Execution.resolve(settings.parallel, CPU).place_module(build.build_method(settings))
    optimizer = optim.build(settings.optim, method)
    optimizer.found_inf = optimizer.grad_scale = None  # type: ignore[attr-defined]
    optim.set_rates(optimizer, settings.optim, HALFWAY, settings.epochs, settings.global_batch_size)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        embeddings = method(batch)
        loss, _ = method.loss(embeddings, method.targets(batch))
        loss.backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            f"backbone.name={options.backbone}", f"global_batch_size={options.images}", f"output={folder}", "log.wandb=off",
            f"views.crops.global.size={options.size}", "backbone.stem=small", "online.knn_every_epochs=0", "checkpoint.every_epochs=0",
            "epochs=1000", "parallel.precision=float32",
        ]  # fmt: skip
        settings = config.load("configs/simclr_digits.yaml", overrides)
        generator = torch.Generator().manual_seed(0)
        views = [
            torch.randn(options.images, 3, options.size, options.size, generator=generator)
            for _ in range(2)
        ]
        numbers = torch.arange(options.images)
        batch = Batch(
            Execution.resolve(settings.parallel, CPU).place_views(views),
            torch.full_like(numbers, -1),
            numbers,
        )
        batches: Any = Alternating(batch, bare_step(settings, batch), options.steps)
        build.build_loader = lambda *_, **__: nullcontext(batches)
        train.train(settings, CPU, options.steps - 1)
    print(versions("timm"))
    print(
        f"{options.backbone}, {options.images} images of {options.size} pixels in 2 views; median of {len(batches.of_bare)} steps in turn"
    )
    for which, name in enumerate(("by the clock", "of processors")):
        trainer, bare = (
            statistics.median(pair[which] for pair in pairs)
            for pairs in (batches.of_trainer, batches.of_bare)
        )
        print(f"seconds {name}: trainer {trainer:.4f}, bare {bare:.4f}")
    print(
        f"ratios: trainer_over_bare={_ratio(batches, 0):.3f} processor_time_over_bare={_ratio(batches, 1):.3f}"
    )


def _ratio(batches: Alternating, which: int) -> float:
    """The median over steps of the trainer's step over the mean of the bare steps before and after it: other programs come and go."""
    steps, bare = (
        [pair[which] for pair in pairs] for pairs in (batches.of_trainer, batches.of_bare)
    )
    return statistics.median(
        step / ((before + after) / 2) for step, before, after in zip(steps, bare, bare[1:])
    )


if __name__ == "__main__":
    main()
