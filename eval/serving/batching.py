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
class _Waiting:
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
        self._queue: asyncio.Queue[_Waiting] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, "inference")
        self._task: asyncio.Task[None] | None = None
        self.num_announced = 0  # images that are being decoded

    @property
    def depth(self) -> int:
        """Number of images that wait for a batch."""
        return self._queue.qsize()

    def start(self) -> None:
        """Start to answer, in the running event loop."""
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """End the thread, after the batch that it is embedding."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        await asyncio.to_thread(self._thread.shutdown)

    async def embed(self, image: Tensor) -> np.ndarray:
        """Return the features, float32 (dim,), of a normalized image (channels, height, width)."""
        waiting = _Waiting(image, asyncio.get_running_loop().create_future())
        self._queue.put_nowait(waiting)
        return await waiting.vector

    async def _run(self) -> None:
        while True:
            batch = await self._next_batch()
            start = time.perf_counter()
            try:
                features = await asyncio.get_running_loop().run_in_executor(
                    self._thread, self._embed, [waiting.image for waiting in batch]
                )
            except Exception as error:  # the requests of this batch fail, and the service goes on
                for waiting in batch:
                    if not waiting.vector.done():
                        waiting.vector.set_exception(error)
                continue
            if self._observer is not None:
                for waiting in batch:
                    self._observer.observe("wait", start - waiting.since)
                self._observer.count_batch(len(batch), time.perf_counter() - start)
            for waiting, vector in zip(batch, features):
                if not waiting.vector.done():  # the client may have left
                    waiting.vector.set_result(vector)

    async def _next_batch(self) -> list[_Waiting]:
        """Return the images of the next batch. Those whose clients have left are skipped."""
        batch: list[_Waiting] = []
        while not batch:
            batch = self._without_cancelled([await self._queue.get()])
        deadline = time.perf_counter() + self._max_wait_seconds
        while len(batch) < self._max_batch:
            if self._queue.empty():
                remaining = deadline - time.perf_counter()
                if self.num_announced == 0 or remaining <= 0:
                    break
                try:
                    waiting = await asyncio.wait_for(self._queue.get(), remaining)
                except TimeoutError:
                    break
            else:
                waiting = self._queue.get_nowait()
            batch += self._without_cancelled([waiting])
        return batch

    @staticmethod
    def _without_cancelled(images: list[_Waiting]) -> list[_Waiting]:
        return [waiting for waiting in images if not waiting.vector.cancelled()]
