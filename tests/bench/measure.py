"""Helpers for the benchmarks: a stepper, interleaved timing, peak memory and package versions."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

from ssl_pretrain.methods.base import Method
from ssl_pretrain.optim import optimizers
from ssl_pretrain.optim.optimizers import OptimConfig
from ssl_pretrain.optim.schedules import Progress
from ssl_pretrain.parallel import memory
from ssl_pretrain.parallel.execution import Execution, ParallelConfig
from ssl_pretrain.step import Stepper, build_stepper
from ssl_pretrain.views.batch import Batch

Run = Callable[[], object]
HALFWAY = Progress(50, 100, 1)
# Folder of imagenet_sample.zip and the other data sets.
DATA_FOLDER = Path(
    os.environ.get("SSL_PRETRAIN_DATA", Path(__file__).parents[3] / "shared" / "data")
)


def time_interleaved(
    candidates: dict[str, Run], repeats: int, device: torch.device
) -> dict[str, float]:
    """Return the median seconds of each candidate.

    Every round runs all candidates in turn, so that a slow minute of the machine affects all alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, run in candidates.items():
            _synchronize(device)
            start = time.perf_counter()
            run()
            _synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure_peaks(candidates: dict[str, Run], device: torch.device) -> dict[str, int]:
    """Return the peak memory of each candidate in bytes, beyond what was already allocated.

    Each candidate must have run before, so that one-time allocations do not count.
    """
    return {name: memory.measure_peak_bytes(run, device) for name, run in candidates.items()}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def build_stepper_halfway(
    method: Method,
    settings: ParallelConfig,
    config: OptimConfig,
    device: torch.device,
    example: Batch,
    *,
    micro_batch_size: int,
    global_batch_size: int,
) -> Stepper:
    """Build a stepper with the learning rates of the middle of a run, at `HALFWAY`."""
    stepper = build_stepper(
        method,
        settings,
        config,
        Execution.resolve(settings, device),
        micro_batch_size=micro_batch_size,
        global_batch_size=global_batch_size,
        example=example,
    )
    optimizers.set_rates(stepper.optimizer, config, HALFWAY, 100, global_batch_size)
    return stepper


def versions(*packages: str) -> str:
    """Return one line with the processor, the number of threads, and the versions of packages."""
    if torch.cuda.is_available():
        processor = torch.cuda.get_device_name()
    else:
        processor = f"{_cpu_model()}, {torch.get_num_threads()} threads"
    package_versions = ", ".join(
        f"{package} {version(package)}" for package in ("torch", *packages)
    )
    return f"{processor}; Python {platform.python_version()}, {package_versions}"


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor())


def format_mib(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"
