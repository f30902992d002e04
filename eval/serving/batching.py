"""Combine images of concurrent requests into batches for one inference thread."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from torch import Tensor

Embed = Callable[[list[Tensor]], np.ndarray]  # normalized images to features (n, dim)


class Observer(Protocol):
    """Receives the measurements of each batch."""

    def observe(self, stage: str, seconds: float) -> None:
        """Receive the seconds that an image spent in the stage "wait"."""

    def count_batch(self, num_images: int, seconds: float) -> None:
        """Receive the size of a batch, and the seconds of the network."""


@dataclass
class _PendingImage:
    """An image in the queue."""

    image: Tensor
    vector: "asyncio.Future[np.ndarray]"
    since: float = field(default_factory=time.perf_counter)


class Batcher:
    """Queue of images for a network, which embeds one batch at a time.

    An image that is alone is embedded immediately. While others are announced, which are being
    decoded, a batch waits for them for at most `max_wait_seconds`.

    Args:
        embed: Function that embeds a batch.
        max_batch: Largest number of images per batch.
        max_wait_seconds: Longest time that a batch waits for announced images.
        observer: Receives the measurements, if there is one.
    """

    def __init__(
        self,
        embed: Embed,
        max_batch: int,
        max_wait_seconds: float,
        observer: Observer | None = None,
    ):
        self._embed, self._max_batch, self._observer = embed, max_batch, observer
        self._max_wait_seconds = max_wait_seconds
        self._queue: asyncio.Queue[_PendingImage] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, "inference")
        self._task: asyncio.Task[None] | None = None
        self._batch: list[_PendingImage] = []  # images taken from the queue
        self.num_announced = 0  # images that are being decoded

    @property
    def depth(self) -> int:
        """Number of images that wait for a batch."""
        return self._queue.qsize()

    def start(self) -> None:
        """Start the batching task in the running event loop."""
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Cancel the images without an answer, and end the thread after its current batch."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        while not self._queue.empty():
            self._batch.append(self._queue.get_nowait())
        for pending in self._batch:
            pending.vector.cancel()
        await asyncio.to_thread(self._thread.shutdown)

    async def embed(self, image: Tensor) -> np.ndarray:
        """Return the features, float32 (dim,), of a normalized image (channels, height, width)."""
        pending = _PendingImage(image, asyncio.get_running_loop().create_future())
        self._queue.put_nowait(pending)
        return await pending.vector

    async def _run(self) -> None:
        while True:
            await self._collect()
            start = time.perf_counter()
            if self._observer is not None:
                for pending in self._batch:
                    self._observer.observe("wait", start - pending.since)
            try:
                await self._answer(self._batch)
            except Exception as error:
                await self._answer_one_by_one(error)
            if self._observer is not None:
                self._observer.count_batch(len(self._batch), time.perf_counter() - start)

    async def _answer(self, batch: list[_PendingImage]) -> None:
        """Embed images together and resolve their futures."""
        features = await asyncio.get_running_loop().run_in_executor(
            self._thread, self._embed, [pending.image for pending in batch]
        )
        assert len(features) == len(batch), "embed returns one row per image"
        for pending, vector in zip(batch, features):
            if not pending.vector.done():  # the client may have left
                pending.vector.set_result(vector)

    async def _answer_one_by_one(self, error: Exception) -> None:
        """Embed the images of a batch that failed alone, so that one cannot fail the others."""
        for pending in self._batch:
            try:
                if len(self._batch) == 1:  # it has been tried alone
                    raise error
                await self._answer([pending])
            except Exception as reason:
                if not pending.vector.done():
                    pending.vector.set_exception(reason)

    async def _collect(self) -> None:
        """Fill the next batch. Images whose clients have left are skipped."""
        self._batch = []  # filled in place, so that `stop` finds what was taken from the queue
        while not self._batch:
            self._add(await self._queue.get())
        deadline = time.perf_counter() + self._max_wait_seconds
        while len(self._batch) < self._max_batch:
            if self._queue.empty():
                remaining = deadline - time.perf_counter()
                if self.num_announced == 0 or remaining <= 0:
                    break
                try:
                    self._add(await asyncio.wait_for(self._queue.get(), remaining))
                except TimeoutError:
                    break
            else:
                self._add(self._queue.get_nowait())

    def _add(self, pending: _PendingImage) -> None:
        if not pending.vector.cancelled():
            self._batch.append(pending)
