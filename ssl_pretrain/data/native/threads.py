"""Threads of compiled code that make batches of crops ahead of the trainer, in one ring of memory.

A batch is one flat piece of memory. Whichever thread is free fills its next rows, and the memory
is used again when the trainer is done with the batch, so nothing is allocated from step to step.
On a GPU the ring is pinned. Each batch is sent on a stream of its own as soon as its last row is
written, while the trainer computes. An error in a thread is raised in the trainer at once.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ssl_pretrain.data.beton.beton_source import Beton
from ssl_pretrain.data.chunks import Chunk, ChunkRequest
from ssl_pretrain.data.native import decode
from ssl_pretrain.data.order import BLOCK, Plan
from ssl_pretrain.data.replacement import Replacement, find_spare
from ssl_pretrain.views.recipe import Crop

# A thread makes at most this many images at a time. That takes some tens of milliseconds, in which
# it does not notice a request to stop.
MAX_ROWS = 16
POLL_SECONDS = 1.0  # interval between checks that the threads are alive
JOIN_SECONDS = 60.0


@dataclass
class _Slot:
    """Memory of one batch in the ring, free after the event, when the GPU has read it."""

    pixels: Tensor
    free_after: torch.cuda.Event | None = None


@dataclass
class _Batch:
    """One request in progress.

    Attributes:
        request: The images.
        slot: Memory for their crops.
        labels: int64 (n,).
        rows_begun: Rows that threads have begun.
        rows_done: Rows that are finished.
        seconds: Sum of the threads' time.
        replacements: The images that could not be decoded, with their rows.
        on_device: The pixels on the GPU, and the event after which they are there.
        ready: The trainer may take the batch.
    """

    request: ChunkRequest
    slot: _Slot
    labels: np.ndarray
    rows_begun: int = 0
    rows_done: int = 0
    seconds: float = 0.0
    replacements: list[tuple[int, Replacement]] = field(default_factory=list)
    on_device: tuple[Tensor, torch.cuda.Event] | None = None
    ready: bool = False

    def __len__(self) -> int:
        return len(self.request.indices)


@dataclass(frozen=True)
class _Thread:
    """The decoder and the buffers of one thread."""

    decoder: decode.Decoder
    scratch: decode.Scratch


class ThreadPool:
    """The threads of one rank. `take` starts them, and `close` ends them and frees memory."""

    def __init__(
        self,
        source: Beton,
        view_crops: list[Crop],
        plan: Plan,
        num_threads: int,
        num_ahead: int,
        device: torch.device,
    ):
        """Prepare the threads.

        Args:
            source: The images.
            view_crops: The recipe of every view.
            plan: The order of the run. Each request is a whole batch of it.
            num_threads: Number of threads, at least one is started.
            num_ahead: Batches that are made before they are needed.
            device: Device of the pixels.
        """
        self.source, self.view_crops, self.plan, self.device = source, view_crops, plan, device
        self.num_threads = max(1, num_threads)
        self.rows_at_once = max(1, min(MAX_ROWS, -(-plan.local_batch_size // self.num_threads)))
        self.functions = decode.functions(decode.library())
        self.views = decode.pack_views(view_crops, plan.local_batch_size)
        self.shapes = [torch.Size((3, crop.size, crop.size)) for crop in view_crops]
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.buffers: list[Tensor] = []
        self.files: list[int] = []
        self._num_buffers = num_ahead + 1
        self._run: _Run | None = None

    def take(self, requests: Iterable[ChunkRequest]) -> Iterator[Chunk]:
        """Return the batch of each request in order. The threads begin at once.

        A new call ends the threads of the one before. The pixels of a batch are valid until the
        next one is taken.
        """
        self._stop()
        if not self.buffers:
            num_bytes = self.plan.local_batch_size * sum(shape.numel() for shape in self.shapes)
            pinned = self.device.type == "cuda"
            self.buffers = [
                torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pinned)
                for _ in range(self._num_buffers)
            ]
        if not self.files:
            flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)
            self.files = [os.open(path, flags) for path in self.source.samples.paths]
        self._run = _Run(self, self._prefetch(requests) if self.plan.window else iter(requests))
        return self._run.chunks()

    def close(self) -> None:
        """Stop the threads, close the files and free the buffers. A later `take` starts afresh."""
        self._stop()
        while self.files:
            os.close(self.files.pop())
        self.buffers = []

    def _stop(self) -> None:
        run, self._run = self._run, None
        if run is not None:
            run.stop()

    def _prefetch(self, requests: Iterable[ChunkRequest]) -> Iterator[ChunkRequest]:
        """Yield the requests. At the first of a window let the system read the next window."""
        prefetched: list[int] = []
        for request in requests:
            blocks = self.plan.next_blocks(request.step).tolist()
            if blocks != prefetched:
                prefetched = blocks
                for first in blocks:
                    self._advise(first)
            yield request

    def _advise(self, first: int) -> None:
        """Ask the system to read a block of images into memory, without waiting for it."""
        samples = self.source.samples
        last = min(first + BLOCK, len(samples)) - 1
        while samples.file[last] != samples.file[first]:  # the block ends in the next shard
            last -= 1
        begin, end = int(samples.place[first]), int(samples.place[last] + samples.length[last])
        file = self.files[samples.file[first]]
        os.posix_fadvise(file, begin, end - begin, os.POSIX_FADV_WILLNEED)


class _Run:
    """The threads from start to end. `changed` guards what they share with the trainer."""

    def __init__(self, pool: ThreadPool, requests: Iterator[ChunkRequest]):
        self.pool, self.requests = pool, requests
        self.stored = decode.pack_stored(pool.source.samples, pool.files)
        self.changed = threading.Condition()
        self.stopping = False
        self.error: BaseException | None = None
        self.free = deque(_Slot(pixels) for pixels in pool.buffers)
        # In the order of the requests. Only the last one may have rows that no thread has begun.
        self.batches: deque[_Batch] = deque()
        self.threads = [
            threading.Thread(target=self._work, name=f"views-{number}", daemon=True)
            for number in range(pool.num_threads)
        ]
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        """Stop the threads and wait for them.

        Raises:
            RuntimeError: The disk does not answer.
        """
        with self.changed:
            self.stopping = True
            self.changed.notify_all()
        for thread in self.threads:
            thread.join(JOIN_SECONDS)  # each finishes its few rows
        if any(thread.is_alive() for thread in self.threads):
            raise RuntimeError(
                f"{self.pool.source.where}: a read has not returned for {JOIN_SECONDS:.0f} s; "
                "its disk does not answer"
            )
        if self.pool.stream is not None:
            self.pool.stream.synchronize()  # the ring may be used again

    def chunks(self) -> Iterator[Chunk]:
        """Yield the batches, and give the memory of each back to the threads."""
        while (batch := self._wait_for_batch()) is not None:
            pixels, event = batch.slot.pixels, None
            if batch.on_device is not None:
                pixels, event = batch.on_device
                current = torch.cuda.current_stream(self.pool.device)
                current.wait_event(event)
                pixels.record_stream(current)
            replacements = [replacement for _, replacement in sorted(batch.replacements)]
            yield Chunk(pixels, self.pool.shapes, batch.labels, replacements, batch.seconds)
            with self.changed:
                self.free.append(_Slot(batch.slot.pixels, event))
                self.changed.notify_all()

    def _wait_for_batch(self) -> _Batch | None:
        with self.changed:
            while self.error is None:
                if self.stopping:  # batches that are ready lie in memory of the next run
                    return None
                if self.batches and self.batches[0].ready:
                    return self.batches.popleft()
                if not any(thread.is_alive() for thread in self.threads):
                    assert not self.batches, "threads end after all requests, or with an error"
                    return None
                self.changed.wait(POLL_SECONDS)
            raise self.error

    def _work(self) -> None:
        try:
            with decode.Decoder() as decoder:
                scratch = decode.allocate_scratch(self.pool.source.samples, self.pool.view_crops)
                while (rows := self._begin_rows()) is not None:
                    self._make_rows(*rows, _Thread(decoder, scratch))
        except BaseException as error:
            with self.changed:
                self.error = self.error or error
                self.stopping = True
        finally:
            with self.changed:
                self.changed.notify_all()

    def _begin_rows(self) -> tuple[_Batch, int, int] | None:
        """Return a batch and the first and last + 1 of rows that no thread has begun.

        Waits while the trainer has all memory. Returns None at the end.
        """
        with self.changed:
            while not self.stopping:
                batch = self.batches[-1] if self.batches else None
                if batch is None or batch.rows_begun == len(batch):
                    if not self.free:
                        self.changed.wait(POLL_SECONDS)
                        continue
                    request = next(self.requests, None)
                    if request is None:
                        return None
                    labels = np.empty(len(request.indices), np.int64)
                    batch = _Batch(request, self.free.popleft(), labels)
                    assert len(batch) == self.pool.plan.local_batch_size, "requests fill a slot"
                    self.batches.append(batch)
                first = batch.rows_begun
                batch.rows_begun = min(first + self.pool.rows_at_once, len(batch))
                return batch, first, batch.rows_begun
            return None

    def _make_rows(self, batch: _Batch, first: int, end: int, thread: _Thread) -> None:
        if batch.slot.free_after is not None:
            batch.slot.free_after.synchronize()
        start = time.perf_counter()
        indices = batch.request.indices[first:end].astype(np.int64)
        numbers = indices.copy()
        status = self._write_rows(batch, numbers, indices, first, thread)
        replacements = []
        for row in np.flatnonzero(status).tolist():
            replacement = self._replace(batch, first + row, int(status[row]), thread)
            numbers[row] = replacement.number
            replacements.append((first + row, replacement))
        batch.labels[first:end] = self.pool.source.samples.label[numbers]
        with self.changed:
            batch.seconds += time.perf_counter() - start
            batch.replacements += replacements
            batch.rows_done += end - first
            complete = batch.rows_done == len(batch)
        if complete:
            on_device = self._upload(batch.slot.pixels)
            with self.changed:
                batch.on_device, batch.ready = on_device, True
                self.changed.notify_all()

    def _write_rows(
        self, batch: _Batch, numbers: np.ndarray, indices: np.ndarray, first: int, thread: _Thread
    ) -> np.ndarray:
        """Write the crops of images `numbers`, drawn as those of `indices`. Return their status."""
        pool, status = self.pool, np.zeros(len(numbers), np.int8)
        decode.make(
            (pool.functions, self.stored, pool.views),
            numbers,
            indices,
            first,
            pool.plan.seed,
            batch.request.epoch,
            thread.decoder.handle,
            thread.scratch,
            batch.slot.pixels.numpy(),
            status,
        )
        return status

    def _replace(self, batch: _Batch, row: int, status: int, thread: _Thread) -> Replacement:
        """Replace an unreadable image, with the one that worker processes would choose."""
        pool, index = self.pool, batch.request.indices[row : row + 1].astype(np.int64)
        unreadable = int(index[0])
        if status == decode.CUT:
            self._explain_cut(unreadable)

        def try_read(number: int) -> bool:
            status = decode.decode(
                pool.functions, self.stored, number, thread.decoder.handle, thread.scratch
            )
            if status == decode.CUT:
                self._explain_cut(number)
            return bool(status == decode.DONE)

        reason = f"{pool.source.name(unreadable)}: {decode.REASONS[status]}"
        spare = find_spare(pool.plan, batch.request.step, row, try_read)
        replacement = Replacement.create(pool.source, unreadable, reason, spare)
        statuses = self._write_rows(batch, np.array([replacement.number]), index, row, thread)
        assert statuses[0] == decode.DONE, "try_read has just decoded it"
        return replacement

    def _explain_cut(self, number: int) -> None:
        """Read the image's bytes again to find the cause.

        Raises:
            ValueError: The file has become shorter since the run began.
            OSError: The disk does not answer.
        """
        samples = self.pool.source.samples
        file = self.pool.files[samples.file[number]]
        try:
            content = os.pread(file, int(samples.length[number]), int(samples.place[number]))
        except OSError as error:
            raise OSError(error.errno, error.strerror, samples.name(number)) from None
        missing = samples.length[number] - len(content)
        raise ValueError(
            f"data.root: {samples.name(number)}: the file ends {missing:,} bytes before the image "
            "does, and it did not when the run began; copy it again, then start the run again"
        )

    def _upload(self, pixels: Tensor) -> tuple[Tensor, torch.cuda.Event] | None:
        stream = self.pool.stream
        if stream is None:
            return None
        with torch.cuda.device(self.pool.device), torch.cuda.stream(stream):
            on_device = pixels.to(self.pool.device, non_blocking=True)
            event = torch.cuda.Event()
            event.record(stream)
        return on_device, event
