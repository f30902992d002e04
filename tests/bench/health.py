"""What it costs to watch a run: the step with the monitor, the logger, the console and an offline W&B client, against the bare step.

PYTHONPATH=. .venv/bin/python tests/bench/health.py [--images 256] [--backbone resnet18] [--size 32] [--rounds 8] [--threads 1]

One watched and one blind step in turn, each with weights of its own, the first of a pair the other one each time. A watched step is
ordinary, or writes a record, or measures; its excess is its time over its pair's blind one, minus 1. The cost at the default intervals is
1 + ordinary + (record - ordinary) / 10 + (measured - ordinary) / 50, of medians of the excess. Here the last two come more often than by
default, so that there are enough of them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from measure import versions

from ssl_pretrain.methods import simclr
from ssl_pretrain.models.backbones import BackboneConfig, build
from ssl_pretrain.monitoring import collapse
from ssl_pretrain.monitoring import logger as log
from ssl_pretrain.optim import optimizers as optim
from ssl_pretrain.optim.optimizers import OptimConfig
from ssl_pretrain.parallel import wrap as parallel
from ssl_pretrain.parallel.execution import Execution
from ssl_pretrain.parallel.parallel_config import ParallelConfig
from ssl_pretrain.planning import flops
from ssl_pretrain.step import Stepper, build_stepper
from ssl_pretrain.views.batch import Batch

RECORD, MEASURE = 4, 6  # steps between two, here; where both fall on one step it does not count


def stepper(options: argparse.Namespace, batch: Batch, device: torch.device) -> Stepper:
    torch.manual_seed(0)
    method = simclr.Config(projector_dims=[2048, 2048, 128]).build(
        build(BackboneConfig(name=options.backbone), options.size)
    )
    settings, config = ParallelConfig(), OptimConfig(name="lars")
    step = build_stepper(
        method,
        settings,
        config,
        Execution.resolve(settings, device),
        micro_batch_size=options.images,
        global_batch_size=options.images,
        example=batch,
    )
    optim.set_rates(step.optimizer, config, 0.5, 100, options.images)
    return step


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=8, help="of 12 watched and 12 blind steps")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(1)
    views = [
        torch.randn(options.images, 3, options.size, options.size, generator=generator).to(device)
        for _ in range(2)
    ]
    labels = torch.zeros(options.images, dtype=torch.int64, device=device)
    batch = Batch(Execution.resolve(ParallelConfig(), device).place_views(views), labels, labels)
    watched, blind = stepper(options, batch, device), stepper(options, batch, device)
    method = parallel.unwrap(watched.model)
    seconds: dict[str, list[float]] = {"blind": [], "ordinary": [], "record": [], "measured": []}
    excess: dict[str, list[float]] = {"ordinary": [], "record": [], "measured": []}
    with tempfile.TemporaryDirectory() as folder, log.Logger(
        log.LogConfig(every_steps=RECORD, wandb="offline"), Path(folder), first_step=0, last_step=10**6, steps_per_epoch=1000,
        global_batch_size=options.images, config={}, facts={}, flops_per_image=1e9, peak_tflops=flops.peak_tflops(device),
    ) as logger:  # fmt: skip
        monitor = collapse.Monitor(
            collapse.HealthConfig(every_steps=MEASURE),
            method,
            watched.optimizer,
            0,
            [],
            logger.alert,
        )

        def timed(run) -> float:
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return time.perf_counter() - start

        def watch(step: int) -> None:
            embeddings, logs = watched(step - 1, 0.5, batch)
            logger.step(step, logs, {"lr": 0.1, "weight_decay": 0.0}, monitor.at(step, embeddings))

        for step in range(1, 12 * (options.rounds + 1) + 1):
            order = 1 if (step + step // 12) % 2 else -1  # of both kinds alike
            pair = [lambda step=step: watch(step), lambda step=step: blind(step - 1, 0.5, batch)][
                ::order
            ]
            found = [timed(run) for run in pair][::order]
            due = step % MEASURE == 0, step % RECORD == 0
            if step > 12 and due != (True, True):
                kind = "measured" if due[0] else "record" if due[1] else "ordinary"
                seconds[kind].append(found[0])
                seconds["blind"].append(found[1])
                excess[kind].append(found[0] / found[1] - 1)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ordinary, record, measured = (
        statistics.median(excess[kind]) for kind in ("ordinary", "record", "measured")
    )
    cost = 1 + ordinary + (record - ordinary) / 10 + (measured - ordinary) / 50
    print(versions("timm", "wandb"))
    print(
        f"SimCLR, {options.backbone} at {options.size} pixels, {options.images} images, embeddings of 128 dimensions, W&B offline"
    )
    for name, values in seconds.items():
        quarters = statistics.quantiles(values, n=4)
        print(
            f"{name:9s} {medians[name] * 1e3:9.2f} ms   quartiles {quarters[0] * 1e3:.2f} to {quarters[2] * 1e3:.2f}, {len(values)} steps"
        )
    print(
        f"excess over the pair's blind step: ordinary {ordinary:.2%}, record {record:.2%}, measured {measured:.2%}"
    )
    print(f"a measurement costs {(measured - ordinary) / 50:.2%} of 50 steps")
    print(f"ratios: watched_over_blind={cost:.4f}")


if __name__ == "__main__":
    main()
