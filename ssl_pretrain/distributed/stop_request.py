"""A request to stop, agreed by all ranks."""

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
from ssl_pretrain.system.stop_signals import STOP_SIGNALS, StopSignals
from ssl_pretrain.system.watchdog import watchdog

Batch = TypeVar("Batch")
_NO_IMAGES = (
    "the disk or a worker that reads images does not answer; see whether data.root can be read, whether /dev/shm has room "
    "(docker --shm-size or --ipc=host), set data.num_workers lower, or raise parallel.timeout_seconds where it is only slow"
)
_NO_STEP = (
    "another rank or the device does not answer, or this machine is too slow; the stacks above say where; see the other ranks' "
    "outputs, or raise parallel.timeout_seconds where a step takes that long"
)


class StopRequest:
    """A signal sets a flag; all ranks agree on it once a step, and the answer is used one step later.

    The reduction of one step travels on a CPU group while the next step computes, so asking costs nothing. A second
    signal ends this process at once. `watched` and `agreed` are also the rank's signs of life: where the next one does
    not come within the time given to `start`, the process ends with a message, so that the others, and the scheduler,
    do not wait for it.
    """

    def __init__(self, signals: tuple[int, ...] = STOP_SIGNALS, pretend_at: int | None = None):
        self._pretend_at = (
            pretend_at  # after this step rank 0 sends itself SIGUSR2, as a scheduler would
        )
        self._pending: tuple[Tensor, Any] | None = None
        self._signals = StopSignals(signals)

    @property
    def requested(self) -> bool:
        """Whether this rank was asked to stop."""
        return self._signals.requested

    def watched(self, batches: Iterable[Batch], first_step: int) -> Iterator[Batch]:
        """The batches, the wait for each of them and the step that follows under the watchdog."""
        iterator = iter(batches)
        for step in itertools.count(first_step + 1):
            first = step == first_step + 1
            watchdog.beat(
                process_group.timeout_seconds(),
                f"waiting for the images of step {step}",
                _NO_IMAGES,
                compiles=first,
            )
            batch = next(iterator, None)
            if batch is None:
                return
            watchdog.beat(
                process_group.timeout_seconds(), f"training step {step}", _NO_STEP, compiles=first
            )
            yield batch

    def agreed(self, step: int = -1) -> bool:
        """Whether any rank had been asked to stop when the previous step ended; the same answer on all ranks."""
        watchdog.beat(process_group.timeout_seconds(), f"ending step {step}", _NO_STEP)
        if step == self._pretend_at and process_group.rank() == 0:
            if self._signals.handled:
                os.kill(os.getpid(), signal.SIGUSR2)
            self._signals.requested = True
        if process_group.world_size() == 1:
            return self.requested
        answer = self._wait()
        flag = torch.tensor([int(self.requested)])
        self._pending = (
            flag,
            dist.all_reduce(
                flag, op=dist.ReduceOp.MAX, group=process_group.cpu_group(), async_op=True
            ),
        )
        return answer

    def _wait(self) -> bool:
        if self._pending is None:
            return False
        flag, work = self._pending
        work.wait()
        self._pending = None
        return bool(flag.item())

    def close(self) -> None:
        """Finishes the reduction under way and gives the signals back."""
        self._wait()
        self._rest()

    def __enter__(self) -> StopRequest:
        return self

    def __exit__(self, kind: object, *_exception: object) -> None:
        if kind is None:
            self._wait()  # after an error the others may never answer
        self._rest()

    def _rest(self) -> None:
        watchdog.rest()
        self._signals.close()
