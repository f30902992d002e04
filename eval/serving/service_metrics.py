"""Metrics of the service in Prometheus' format."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
STAGES = ("read", "decode", "wait", "network")  # stages of a request in order


class Gauged(Protocol):
    """Values that the gauges read when the metrics are scraped."""

    @property
    def depth(self) -> int:
        """Images that wait for the network."""

    @property
    def num_images(self) -> int:
        """Images that are being decoded, wait, or are in the network."""


class ServiceMetrics:
    """Counters and histograms of one service, in a registry of its own."""

    def __init__(self, gauged: Gauged):
        import prometheus_client as client

        self._registry = client.CollectorRegistry()
        client.ProcessCollector(registry=self._registry)
        self._requests = client.Counter(
            "ssl_pretrain_requests",
            "Requests by route and HTTP status.",
            ["route", "status"],
            registry=self._registry,
        )
        self._seconds = client.Histogram(
            "ssl_pretrain_request_seconds",
            "Seconds from the headers of a request to the end of its answer.",
            ["route"],
            buckets=SECONDS,
            registry=self._registry,
        )
        self._stages = client.Histogram(
            "ssl_pretrain_stage_seconds",
            "Seconds of the stages of a request: read (the body arrives), decode (with the "
            "transform), wait (for a batch), network (the whole batch).",
            ["stage"],
            buckets=SECONDS,
            registry=self._registry,
        )
        self._batches = client.Histogram(
            "ssl_pretrain_batch_images",
            "Images per batch.",
            buckets=BATCH_SIZES,
            registry=self._registry,
        )
        depth = client.Gauge(
            "ssl_pretrain_queue_images",
            "Images that wait for the network.",
            registry=self._registry,
        )
        depth.set_function(lambda: gauged.depth)
        in_flight = client.Gauge(
            "ssl_pretrain_images_in_flight",
            "Images that are being decoded, wait, or are in the network.",
            registry=self._registry,
        )
        in_flight.set_function(lambda: gauged.num_images)
        for stage in STAGES:
            self._stages.labels(stage)

    def count_request(self, route: str, status: int, seconds: float) -> None:
        """Count a request that was answered."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def count_batch(self, num_images: int, seconds: float) -> None:
        """Count a batch of the network."""
        self._batches.observe(num_images)
        self._stages.labels("network").observe(seconds)

    def observe(self, stage: str, seconds: float) -> None:
        """Add the seconds of one stage of a request."""
        self._stages.labels(stage).observe(seconds)

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Measure a stage of a request, also if it fails."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.observe(stage, time.perf_counter() - start)

    def render(self) -> tuple[bytes, str]:
        """Return the metrics as text, and its content type."""
        import prometheus_client as client

        content: Any = client.generate_latest(self._registry)
        return bytes(content), client.CONTENT_TYPE_LATEST
