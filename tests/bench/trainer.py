"""Compare the trainer's whole step with a bare forward, loss, backward and optimizer step.

PYTHONPATH=. .venv/bin/python tests/bench/trainer.py [--backbone resnet18] [--images 64]

The trainer is `train.train` itself, with schedules, masks, collapse metrics, NaN guard, logs and
stop requests. Its loader yields one batch from memory. Before each batch a bare step is taken and
timed on a copy of the network, so the two kinds of step alternate.
"""

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


class AlternatingLoader:
    """Loader that takes a bare step whenever it is about to yield its only batch."""

    reader = SimpleNamespace(kind=ReaderKind.PROCESSES, num_workers=1)
    num_images_read, reading_seconds = 0, 0.0
    steps_per_epoch = 10

    def __init__(self, batch: Batch, bare_step: Any, steps: int):
        self.batch, self.bare_step, self.steps = batch, bare_step, steps
        self.source = UnlabeledSource()
        # Wall-clock seconds and CPU seconds of each step.
        self.trainer_times: list[tuple[float, float]] = []
        self.bare_times: list[tuple[float, float]] = []

    def describe_views(self, step: int, num_images: int) -> list[list[str]]:
        return [["synthetic"] * len(self.batch.views)] * num_images

    def count_replaced(self, step: int, every_steps: int, last_step: int) -> dict[str, int]:
        return {}

    def iterate_from(self, step: int) -> Iterator[Batch]:
        for number in range(self.steps):
            start = _read_clocks()
            self.bare_step()
            bare_end = _read_clocks()
            yield self.batch
            end = _read_clocks()
            if number:  # the first step also allocates buffers, so it does not count
                self.bare_times.append((bare_end[0] - start[0], bare_end[1] - start[1]))
                self.trainer_times.append((end[0] - bare_end[0], end[1] - bare_end[1]))


def _read_clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


class UnlabeledSource:
    fingerprint, labels = "one batch", np.full(64, -1)

    def __len__(self) -> int:
        return 64


def build_bare_step(settings: config.RunConfig, batch: Batch) -> Any:
    """Build a step as a short script would write it, without masks, gradient norms or metrics."""
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
            f"backbone.name={options.backbone}",
            "backbone.stem=small",
            f"global_batch_size={options.images}",
            f"views.crops.global.size={options.size}",
            "parallel.precision=float32",
            "epochs=1000",
            "checkpoint.every_epochs=0",
            "online.knn_every_epochs=0",
            "log.wandb=off",
            f"output={folder}",
        ]
        settings = config.load("configs/simclr_digits.yaml", overrides)
        generator = torch.Generator().manual_seed(0)
        views = [
            torch.randn(options.images, 3, options.size, options.size, generator=generator)
            for _ in range(2)
        ]
        indices = torch.arange(options.images)
        batch = Batch(
            Execution.resolve(settings.parallel, CPU).place_views(views),
            torch.full_like(indices, -1),
            indices,
        )
        loader: Any = AlternatingLoader(batch, build_bare_step(settings, batch), options.steps)
        build.build_loader = lambda *_, **__: nullcontext(loader)
        train.train(settings, CPU, options.steps - 1)
    print(versions("timm"))
    print(
        f"{options.backbone}, {options.images} images of {options.size} pixels in 2 views; median "
        f"of {len(loader.bare_times)} interleaved steps"
    )
    for clock, name in enumerate(("wall clock", "CPU time")):
        trainer, bare = (
            statistics.median(times[clock] for times in steps)
            for steps in (loader.trainer_times, loader.bare_times)
        )
        print(f"seconds of {name}: trainer {trainer:.4f}, bare {bare:.4f}")
    wall_clock, cpu_time = (_compute_ratio(loader, clock) for clock in (0, 1))
    print(f"ratios: trainer_over_bare={wall_clock:.3f} processor_time_over_bare={cpu_time:.3f}")


def _compute_ratio(loader: AlternatingLoader, clock: int) -> float:
    """Return the median ratio of a trainer step to the mean of its two neighboring bare steps.

    Comparing neighbors cancels the varying load of other programs.
    """
    trainer = [times[clock] for times in loader.trainer_times]
    bare = [times[clock] for times in loader.bare_times]
    return statistics.median(
        step / ((before + after) / 2) for step, before, after in zip(trainer, bare, bare[1:])
    )


if __name__ == "__main__":
    main()
