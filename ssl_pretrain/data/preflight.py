"""Which of the two a run waits for, its images or its model: one line, measured on the first steps themselves."""

import sys
import time
from collections.abc import Iterator

import torch

from ssl_pretrain.data.loader import Loader
from ssl_pretrain.distributed import process_group
from ssl_pretrain.views.batch import Batch

_STEPS, _SECONDS = (
    10,
    3.0,
)  # measured after the first step, which compiles and warms up: whichever is longer


def watched(loader: Loader, first_step: int, device: torch.device) -> Iterator[Batch]:
    """The loader's batches from a step on; prints the line on rank 0 when enough steps have been seen. No step is made for it."""
    batches = loader.starting_at(first_step)
    if (first := next(batches, None)) is None:
        return
    yield first
    began = waited = 0.0
    steps = images = made = 0
    seconds = 0.0
    while True:
        if steps == 0:
            _finish(device)  # the first step has warmed up what there is to warm
            began, waited, images, made, seconds = (
                time.monotonic(),
                0.0,
                0,
                loader.num_made,
                loader.seconds,
            )
        elif steps >= _STEPS and time.monotonic() - began > _SECONDS:
            break
        asked = time.monotonic()
        batch = next(batches, None)
        waited += time.monotonic() - asked
        if batch is None:
            return
        steps, images = steps + 1, images + len(batch)
        yield batch
    _finish(device)
    if process_group.is_main():
        line = describe(
            loader,
            images,
            time.monotonic() - began,
            waited,
            loader.num_made - made,
            loader.seconds - seconds,
        )
        print(line, file=sys.stderr, flush=True)
    yield from batches


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe(
    loader: Loader, num_images: int, total: float, waited: float, num_made: int, seconds: float
) -> str:
    """The line: what the loader could make, what the model could take, and what to do about the slower one."""
    ranks = process_group.world_size()
    model = ranks * num_images / max(total - waited, 1e-9)
    makers = max(1, loader.num_workers)
    able = ranks * makers * num_made / seconds if seconds else float("inf")
    if loader.how == "folder" and loader.num_workers == 0:
        model, able = (
            ranks * num_images / max(total - seconds, 1e-9),
            ranks * num_made / max(seconds, 1e-9),
        )
    share = waited / max(total, 1e-9)
    rates = f"preflight: loader {able:,.0f} images/s, model {model:,.0f} images/s, waiting for data {100 * share:.0f} % of the time: "
    if able == float("inf"):
        return f"preflight: loader on the device, model {model:,.0f} images/s: nothing to wait for"
    if able >= model:
        return rates + "the model is the bottleneck; the loader keeps up"
    return rates + f"the loader is the bottleneck; {remedy(loader)}"


def remedy(loader: Loader) -> str:
    """What makes this loader faster, the largest step first."""
    cores = process_group.cores_per_rank()
    if loader.num_workers < cores:
        return (
            f"raise data.num_workers from {loader.num_workers} to {cores}, the cores of each rank"
        )
    if loader.how == "folder":
        return "write a .beton (python -m ssl_pretrain.data.beton write), which is decoded once for all views, or give the rank more cores"
    return "write the .beton with a smaller --max-side (docs/data.md has what that costs), or give the rank more cores"
