"""Make batches of crops ahead of the trainer, with threads and reused buffers.

A batch is one flat buffer. Any free thread fills the next rows of the batch, and the buffer is used
again when the trainer is done with the batch, so no step allocates memory. For a GPU, the buffers
are pinned, and each batch is copied to the GPU as soon as its last row is written. The copy runs on
a separate stream while the trainer computes. An error in a thread is raised in the trainer at once.
"""

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ssl_pretrain.data.chunks import Chunk, ChunkRequest
from ssl_pretrain.data.image_source import Source
from ssl_pretrain.data.native.view_makers import Images, ViewMaker
from ssl_pretrain.data.order import BLOCK_SIZE, BatchPlan
from ssl_pretrain.data.replacement import Replacement, find_spare
from ssl_pretrain.data.text_maker import TextMaker
from ssl_pretrain.views.recipe import Crop
from ssl_pretrain.views.tokenizers import TokenArrays

# Largest number of rows that a thread fills at a time. They take some tens of milliseconds, and a
# request to stop has no effect until they are done.
MAX_ROWS = 16
POLL_SECONDS = 1.0  # interval between checks that the threads are alive
JOIN_SECONDS = 60.0  # longest wait for a thread to stop


@dataclass
class _Buffer:
    """Memory of one batch. After the event, the GPU has a copy and the memory can be reused."""

    pixels: Tensor
    copy_event: torch.cuda.Event | None = None


@dataclass
class _Batch:
    """A batch that the threads are making."""

    request: ChunkRequest
    buffer: _Buffer
    labels: np.ndarray  # int64 (n,)
    tokens: tuple[TokenArrays, ...]  # one set per text of an item
    num_rows_claimed: int = 0
    num_rows_done: int = 0
    working_seconds: float = 0.0  # summed over the threads
    replacements: list[tuple[int, Replacement]] = field(default_factory=list)  # row, replacement
    # Pixels for the trainer and the event at the end of their copy. None until all rows are done.
    output: tuple[Tensor, torch.cuda.Event | None] | None = None

    def __len__(self) -> int:
        return len(self.labels)


class ThreadPool:
    """The threads of one rank.

    `make_chunks` starts them, and `close` ends them and frees their memory.
    """

    def __init__(
        self,
        source: Source,
        images: Images,
        view_crops: list[Crop],
        plan: BatchPlan,
        num_threads: int,
        num_batches_ahead: int,
        device: torch.device,
        text_maker: TextMaker | None = None,
    ):
        """Prepare the threads without starting them.

        Args:
            source: Source of the images.
            images: The same images, as the threads read them.
            view_crops: Recipe of each view.
            plan: Order of the images. Each request is one of its batches.
            num_threads: Number of threads. At least one is started.
            num_batches_ahead: Number of batches to make before they are needed.
            device: Device of the pixels.
            text_maker: The texts of the images. By default they have none.
        """
        self.text_maker = text_maker or TextMaker(source)
        self.source, self.images, self.plan, self.device = source, images, plan, device
        self.num_threads = max(1, num_threads)
        self.rows_per_turn = max(1, min(MAX_ROWS, -(-plan.local_batch_size // self.num_threads)))
        channels = source.num_channels
        self.shapes = [torch.Size((channels, crop.height, crop.width)) for crop in view_crops]
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.buffers: list[Tensor] = []
        self._num_buffers = num_batches_ahead + 1
        self._session: _Session | None = None

    def make_chunks(self, requests: Iterable[ChunkRequest]) -> Iterator[Chunk]:
        """Start the threads and return an iterator over the batches of the requests, in order.

        A new call ends the threads of the previous one. The pixels of a batch are valid until the
        next batch is taken.
        """
        self._stop()
        if not self.buffers:
            num_bytes = self.plan.local_batch_size * sum(shape.numel() for shape in self.shapes)
            self.buffers = [
                torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self.stream is not None)
                for _ in range(self._num_buffers)
            ]
        self.images.open()
        iterator = self._prefetch(requests) if self.plan.window_size else iter(requests)
        self._session = _Session(self, iterator)
        return self._session.chunks()

    def close(self) -> None:
        """Stop the threads, close the files and free the buffers.

        `make_chunks` can start them again.
        """
        self._stop()
        self.images.close()
        self.buffers = []

    def _stop(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.stop()

    def _prefetch(self, requests: Iterable[ChunkRequest]) -> Iterator[ChunkRequest]:
        """Yield the requests, and ask the system to read each window of images one window ahead."""
        prefetched: list[int] = []
        for request in requests:
            blocks = self.plan.next_window_blocks(request.step).tolist()
            if blocks != prefetched:
                prefetched = blocks
                for first in blocks:
                    self.source.prefetch(first, min(BLOCK_SIZE, len(self.source) - first))
            yield request


class _Session:
    """The threads of one call to `make_chunks`.

    `condition` guards the state that they share with the trainer.
    """

    def __init__(self, pool: ThreadPool, requests: Iterator[ChunkRequest]):
        self.pool, self.requests = pool, requests
        self.condition = threading.Condition()
        self.is_stopping = False
        self.error: BaseException | None = None
        self.free_buffers = deque(map(_Buffer, pool.buffers))
        # Batches in the order of the requests. Only the last one has rows that are not claimed yet.
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
            RuntimeError: If the disk does not respond.
        """
        with self.condition:
            self.is_stopping = True
            self.condition.notify_all()
        for thread in self.threads:
            thread.join(JOIN_SECONDS)  # each thread finishes its current rows first
        if any(thread.is_alive() for thread in self.threads):
            raise RuntimeError(
                f"{self.pool.source.full_path}: a read did not return within {JOIN_SECONDS:.0f} s; "
                "check the disk, then start the run again"
            )
        if self.pool.stream is not None:
            self.pool.stream.synchronize()  # after this, the buffers may be reused

    def chunks(self) -> Iterator[Chunk]:
        """Yield the batches, and give each buffer back to the threads after its batch is used."""
        while (batch := self._wait_for_batch()) is not None:
            assert batch.output is not None
            pixels, copy_event = batch.output
            if copy_event is not None:
                trainer_stream = torch.cuda.current_stream(self.pool.device)
                trainer_stream.wait_event(copy_event)
                pixels.record_stream(trainer_stream)
            replacements = [replacement for _, replacement in sorted(batch.replacements)]
            yield Chunk(
                pixels,
                self.pool.shapes,
                batch.labels,
                replacements,
                batch.working_seconds,
                tokens=batch.tokens,
            )
            with self.condition:
                self.free_buffers.append(_Buffer(batch.buffer.pixels, copy_event))
                self.condition.notify_all()

    def _wait_for_batch(self) -> _Batch | None:
        with self.condition:
            while self.error is None:
                if self.is_stopping:  # the next session reuses the buffers of finished batches
                    return None
                if self.batches and self.batches[0].output is not None:
                    return self.batches.popleft()
                if not any(thread.is_alive() for thread in self.threads):
                    assert not self.batches, "a thread ends after all requests or with an error"
                    return None
                self.condition.wait(POLL_SECONDS)
            raise self.error

    def _work(self) -> None:
        try:
            with closing(self.pool.images.build_maker()) as maker:
                while (rows := self._claim_rows()) is not None:
                    self._make_rows(*rows, maker)
        except BaseException as error:
            with self.condition:
                self.error = self.error or error
                self.is_stopping = True
        finally:
            with self.condition:
                self.condition.notify_all()

    def _claim_rows(self) -> tuple[_Batch, int, int] | None:
        """Return a batch and the rows that this thread has to fill, from the first up to an end.

        Wait while the trainer has all buffers. Return None after the last request or a stop.
        """
        with self.condition:
            while not self.is_stopping:
                if not self.batches or self.batches[-1].num_rows_claimed == len(self.batches[-1]):
                    if not self.free_buffers:
                        self.condition.wait(POLL_SECONDS)
                        continue
                    request = next(self.requests, None)
                    if request is None:
                        return None
                    labels = np.empty(len(request.indices), np.int64)
                    assert len(labels) == self.pool.plan.local_batch_size, "a request is one batch"
                    tokens = self.pool.text_maker.empty(len(labels))
                    self.batches.append(
                        _Batch(request, self.free_buffers.popleft(), labels, tokens)
                    )
                batch = self.batches[-1]
                first = batch.num_rows_claimed
                batch.num_rows_claimed = min(first + self.pool.rows_per_turn, len(batch))
                return batch, first, batch.num_rows_claimed
            return None

    def _make_rows(self, batch: _Batch, first: int, end: int, maker: ViewMaker) -> None:
        if batch.buffer.copy_event is not None:
            batch.buffer.copy_event.synchronize()
        start = time.perf_counter()
        indices = batch.request.indices[first:end].astype(np.int64)
        numbers, pixels = indices.copy(), batch.buffer.pixels.numpy()
        reasons = maker.make_views(numbers, indices, first, batch.request.epoch, pixels)
        reasons |= self._find_missing_texts(indices)
        replacements = []
        for row, reason in reasons.items():
            replacement = self._replace(batch, first + row, reason, maker)
            numbers[row] = replacement.spare_index
            replacements.append((first + row, replacement))
        batch.labels[first:end] = self.pool.source.labels[numbers]
        self._make_texts(batch, first, numbers, indices)
        with self.condition:
            batch.working_seconds += time.perf_counter() - start
            batch.replacements += replacements
            batch.num_rows_done += end - first
            is_complete = batch.num_rows_done == len(batch)
        if is_complete:
            output = self._upload(batch.buffer.pixels)
            with self.condition:
                batch.output = output
                self.condition.notify_all()

    def _find_missing_texts(self, indices: np.ndarray) -> dict[int, str]:
        """Return the reason for each image without its texts, by its position in `indices`."""
        problems = {
            position: self.pool.text_maker.read_ahead(index)
            for position, index in enumerate(indices.tolist())
        }
        return {position: problem for position, problem in problems.items() if problem}

    def _make_texts(
        self, batch: _Batch, first: int, numbers: np.ndarray, indices: np.ndarray
    ) -> None:
        """Write the tokens of images to consecutive rows of a batch."""
        rows = slice(first, first + len(indices))
        new_tokens = self.pool.text_maker.make(numbers, batch.request.epoch, indices)
        for tokens, new in zip(batch.tokens, new_tokens, strict=True):
            tokens.ids[rows], tokens.valid[rows] = new

    def _replace(self, batch: _Batch, row: int, reason: str, maker: ViewMaker) -> Replacement:
        """Replace an unreadable image with the one that worker processes would choose."""
        source, request = self.pool.source, batch.request
        indices = request.indices[row : row + 1].astype(np.int64)

        def can_read(number: int) -> bool:
            return not self.pool.text_maker.read_ahead(number) and maker.can_read(number)

        spare_index = find_spare(self.pool.plan, request.step, row, can_read)
        replacement = Replacement.create(source, int(indices[0]), reason, spare_index)
        spare_indices, pixels = np.array([replacement.spare_index]), batch.buffer.pixels.numpy()
        reasons = maker.make_views(spare_indices, indices, row, request.epoch, pixels)
        assert not reasons, "find_spare has just read it"
        return replacement

    def _upload(self, pixels: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        stream = self.pool.stream
        if stream is None:
            return pixels, None
        with torch.cuda.device(self.pool.device), torch.cuda.stream(stream):
            on_device = pixels.to(self.pool.device, non_blocking=True)
            event = torch.cuda.Event()
            event.record(stream)
        return on_device, event
