"""Threads that make batches ahead of the trainer, in one ring of memory. What goes wrong in one of them is the trainer's at once.

A batch is one flat piece of memory, filled row by row by whichever thread is free, and used again when the trainer is done
with it: nothing is allocated from step to step. On a GPU the ring is pinned and each batch, as soon as its last row is
written, is sent on a stream of its own while the trainer computes.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssl_pretrain.data import replacement
from ssl_pretrain.data.beton.file import Samples
from ssl_pretrain.data.native import decode
from ssl_pretrain.data.order import BLOCK, Plan
from ssl_pretrain.data.workers import Chunk, Job, irreplaceable
from ssl_pretrain.views.recipe import Crop

_ROWS = 16  # images that a thread makes at a time, at most: some tens of milliseconds, in which it hears nothing
_LOOK_SECONDS = 1.0  # between looks at whether the threads live
_JOIN_SECONDS = 60.0


@dataclass
class _Batch:
    """One job on its way. rows_taken, rows_made: by the threads. sent: on the device, with the event that says so."""

    slot: Tensor
    free_after: Any  # an event: what the slot held before has left for the GPU
    epoch: int
    indices: np.ndarray
    step: int
    labels: np.ndarray
    rows_taken: int = 0
    rows_made: int = 0
    seconds: float = 0.0
    replaced: list[tuple[int, str, str]] = field(default_factory=list)
    sent: tuple[Tensor, Any] | None = None
    ready: bool = False


class Threads:
    """The threads of one rank. `take` starts them; `close` ends them, and gives back files, memory and decoders.

    Args:
        samples: the stored images.
        each: the recipe of every view.
        plan: the order of the run; each job is a batch of it.
        num_threads: at least one.
        num_ahead: batches made before they are asked for.
        device: where the pixels are to be.
    """

    def __init__(
        self,
        samples: Samples,
        each: list[Crop],
        plan: Plan,
        num_threads: int,
        num_ahead: int,
        device: torch.device,
    ):
        self._samples, self._each, self._plan, self._device = samples, each, plan, device
        self._batch_size = batch_size = plan.global_batch_size // plan.world_size
        self._num_threads = max(1, num_threads)
        self._rows = max(1, min(_ROWS, -(-batch_size // self._num_threads)))
        self._functions = decode.functions(decode.library())
        self._views = decode.views_of(each, batch_size)
        self._shapes = [torch.Size((3, crop.size, crop.size)) for crop in each]
        self._num_slots = num_ahead + 1
        self._slots: list[Tensor] = []
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._handles: list[int] = []
        self._run: _Run | None = None

    def take(self, jobs: Iterable[Job]) -> Iterator[Chunk]:
        """The batch of each job, in their order. The threads begin at once; a new call ends those of the one before.

        The pixels of a batch are valid until the next one is asked for.
        """
        self._end()
        if not self._slots:
            total = self._batch_size * sum(shape.numel() for shape in self._shapes)
            pinned = self._device.type == "cuda"
            self._slots = [
                torch.empty(total, dtype=torch.uint8, pin_memory=pinned)
                for _ in range(self._num_slots)
            ]
        if not self._handles:
            self._handles = [
                os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
                for path in self._samples.paths
            ]
        self._run = _Run(self, iter(jobs))
        return self._run.chunks()

    def expect(self, blocks: np.ndarray) -> None:
        """Asks the system to read these blocks of `order.BLOCK` images into memory, and does not wait. blocks: their first images."""
        samples = self._samples
        for first in blocks.tolist():
            last = min(first + BLOCK, len(samples)) - 1
            while samples.file[last] != samples.file[first]:  # the next shard's
                last -= 1
            begin, end = int(samples.place[first]), int(samples.place[last] + samples.length[last])
            os.posix_fadvise(
                self._handles[samples.file[first]], begin, end - begin, os.POSIX_FADV_WILLNEED
            )

    def close(self) -> None:
        self._end()
        while self._handles:
            os.close(self._handles.pop())
        self._slots = []

    def _end(self) -> None:
        run, self._run = self._run, None
        if run is not None:
            run.stop()


class _Run:
    """From one start to its end. `changed` guards everything that threads and trainer share."""

    def __init__(self, owner: Threads, jobs: Iterator[Job]):
        self.owner, self.jobs = owner, jobs
        samples = owner._samples
        self.stored = decode.Stored(
            np.array(owner._handles, np.int32),
            samples.file,
            samples.place,
            samples.length,
            samples.mode,
            samples.height,
            samples.width,
        )
        self.changed = threading.Condition()
        self.stopping = False
        self.error: BaseException | None = None
        self.free: deque[tuple[Tensor, Any]] = deque((slot, None) for slot in owner._slots)
        self.batches: deque[_Batch] = (
            deque()
        )  # in the order of the jobs; the last one may have rows that nobody took
        self.threads = [
            threading.Thread(target=self._work, name=f"views-{n}", daemon=True)
            for n in range(owner._num_threads)
        ]
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        with self.changed:
            self.stopping = True
            self.changed.notify_all()
        for thread in self.threads:
            thread.join(_JOIN_SECONDS)  # each ends after the few rows that it is at
        if any(thread.is_alive() for thread in self.threads):
            where = self.owner._samples.paths[0]
            raise RuntimeError(
                f"{where}: reading has not come back for {_JOIN_SECONDS:.0f} s; its disk does not answer"
            )
        if self.owner._stream is not None:
            self.owner._stream.synchronize()  # the ring may be used again

    def chunks(self) -> Iterator[Chunk]:
        while True:
            batch = self._next()
            if batch is None:
                return
            pixels, event = batch.slot, None
            if batch.sent is not None:
                pixels, event = batch.sent
                torch.cuda.current_stream(self.owner._device).wait_event(event)
                pixels.record_stream(torch.cuda.current_stream(self.owner._device))
            replaced = [(name, message) for _, name, message in sorted(batch.replaced)]
            yield Chunk(pixels, self.owner._shapes, batch.labels, replaced, batch.seconds)
            with self.changed:
                self.free.append((batch.slot, event))
                self.changed.notify_all()

    def _next(self) -> _Batch | None:
        with self.changed:
            while True:
                if self.error is not None:
                    raise self.error
                if self.stopping:  # what was ready lies in slots that are no longer this run's
                    return None
                if self.batches and self.batches[0].ready:
                    return self.batches.popleft()
                if not any(thread.is_alive() for thread in self.threads):
                    assert not self.batches, "threads end when the jobs do, or with an error"
                    return None
                self.changed.wait(_LOOK_SECONDS)

    def _work(self) -> None:
        decoder = None
        try:
            decoder = decode.Decoder()
            scratch = decode.scratch_for(self.owner._samples, self.owner._each)
            while (work := self._take_rows()) is not None:
                self._make(*work, decoder, scratch)
        except BaseException as error:
            with self.changed:
                self.error = self.error or error
                self.stopping = True
                self.changed.notify_all()
        finally:
            if decoder is not None:
                decoder.close()
            with self.changed:
                self.changed.notify_all()

    def _take_rows(self) -> tuple[_Batch, int, int] | None:
        """Rows of a batch that nobody has begun; waits while the trainer has every slot."""
        with self.changed:
            while not self.stopping:
                batch = self.batches[-1] if self.batches else None
                if batch is None or batch.rows_taken == len(batch.indices):
                    if not self.free:
                        self.changed.wait(_LOOK_SECONDS)
                        continue
                    job = next(self.jobs, None)
                    if job is None:
                        return None
                    labels = np.empty(len(job.indices), np.int64)
                    batch = _Batch(*self.free.popleft(), job.epoch, job.indices, job.step, labels)
                    assert len(batch.indices) == self.owner._batch_size, "every job fills a slot"
                    self.batches.append(batch)
                first = batch.rows_taken
                batch.rows_taken = min(first + self.owner._rows, len(batch.indices))
                return batch, first, batch.rows_taken
            return None

    def _make(
        self, batch: _Batch, first: int, end: int, decoder: decode.Decoder, scratch: decode.Scratch
    ) -> None:
        if batch.free_after is not None:
            batch.free_after.synchronize()
        began = time.perf_counter()
        indices = batch.indices[first:end].astype(np.int64)
        numbers, status = indices.copy(), np.zeros(end - first, np.int8)
        self._call(batch, numbers, indices, first, decoder, scratch, status)
        bad = np.flatnonzero(status).tolist()
        replaced = [
            self._replace(batch, first + row, int(status[row]), numbers, first, decoder, scratch)
            for row in bad
        ]
        batch.labels[first:end] = self.owner._samples.label[numbers]
        with self.changed:
            batch.seconds += time.perf_counter() - began
            batch.replaced += replaced
            batch.rows_made += end - first
            last = batch.rows_made == len(batch.indices)
        if last:
            sent = self._send(batch.slot)
            with self.changed:
                batch.sent, batch.ready = sent, True
                self.changed.notify_all()

    def _call(
        self,
        batch: _Batch,
        numbers,
        indices,
        first: int,
        decoder: decode.Decoder,
        scratch: decode.Scratch,
        status,
    ) -> None:
        decode.make(
            self.owner._functions, self.stored, self.owner._views, numbers, indices, first, self.owner._plan.seed, batch.epoch,
            decoder.handle, scratch, batch.slot.numpy(), status,
        )  # fmt: skip

    def _replace(
        self,
        batch: _Batch,
        row: int,
        reason: int,
        numbers: np.ndarray,
        first: int,
        decoder: decode.Decoder,
        scratch: decode.Scratch,
    ) -> tuple[int, str, str]:
        """Puts another image in the place of one that cannot be decoded, the one that the folder loader takes; (row, file, message)."""
        samples, index = self.owner._samples, batch.indices[row : row + 1].astype(np.int64)
        unreadable = int(index[0])
        if reason == decode.CUT:
            self._explain_cut(unreadable)

        def readable(number: int) -> bool:
            became = decode.decode(
                self.owner._functions, self.stored, number, decoder.handle, scratch
            )
            if became == decode.CUT:
                self._explain_cut(number)
            return bool(became == decode.DONE)

        message = f"{samples.name(unreadable)}: {decode.REASONS[reason]}"
        taken = replacement.spare(self.owner._plan, batch.step, row, readable)
        if taken is None:
            raise ValueError(irreplaceable(message, samples.paths[0], len(samples)))
        status = np.zeros(1, np.int8)
        self._call(batch, np.array([taken]), index, row, decoder, scratch, status)
        assert status[0] == decode.DONE, "it could be decoded a moment ago"
        numbers[row - first] = taken
        return row, samples.name(unreadable), f"{message}; {samples.name(taken)} takes its place"

    def _explain_cut(self, number: int) -> None:
        """Read the image's bytes again to name the cause.

        Raises:
            ValueError: The file has become shorter since the run began.
            OSError: The disk does not answer.
        """
        samples = self.owner._samples
        handle = self.owner._handles[samples.file[number]]
        try:
            got = len(os.pread(handle, int(samples.length[number]), int(samples.place[number])))
        except OSError as error:
            raise OSError(error.errno, error.strerror, samples.name(number)) from None
        missing = samples.length[number] - got
        raise ValueError(
            f"data.root: {samples.name(number)}: the file ends {missing:,} bytes before the image does, and it did not when the run "
            "began; copy it again, then start the run again"
        )

    def _send(self, slot: Tensor) -> tuple[Tensor, Any] | None:
        stream = self.owner._stream
        if stream is None:
            return None
        with torch.cuda.device(self.owner._device), torch.cuda.stream(stream):
            pixels = slot.to(self.owner._device, non_blocking=True)
            event = torch.cuda.Event()
            event.record(stream)
        return pixels, event
