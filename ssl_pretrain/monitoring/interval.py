"""Collect training metrics between two records and reduce them over all ranks."""

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ssl_pretrain.distributed import collectives

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

T = TypeVar("T")


@dataclass(frozen=True)
class IntervalSummary:
    """Metrics of one interval, reduced over all ranks. Only `seconds` differs between ranks."""

    logs: dict[str, float]  # means over steps and ranks; `skipped_steps` is a sum over steps
    num_steps: int
    seconds: float
    data_wait_fraction: float  # fraction of the time spent waiting for data, on the slowest rank
    peak_memory_gib: float  # largest peak of any rank
    flags: list[bool]  # in the order given, each True if any rank has set it


class Interval:
    """Sums of the metrics of consecutive steps, kept on the device until the interval ends."""

    def __init__(self, num_steps_done: int):
        self._restart(num_steps_done)

    def measure_data_wait(self, batches: Iterator[T]) -> Iterator[T]:
        """Yield the batches and add up the time spent waiting for them."""
        start = time.monotonic()
        for batch in batches:
            self._seconds_waited += time.monotonic() - start
            yield batch
            start = time.monotonic()

    def add(self, logs: dict[str, Tensor]) -> None:
        """Add the scalars of one step. The host does not wait for the device."""
        for name, value in logs.items():
            value = value.detach()
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def summarize_and_restart(self, step: int, flags: Sequence[bool]) -> IntervalSummary:
        """End the interval after `step` and start the next one.

        This is the only place where the host waits for the device.

        Args:
            step: Optimizer steps done.
            flags: Conditions on this rank that all ranks must know. The order is the same on all
                ranks.
        """
        num_steps = max(1, step - self._start_step)
        seconds = max(time.monotonic() - self._start_time, 1e-9)
        status = torch.tensor([self._seconds_waited / seconds, peak_memory_gib(), *flags])
        sums = torch.stack(
            [
                value.double() if value.device.type == "cpu" else value.float()
                for value in self._sums.values()
            ]
        )
        by_rank = collectives.gather(torch.cat([sums, status.to(sums)])[None]).cpu()
        means = (by_rank[:, : len(sums)].sum(0) / len(by_rank)).tolist()
        data_wait, memory, *any_flag = by_rank[:, len(sums) :].amax(0).tolist()
        logs = {
            name: total if name == "skipped_steps" else total / num_steps
            for name, total in zip(self._sums, means)
        }
        self._restart(step)
        return IntervalSummary(
            logs, num_steps, seconds, data_wait, memory, [flag > 0 for flag in any_flag]
        )

    def _restart(self, step: int) -> None:
        self._sums: dict[str, Tensor] = {}
        self._start_time, self._start_step, self._seconds_waited = time.monotonic(), step, 0.0


def peak_memory_gib() -> float:
    """Return this rank's peak memory so far, on its GPU or, without a GPU, on the host.

    The result is 0 on a platform that does not report the peak.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    if resource is None:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
