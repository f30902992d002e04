"""Measure during the first steps whether the loader or the model is the bottleneck."""

import itertools
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ssl_pretrain.data.loader import Loader
from ssl_pretrain.data.readers import ReaderKind
from ssl_pretrain.distributed import process_group
from ssl_pretrain.views.batch import Batch

# Minimum length of the measurement. The first step is a warm-up and is not measured.
MIN_STEPS = 10
MIN_SECONDS = 3.0


@dataclass
class Throughput:
    """Measurement of several steps on this rank.

    Attributes:
        num_images: Number of images in these steps.
        seconds: Duration of these steps.
        waiting_seconds: Time that the trainer spent waiting for batches.
        num_images_read: Number of images that the loader read in this time.
        reading_seconds: Time that workers spent on these images, summed over the workers.
    """

    num_images: int = 0
    seconds: float = 0.0
    waiting_seconds: float = 0.0
    num_images_read: int = 0
    reading_seconds: float = 0.0


def report_bottleneck(loader: Loader, first_step: int, device: torch.device) -> Iterator[Batch]:
    """Yield the batches from `first_step` on. After some steps, rank 0 prints the bottleneck."""
    batches = loader.iterate_from(first_step)
    yield from itertools.islice(batches, 1)
    _synchronize(device)
    throughput = Throughput()
    start = time.monotonic()
    num_images_read, reading_seconds = loader.num_images_read, loader.reading_seconds
    num_steps = 0
    while num_steps < MIN_STEPS or time.monotonic() - start <= MIN_SECONDS:
        wait_start = time.monotonic()
        batch = next(batches, None)
        throughput.waiting_seconds += time.monotonic() - wait_start
        if batch is None:
            return
        num_steps += 1
        throughput.num_images += len(batch)
        yield batch
    _synchronize(device)
    throughput.seconds = time.monotonic() - start
    throughput.num_images_read = loader.num_images_read - num_images_read
    throughput.reading_seconds = loader.reading_seconds - reading_seconds
    process_group.print_once(describe_throughput(loader, throughput), file=sys.stderr)
    yield from batches


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe_throughput(loader: Loader, throughput: Throughput) -> str:
    """Describe the speeds of loader and model in one line, with a remedy for a slow loader."""
    reader, num_ranks = loader.reader, process_group.world_size()
    working_seconds = throughput.seconds - throughput.waiting_seconds
    num_workers = max(1, reader.num_workers)
    if reader.kind is ReaderKind.PROCESSES and reader.num_workers == 0:
        # The trainer reads the images itself and waits for nothing else.
        working_seconds = throughput.seconds - throughput.reading_seconds
    model_rate = num_ranks * throughput.num_images / max(working_seconds, 1e-9)
    if not throughput.reading_seconds:
        return (
            f"throughput: loader on the device, model {model_rate:,.0f} images/s: "
            "the model never waits for data"
        )
    loader_rate = num_ranks * num_workers * throughput.num_images_read / throughput.reading_seconds
    waiting_share = throughput.waiting_seconds / max(throughput.seconds, 1e-9)
    rates = (
        f"throughput: loader {loader_rate:,.0f} images/s, model {model_rate:,.0f} images/s, "
        f"waiting for data {100 * waiting_share:.0f} % of the time: "
    )
    if loader_rate >= model_rate:
        return rates + "the model is the bottleneck; the loader keeps up"
    return rates + f"the loader is the bottleneck; {suggest_remedy(loader)}"


def suggest_remedy(loader: Loader) -> str:
    """Return the most effective way to make this loader faster."""
    num_workers, cores = loader.reader.num_workers, process_group.cores_per_rank()
    if num_workers < cores:
        return f"raise data.num_workers from {num_workers} to {cores}, the number of cores per rank"
    if loader.reader.kind is ReaderKind.PROCESSES:
        return (
            "write a .beton (python -m ssl_pretrain.data.beton write), whose images are decoded "
            "once for all views, or give the rank more cores"
        )
    return (
        "write the .beton with a smaller --max-side (docs/results/loading.md lists the cost), or "
        "give the rank more cores"
    )
