"""How much memory a computation takes, and the largest part of a batch that fits."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from ssl_pretrain.distributed import collectives, process_group

ROOM = 0.85  # of what is free: allocators fragment, and other programs grow
GIB = 2**30


def available(device: torch.device) -> int:
    """Bytes that this rank may still take: of its GPU, or its share of the machine's memory.

    Raises:
        ValueError: neither CUDA nor Linux, where it cannot be known.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return _from_proc("/proc/meminfo", "MemAvailable") // process_group.local_world_size()


def peak(function: Callable[[], object], device: torch.device) -> int:
    """Runs `function` and returns the most memory it held at once, in bytes above what was held before.

    Raises:
        ValueError: as `available`.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with suppress(
        OSError, AttributeError
    ):  # glibc: what was freed goes back to the system, and is counted when taken again
        ctypes.CDLL(None).malloc_trim(0)
    before = _from_proc("/proc/self/status", "VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    function()
    return _from_proc("/proc/self/status", "VmHWM") - before


def largest_part(
    share: int, multiple: int, cost: Callable[[int], int], room: int
) -> tuple[int, str]:
    """The most of `share` images, in equal parts, that take no more than `room` bytes, and how that was found.

    Two small parts are measured and a line drawn through them; every rank takes what the tightest rank can.

    Args:
        multiple: what a part must be a multiple of: batch norm's group, or 1.
        cost: measures a part of so many images, in bytes.

    Raises:
        ValueError: not even the smallest part fits.
    """
    sizes = [size for size in range(multiple, share + 1, multiple) if share % size == 0]
    small = next((size for size in sizes if size >= 8), sizes[-1])
    larger = next((size for size in sizes if size >= 2 * small), small)
    cost(small)  # the first run also pays for what is made once
    low, high = cost(small), cost(larger)
    slope = max(0.0, (high - low) / (larger - small)) if larger > small else low / small
    fixed = max(0.0, low - slope * small)
    fitting = [size for size in sizes if fixed + slope * size <= ROOM * room]
    found = min(collectives.gather_objects(fitting[-1] if fitting else 0))
    measured = (
        f"{fixed / GIB:.2f} GiB + {slope / 2**20:.2f} MiB an image, {room / GIB:.1f} GiB free"
    )
    if not found:
        raise ValueError(
            f"local_batch_size: auto: a part of {sizes[0]} images does not fit ({measured}); "
            "take a smaller crop size or backbone, a smaller parallel.bn_group_images, or more ranks"
        )
    return found, measured


def explain(error: BaseException) -> str:
    """The error's own words; where a GPU's memory ran out, the rank and what to do about it as well."""
    if not isinstance(error, torch.OutOfMemoryError):
        return str(error)
    return (
        f"rank {process_group.rank()}: {str(error).partition(' If reserved')[0]} Feed fewer images at once: local_batch_size=auto takes the "
        "most that fits, with the gradient of the whole batch; or take smaller crops or more ranks, then start the run again"
    )


def _from_proc(file: str, entry: str) -> int:
    try:
        line = next(
            line for line in Path(file).read_text().splitlines() if line.startswith(f"{entry}:")
        )
    except (OSError, StopIteration):
        raise ValueError(
            "local_batch_size: auto measures memory on CUDA and on Linux only; give a number"
        ) from None
    return int(line.split()[1]) * 1024
