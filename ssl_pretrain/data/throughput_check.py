"""Report whether reading images or the model limits the speed, as measured on the first steps."""

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

# The first step compiles and warms up. The measurement after it lasts until both of these are over.
MIN_STEPS = 10
MIN_SECONDS = 3.0


@dataclass
class Throughput:
    """The measurement of this rank.

    Attributes:
        num_images: Images in the steps.
        seconds: Duration of the steps.
        waiting_seconds: Time in which the trainer waited for a batch.
        num_read: Images that the loader read for these steps.
        reading_seconds: Time that workers spent on them, summed over the workers.
    """

    num_images: int = 0
    seconds: float = 0.0
    waiting_seconds: float = 0.0
    num_read: int = 0
    reading_seconds: float = 0.0


def report_bottleneck(loader: Loader, first_step: int, device: torch.device) -> Iterator[Batch]:
    """Yield the batches from a step on, and print one line on rank 0 after the first steps."""
    batches = loader.starting_at(first_step)
    yield from itertools.islice(batches, 1)
    _synchronize(device)
    measured = Throughput()
    start, num_read, reading_seconds = time.monotonic(), loader.num_read, loader.reading_seconds
    num_steps = 0
    while num_steps < MIN_STEPS or time.monotonic() - start <= MIN_SECONDS:
        before = time.monotonic()
        batch = next(batches, None)
        measured.waiting_seconds += time.monotonic() - before
        if batch is None:
            return
        num_steps += 1
        measured.num_images += len(batch)
        yield batch
    _synchronize(device)
    measured.seconds = time.monotonic() - start
    measured.num_read = loader.num_read - num_read
    measured.reading_seconds = loader.reading_seconds - reading_seconds
    process_group.print_once(describe(loader, measured), file=sys.stderr)
    yield from batches


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe(loader: Loader, measured: Throughput) -> str:
    """Return one line: how fast each of the two could be, and a remedy if the loader is slower."""
    reader, ranks = loader.reader, process_group.world_size()
    working_seconds = measured.seconds - measured.waiting_seconds
    num_workers = max(1, reader.num_workers)
    if reader.kind is ReaderKind.PROCESSES and reader.num_workers == 0:
        # The trainer reads the images itself, and does not wait for anything else.
        working_seconds = measured.seconds - measured.reading_seconds
    model_rate = ranks * measured.num_images / max(working_seconds, 1e-9)
    if not measured.reading_seconds:
        return (
            f"throughput: loader on the device, model {model_rate:,.0f} images/s: "
            "nothing to wait for"
        )
    loader_rate = ranks * num_workers * measured.num_read / measured.reading_seconds
    waiting_share = measured.waiting_seconds / max(measured.seconds, 1e-9)
    rates = (
        f"throughput: loader {loader_rate:,.0f} images/s, model {model_rate:,.0f} images/s, "
        f"waiting for data {100 * waiting_share:.0f} % of the time: "
    )
    if loader_rate >= model_rate:
        return rates + "the model is the bottleneck; the loader keeps up"
    return rates + f"the loader is the bottleneck; {remedy(loader)}"


def remedy(loader: Loader) -> str:
    """Return what would make this loader faster, the change with the largest effect first."""
    num_workers, cores = loader.reader.num_workers, process_group.cores_per_rank()
    if num_workers < cores:
        return f"raise data.num_workers from {num_workers} to {cores}, the cores of each rank"
    if loader.reader.kind is ReaderKind.PROCESSES:
        return (
            "write a .beton (python -m ssl_pretrain.data.beton write), which is decoded once for "
            "all views, or give the rank more cores"
        )
    return (
        "write the .beton with a smaller --max-side (docs/data.md has what that costs), or give "
        "the rank more cores"
    )
