"""Measure the memory that a computation takes, and find the largest micro-batch that fits."""

from collections.abc import Callable
from pathlib import Path

import torch

from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.system import allocator

# Fraction of free memory to use, because allocators fragment and other programs grow.
USABLE_FRACTION = 0.85
GIB = 2**30


def available_bytes(device: torch.device) -> int:
    """Return the bytes that this rank can still allocate on its device.

    On a CPU, the ranks of a machine share the free memory of the host equally.

    Raises:
        ValueError: If the device is a CPU and the system is not Linux.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return _read_proc_bytes("/proc/meminfo", "MemAvailable") // process_group.local_world_size()


def measure_peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Run `function` and return the peak memory in bytes that it adds to the memory in use.

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
    allocator.trim()  # so that the reuse of freed memory is counted
    before = _read_proc_bytes("/proc/self/status", "VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    function()
    return _read_proc_bytes("/proc/self/status", "VmHWM") - before


def largest_micro_batch(
    local_batch_size: int, divisor: int, measure_bytes: Callable[[int], int], free_bytes: int
) -> tuple[int, str]:
    """Return the largest micro-batch that fits in memory on every rank, and how it was estimated.

    The memory of two small micro-batches is measured and extrapolated linearly.

    Args:
        local_batch_size: This rank's images per optimizer step. The micro-batch size divides it.
        divisor: Divisor of every micro-batch size: the size of a batch norm group, or 1.
        measure_bytes: Function that returns the peak memory in bytes for a micro-batch size.
        free_bytes: Free memory on this rank.

    Raises:
        ValueError: If not even the smallest micro-batch fits.
    """
    multiples = range(divisor, local_batch_size + 1, divisor)
    sizes = [size for size in multiples if local_batch_size % size == 0]
    small = next((size for size in sizes if size >= 8), sizes[-1])
    larger = next((size for size in sizes if size >= 2 * small), small)
    measure_bytes(small)  # the first run also allocates lasting memory, such as workspaces
    small_bytes, larger_bytes = measure_bytes(small), measure_bytes(larger)
    slope = small_bytes / small
    if larger > small:
        slope = max(0.0, (larger_bytes - small_bytes) / (larger - small))
    intercept = max(0.0, small_bytes - slope * small)
    usable_bytes = USABLE_FRACTION * free_bytes
    fitting_sizes = [size for size in sizes if intercept + slope * size <= usable_bytes]
    largest = min(collectives.gather_objects(fitting_sizes[-1] if fitting_sizes else 0))
    estimate = (
        f"{intercept / GIB:.2f} GiB + {slope / 2**20:.2f} MiB per image, "
        f"{free_bytes / GIB:.1f} GiB free"
    )
    if not largest:
        raise ValueError(
            f"micro_batch_size=auto: not even a micro-batch of {sizes[0]} images fits "
            f"({estimate}); use a smaller crop size or backbone, a smaller "
            "parallel.bn_group_images, or more ranks"
        )
    return largest, estimate


def describe_error(error: BaseException) -> str:
    """Return an error's message, with the rank and a remedy if a GPU ran out of memory."""
    if not isinstance(error, torch.OutOfMemoryError):
        return str(error)
    message = str(error).partition(" If reserved")[0]
    return (
        f"rank {process_group.rank()}: {message} Set micro_batch_size=auto, which finds the "
        "largest micro-batch that fits and trains with the gradient of the whole batch, or use "
        "smaller crops or more ranks. Then start the run again"
    )


def _read_proc_bytes(file: str, entry: str) -> int:
    """Return the value of an entry in a /proc file, in bytes."""
    try:
        lines = Path(file).read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{entry}:"))
    except (OSError, StopIteration):
        raise ValueError(
            "micro_batch_size: auto needs a GPU or Linux to measure memory; give a number"
        ) from None
