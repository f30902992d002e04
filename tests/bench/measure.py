"""What the benchmarks share: candidates run in turn, medians, peak memory, and the versions they ran with."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

from ssl_pretrain.parallel import memory

Run = Callable[[], object]


def interleaved(candidates: dict[str, Run], repeats: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each, one after the other in every round, so that a slow minute of the machine hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, run in candidates.items():
            _synchronize(device)
            start = time.perf_counter()
            run()
            _synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peaks(candidates: dict[str, Run], device: torch.device) -> dict[str, int]:
    """Most bytes each held at once above what was held before; each has run before, so that nothing is made once."""
    return {name: memory.peak(run, device) for name, run in candidates.items()}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def versions(*packages: str) -> str:
    """One line: the machine's processor, threads, and the packages."""
    found = [f"{package} {version(package)}" for package in ("torch", *packages)]
    processor = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{_cpu()}, {torch.get_num_threads()} threads"
    )
    return f"{processor}; Python {platform.python_version()}, {', '.join(found)}"


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )


def mib(bytes_: float) -> str:
    return f"{bytes_ / 2**20:,.1f} MiB"
