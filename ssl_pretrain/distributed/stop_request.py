"""A request to stop, on which all ranks agree."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ssl_pretrain.distributed import process_group
from ssl_pretrain.system.stop_signals import STOP_SIGNALS, StopSignalHandlers
from ssl_pretrain.system.watchdog import watchdog

Batch = TypeVar("Batch")
NO_IMAGES_REMEDY = (
    "the disk or a worker that reads images does not answer; check that data.root can be read and "
    "that /dev/shm has room (docker --shm-size or --ipc=host), lower data.num_workers, or raise "
    "parallel.timeout_seconds if reading is only slow"
)
NO_STEP_REMEDY = (
    "another rank or the device does not answer, or this machine is too slow; the stacks above "
    "show where; look at the outputs of the other ranks, or raise parallel.timeout_seconds if a "
    "step takes that long"
)


class StopRequest:
    """Request to stop, on which all ranks agree, and progress reports to the watchdog.

    A signal sets a flag. All ranks exchange their flags once per step, on a CPU group. The exchange
    takes no extra time, because it runs during the next step and its result is used one step later.
    A second signal ends this process at once.

    Args:
        signals: Signals that request a stop.
        fake_preemption_step: Step after which rank 0 sends itself SIGUSR2, as a scheduler would.
    """

    def __init__(
        self, signals: tuple[int, ...] = STOP_SIGNALS, fake_preemption_step: int | None = None
    ) -> None:
        self._fake_preemption_step = fake_preemption_step
        self._pending: tuple[Tensor, Any] | None = None
        self._signals = StopSignalHandlers(signals)

    def watch(self, batches: Iterable[Batch], num_steps_done: int) -> Iterator[Batch]:
        """Yield the batches, while the watchdog limits the wait for each batch and each step.

        Args:
            batches: The batches of the steps that follow.
            num_steps_done: Steps done before the first batch. The first step also compiles.
        """
        iterator, timeout = iter(batches), process_group.timeout_seconds()
        for step in itertools.count(num_steps_done + 1):
            includes_compilation = step == num_steps_done + 1
            watchdog.arm(
                timeout,
                f"waiting for the images of step {step}",
                NO_IMAGES_REMEDY,
                includes_compilation=includes_compilation,
            )
            batch = next(iterator, None)
            if batch is None:
                return
            watchdog.arm(
                timeout,
                f"training step {step}",
                NO_STEP_REMEDY,
                includes_compilation=includes_compilation,
            )
            yield batch

    def exchange_flags(self, step: int = -1) -> bool:
        """Send this rank's flag to the other ranks and report to the watchdog, after each step.

        Returns:
            True if any rank had received a request when the previous step ended. All ranks return
            the same value.
        """
        watchdog.arm(process_group.timeout_seconds(), f"ending step {step}", NO_STEP_REMEDY)
        if step == self._fake_preemption_step and process_group.is_main():
            if self._signals.is_installed and hasattr(signal, "SIGUSR2"):
                os.kill(os.getpid(), signal.SIGUSR2)
            self._signals.is_stop_requested = True
        if process_group.world_size() == 1:
            return self._signals.is_stop_requested
        is_requested = self._wait_for_exchange()
        flag = torch.tensor([int(self._signals.is_stop_requested)])
        group = process_group.cpu_group()
        work = dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group, async_op=True)
        self._pending = flag, work
        return is_requested

    def _wait_for_exchange(self) -> bool:
        """Wait for the pending exchange, and return True if any rank had sent a request."""
        if self._pending is None:
            return False
        flag, work = self._pending
        work.wait()
        self._pending = None
        return bool(flag.item())

    def __enter__(self) -> StopRequest:
        return self

    def __exit__(self, exception_type: object, *_exception: object) -> None:
        if exception_type is None:  # after an error, the other ranks may never answer
            self._wait_for_exchange()
        watchdog.disarm()
        self._signals.close()
