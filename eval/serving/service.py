"""Check, decode, transform and embed uploaded images, and search for their neighbors."""

import asyncio
import io
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ssl_pretrain.eval.embedding.vector_index import IndexFacts
from ssl_pretrain.eval.image_transform import ImageTransform
from ssl_pretrain.eval.serving.batching import Batcher
from ssl_pretrain.eval.serving.image_checks import ImageDecoder
from ssl_pretrain.eval.serving.refusals import Refusal, overloaded
from ssl_pretrain.eval.serving.service_metrics import ServiceMetrics
from ssl_pretrain.eval.serving.uploads import ByteBudget, Upload

MAX_NEIGHBORS = 1000  # largest k of a request


@dataclass(frozen=True)
class ServiceLimits:
    """Limits on requests, and the size of the service.

    Attributes:
        max_bytes: Bytes per image file.
        max_pixels: Pixels per image. One of more than 4 bytes counts as several.
        max_batch: Images per batch of the network.
        max_queue: Images that are decoded or wait at a time. More are refused with status 503.
        max_wait_ms: Longest time in milliseconds that a batch waits for images in decoding.
        timeout_seconds: Longest time for the body to arrive, and for its answer.
        threads: Threads that decode, and threads of the network.
    """

    max_bytes: int = 20_000_000
    max_pixels: int = 50_000_000
    max_batch: int = 8
    max_queue: int = 64
    max_wait_ms: float = 3.0
    timeout_seconds: float = 30.0
    threads: int = 2

    def __post_init__(self) -> None:
        """Raise ValueError if a pair of images could never be admitted."""
        if self.max_queue < 2:
            raise ValueError(
                f"--max-queue: {self.max_queue} has no place for the two images of a pair; give 2 "
                "or more"
            )

    @property
    def max_upload_bytes(self) -> int:
        """Bytes of all uploads that are in memory at a time."""
        return 16 * self.max_bytes


class Network(Protocol):
    """A network and its transform, as `ServedNetwork`."""

    @property
    def transform(self) -> ImageTransform:
        """Transform of the images."""

    @property
    def dim(self) -> int:
        """Numbers per vector."""

    def embed(self, images: list[Tensor]) -> np.ndarray:
        """Return the features, float32 (n, dim), of normalized images."""

    def facts(self) -> dict[str, Any]:
        """Return what identifies the network, as values of JSON."""


class Index(Protocol):
    """Named vectors that can be searched, as `VectorIndex`."""

    @property
    def facts(self) -> IndexFacts:
        """Metric, kind, size and origin of the vectors."""

    def __len__(self) -> int:
        """Return the number of vectors."""

    def search(self, vectors: np.ndarray, k: int) -> tuple[list[list[str]], list[list[float]]]:
        """Return the ids and the scores of the nearest vectors of each query, nearest first."""


class Service:
    """The service without HTTP. Start and stop it in the event loop that uses it."""

    def __init__(self, network: Network, index: Index | None, limits: ServiceLimits):
        self.network, self.index, self.limits = network, index, limits
        self.num_images = 0
        self._budget = ByteBudget(limits.max_upload_bytes)
        self._decoder = ImageDecoder(network.transform.pixel_format, limits.max_pixels)
        self._threads = ThreadPoolExecutor(limits.threads, "decode")
        self.metrics = ServiceMetrics(self)
        self._batcher = Batcher(
            network.embed, limits.max_batch, limits.max_wait_ms / 1000, self.metrics
        )

    @property
    def depth(self) -> int:
        """Images that wait for the network."""
        return self._batcher.depth

    def facts(self) -> dict[str, Any]:
        """Return what identifies the network and the index, as values of JSON."""
        index = None
        if self.index is not None:
            facts = self.index.facts
            index = {name: getattr(facts, name) for name in ("count", "metric", "kind", "recall")}
        return self.network.facts() | {"index": index}

    async def start(self) -> None:
        """Accept images, after a gray one has warmed up decoder, transform and network."""
        self._batcher.start()
        num_channels = self.network.transform.pixel_format.num_channels
        if num_channels in (1, 3):
            file = io.BytesIO()
            Image.new("RGB", (64, 64), "gray").save(file, "JPEG")
            image = self._prepare(file.getvalue(), "the first image")
        else:
            image = self._transform(np.full((64, 64, num_channels), 128, np.uint8))
        await self._batcher.embed(image)

    async def stop(self) -> None:
        """Finish what is being computed, and end the threads."""
        await self._batcher.stop()
        self._threads.shutdown(cancel_futures=True)

    async def embed_upload(
        self, headers: Mapping[str, str], stream: AsyncIterator[bytes], names: tuple[str, ...]
    ) -> np.ndarray:
        """Return the vectors, float32 (n, dim), of the images of a request.

        Args:
            headers: Headers of the request, with names in lower case.
            stream: Body of the request.
            names: Form fields of the images.

        Raises:
            Refusal: If an image is refused, or there is no capacity.
        """
        limits = self.limits
        with Upload(limits.max_bytes, self._budget, limits.timeout_seconds) as upload:
            with self.metrics.time("read"):
                contents = await upload.read_images(headers, stream, names)
            try:
                async with asyncio.timeout(limits.timeout_seconds):
                    return await self._embed(contents, names)
            except TimeoutError:
                raise overloaded(
                    f"The answer was not computed within {limits.timeout_seconds:g} seconds."
                ) from None

    async def _embed(self, contents: list[bytes], names: tuple[str, ...]) -> np.ndarray:
        if self.num_images + len(contents) > self.limits.max_queue:
            raise overloaded(f"{self.limits.max_queue} images wait already, which is the limit.")
        self.num_images += len(contents)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._embed_image(content, name))
                    for content, name in zip(contents, names)
                ]
        except BaseExceptionGroup as errors:  # the first error stands for all
            raise errors.exceptions[0] from None
        finally:
            self.num_images -= len(contents)
        vectors = np.stack([task.result() for task in tasks])
        for vector, name in zip(vectors, names):
            if not np.isfinite(vector).all():
                raise Refusal(
                    500,
                    f"{name}: the network computed a vector with a value that is not finite.",
                    "Report the image to the operator of the service, and do not use its vector.",
                )
        return vectors

    async def _embed_image(self, content: bytes, name: str) -> np.ndarray:
        self._batcher.num_announced += 1
        try:
            with self.metrics.time("decode"):
                image = await asyncio.get_running_loop().run_in_executor(
                    self._threads, self._prepare, content, name
                )
        finally:
            self._batcher.num_announced -= 1
        return await self._batcher.embed(image)

    def _prepare(self, content: bytes, name: str) -> Tensor:
        """Return the normalized image, float32 (channels, height, width), as offline."""
        return self._transform(self._decoder.decode(content, name))

    def _transform(self, pixels: np.ndarray) -> Tensor:
        transform = self.network.transform
        image = torch.from_numpy(pixels).permute(2, 0, 1)
        return transform.normalize(transform.crop(image)[None])[0]

    async def search(self, vector: np.ndarray, k: int) -> list[tuple[str, float]]:
        """Return the ids and the scores of the k nearest vectors of the index.

        Call `check_k` first.
        """
        index = self.index
        assert index is not None, "check_k refuses searches without an index"
        (ids,), (scores,) = await asyncio.get_running_loop().run_in_executor(
            self._threads, index.search, vector[None], k
        )
        return list(zip(ids, scores))

    def check_k(self, k: int) -> None:
        """Refuse a search that the index cannot answer."""
        if self.index is None:
            raise Refusal(
                404,
                "This service has no index.",
                "Start it with --index INDEX, which `ssl-pretrain index` writes.",
            )
        largest = min(len(self.index), MAX_NEIGHBORS)
        if not 1 <= k <= largest:
            raise Refusal(
                422,
                f"k: {k} is out of range.",
                f"Give a whole number from 1 to {largest:,}; the index has {len(self.index):,} "
                "vectors.",
            )


def cosine_similarity(vectors: np.ndarray) -> float:
    """Return the cosine of two vectors (2, dim). It is 0 if one of them is 0."""
    first, second = vectors.astype(np.float64)
    lengths = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(np.clip(first @ second / lengths, -1, 1)) if lengths else 0.0
