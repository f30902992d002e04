"""The cost of monitoring a run: monitored steps against bare steps.

PYTHONPATH=. .venv/bin/python tests/bench/health.py [--images 256] [--backbone resnet18]
    [--size 32] [--rounds 8] [--threads 1]

A monitored step includes the collapse monitor, the logger, the console and an offline W&B client.
Monitored and bare steps alternate. The two kinds have separate weights, and each comes first in
half of the pairs. A monitored step is plain, writes a record, or measures the embeddings. Its
excess is its time divided by that of the bare step of its pair, minus 1. The cost at the default
intervals, computed from the median excesses, is

    1 + plain + (record - plain) / 10 + (measured - plain) / 50.

Records and measurements are more frequent than by default, so that there are enough of each kind.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from measure import HALFWAY, build_stepper_halfway, versions

from ssl_pretrain.methods import simclr
from ssl_pretrain.models import backbones
from ssl_pretrain.models.timm_networks import BackboneConfig
from ssl_pretrain.monitoring.collapse import CollapseMonitor, HealthConfig
from ssl_pretrain.monitoring.log_config import LogConfig
from ssl_pretrain.monitoring.logger import Logger
from ssl_pretrain.optim.optimizers import OptimConfig
from ssl_pretrain.parallel import wrap as parallel
from ssl_pretrain.parallel.execution import Execution, ParallelConfig
from ssl_pretrain.planning import hardware
from ssl_pretrain.step import Stepper
from ssl_pretrain.views.batch import Batch

RECORD_STEPS, MEASURE_STEPS = 4, 6  # intervals; a step with both does not count


def build_benchmark_stepper(
    options: argparse.Namespace, batch: Batch, device: torch.device
) -> Stepper:
    torch.manual_seed(0)
    backbone = backbones.build(BackboneConfig(name=options.backbone), options.size)
    method = simclr.Config(projector_dims=[2048, 2048, 128]).build(backbone)
    return build_stepper_halfway(
        method,
        ParallelConfig(),
        OptimConfig(name="lars"),
        device,
        batch,
        micro_batch_size=options.images,
        global_batch_size=options.images,
    )


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=8, help="12 pairs of steps each")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def random_batch(options: argparse.Namespace, device: torch.device) -> Batch:
    generator = torch.Generator().manual_seed(1)
    shape = (options.images, 3, options.size, options.size)
    views = [torch.randn(shape, generator=generator).to(device) for _ in range(2)]
    labels = torch.zeros(options.images, dtype=torch.int64, device=device)
    return Batch(Execution.resolve(ParallelConfig(), device).place_views(views), labels, labels)


def measure_seconds(step: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def step_kind(step: int) -> str | None:
    """Return what a monitored step does, or None if it does not count."""
    writes_record, measures = step % RECORD_STEPS == 0, step % MEASURE_STEPS == 0
    if step <= 12 or (writes_record and measures):
        return None
    return "measured" if measures else "record" if writes_record else "plain"


def time_pairs(options: argparse.Namespace, folder: Path) -> dict[str, list[tuple[float, float]]]:
    """Return the seconds of the monitored and the bare step of each pair, by kind."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = random_batch(options, device)
    monitored_stepper, bare_stepper = (
        build_benchmark_stepper(options, batch, device) for _ in range(2)
    )
    pairs: dict[str, list[tuple[float, float]]] = {"plain": [], "record": [], "measured": []}
    with Logger(
        LogConfig(every_steps=RECORD_STEPS, wandb="offline"),
        folder,
        num_steps_done=0,
        last_step=10**6,
        steps_per_epoch=1000,
        global_batch_size=options.images,
        config={},
        flops_per_image=1e9,
        peak_tflops=hardware.peak_tflops(device),
    ) as logger:
        method = parallel.unwrap(monitored_stepper.model)
        health = HealthConfig(every_steps=MEASURE_STEPS)
        monitor = CollapseMonitor(
            health, method, monitored_stepper.optimizer, raise_alert=logger.raise_alert
        )

        def take_monitored_step(step: int) -> None:
            embeddings, targets, logs = monitored_stepper(HALFWAY, batch)
            rates = {"lr": 0.1, "weight_decay": 0.0}
            logger.log_step(step, logs, rates, monitor.measure(step, embeddings, targets))

        for step in range(1, 12 * (options.rounds + 1) + 1):
            steps = [
                lambda step=step: take_monitored_step(step),
                lambda: bare_stepper(HALFWAY, batch),
            ]
            order = 1 if (step + step // 12) % 2 else -1  # balanced over the kinds
            seconds = [measure_seconds(run, device) for run in steps[::order]][::order]
            if (kind := step_kind(step)) is not None:
                pairs[kind].append((seconds[0], seconds[1]))
    return pairs


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        pairs = time_pairs(options, Path(folder))
    seconds = {"bare": [bare for times in pairs.values() for _, bare in times]}
    seconds |= {kind: [monitored for monitored, _ in times] for kind, times in pairs.items()}
    plain, record, measured = (
        statistics.median(monitored / bare - 1 for monitored, bare in times)
        for times in pairs.values()
    )
    cost = 1 + plain + (record - plain) / 10 + (measured - plain) / 50
    print(versions("timm", "wandb"))
    print(
        f"SimCLR, {options.backbone} at {options.size} pixels, {options.images} images, "
        "embeddings of 128 dimensions, W&B offline"
    )
    for name, times in seconds.items():
        low, median, high = (1e3 * value for value in statistics.quantiles(times, n=4))
        quartiles = f"quartiles {low:.2f} to {high:.2f}"
        print(f"{name:9s} {median:9.2f} ms   {quartiles}, {len(times)} steps")
    print(
        f"excess over the bare step: plain {plain:.2%}, record {record:.2%}, "
        f"measured {measured:.2%}"
    )
    print(f"a measurement costs {(measured - plain) / 50:.2%} of the time of 50 bare steps")
    print(f"ratios: monitored_over_bare={cost:.4f}")


if __name__ == "__main__":
    main()
