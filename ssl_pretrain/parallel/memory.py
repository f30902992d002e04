"""Measure the memory that a computation takes, and find the largest micro-batch that fits."""

import ctypes
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from ssl_pretrain.distributed import collectives, process_group

# Fraction of free memory to use, because allocators fragment and other programs grow.
USABLE_FRACTION = 0.85
GIB = 2**30


def available(device: torch.device) -> int:
    """Return the bytes that this rank can still allocate on its GPU or of its share of host memory.

    Raises:
        ValueError: If the device is a CPU and the system is not Linux.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return _from_proc("/proc/meminfo", "MemAvailable") // process_group.local_world_size()


def peak(function: Callable[[], object], device: torch.device) -> int:
    """Run `function` and return the peak of the memory that it adds, in bytes.

    Raises:
        ValueError: If the device is a CPU and the system is not Linux.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)  # returns freed memory, so its reuse is counted
    before = _from_proc("/proc/self/status", "VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    function()
    return _from_proc("/proc/self/status", "VmHWM") - before


def largest_micro_batch(
    share: int, multiple: int, measure: Callable[[int], int], free: int
) -> tuple[int, str]:
    """Return the largest micro-batch that fits in memory on every rank, and how it was estimated.

    Two small micro-batches are measured and a line is drawn through them.

    Args:
        share: Images of an optimizer step on this rank, which the micro-batch size has to divide.
        multiple: Divisor of every micro-batch size: the images of a batch norm group, or 1.
        measure: Function that returns the bytes that a micro-batch of a given size takes.
        free: Bytes that are free on this rank.

    Raises:
        ValueError: If not even the smallest micro-batch fits.
    """
    sizes = [size for size in range(multiple, share + 1, multiple) if share % size == 0]
    small = next((size for size in sizes if size >= 8), sizes[-1])
    larger = next((size for size in sizes if size >= 2 * small), small)
    measure(small)  # the first run also allocates lasting memory, such as workspaces
    low, high = measure(small), measure(larger)
    slope = max(0.0, (high - low) / (larger - small)) if larger > small else low / small
    fixed = max(0.0, low - slope * small)
    fitting = [size for size in sizes if fixed + slope * size <= USABLE_FRACTION * free]
    largest = min(collectives.gather_objects(fitting[-1] if fitting else 0))
    estimate = (
        f"{fixed / GIB:.2f} GiB + {slope / 2**20:.2f} MiB per image, {free / GIB:.1f} GiB free"
    )
    if not largest:
        raise ValueError(
            f"micro_batch_size: auto: a micro-batch of {sizes[0]} images does not fit "
            f"({estimate}); take a smaller crop size or backbone, a smaller "
            "parallel.bn_group_images, or more ranks"
        )
    return largest, estimate


def explain(error: BaseException) -> str:
    """Return the error's message, with the rank and a remedy if a GPU ran out of memory."""
    if not isinstance(error, torch.OutOfMemoryError):
        return str(error)
    message = str(error).partition(" If reserved")[0]
    return (
        f"rank {process_group.rank()}: {message} Set micro_batch_size=auto, which takes the most "
        "images that fit and trains with the gradient of the whole batch, or use smaller crops or "
        "more ranks. Then start the run again"
    )


def _from_proc(file: str, entry: str) -> int:
    """Return an entry of a file in /proc in bytes."""
    try:
        lines = Path(file).read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{entry}:"))
    except (OSError, StopIteration):
        raise ValueError(
            "micro_batch_size: auto measures memory on CUDA and on Linux only; give a number"
        ) from None
