"""Keep the chunks that worker processes send within the shared memory of the machine."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

SHARED_MEMORY = Path("/dev/shm")
PREFETCH = 2  # chunks that each worker makes ahead, at least
USABLE_SHARE = 0.8  # share that may be used of the memory that is free when the workers start
REMEDY = (
    "give the container more shared memory (--shm-size=8g or --ipc=host), or set data.num_workers "
    "lower (0 needs none)"
)


class SharedMemoryFull(RuntimeError):
    """A worker found no room in shared memory for its chunk."""


def allocate(size: int) -> Tensor:
    """Return an empty tensor of `size` bytes, in shared memory if this is a worker process.

    The queue would move it there later, in a thread that prints its error and drops the chunk.

    Raises:
        SharedMemoryFull: There is no room for it.
    """
    if torch.utils.data.get_worker_info() is None:
        return torch.empty(size, dtype=torch.uint8)
    try:
        storage = torch.UntypedStorage._new_shared(size)
    except RuntimeError as error:
        raise SharedMemoryFull(f"{size / 2**20:.1f} MiB of shared memory: {error}") from None
    return torch.empty(0, dtype=torch.uint8).set_(storage)


@dataclass(frozen=True)
class Transfer:
    """The way in which workers hand over their images.

    Attributes:
        chunk_size: Images per chunk.
        prefetch: Chunks that each worker makes ahead.
        copies: Whether the trainer copies each chunk out of shared memory as soon as it arrives.
        note: Message to the user if memory is so short that the run is slower, else empty.
    """

    chunk_size: int
    prefetch: int = PREFETCH
    copies: bool = False
    note: str = ""


def plan_transfer(
    image_bytes: int,
    chunk_size: int,
    num_workers: int,
    *,
    chunks_ahead: int,
    images_held: int,
    num_ranks: int,
) -> Transfer:
    """Choose chunks that fit into the shared memory that is free on this machine.

    Args:
        image_bytes: Bytes of all views of one image.
        chunk_size: Images per chunk if there is room.
        num_workers: Processes per rank.
        chunks_ahead: Chunks of all workers that are made before they are needed.
        images_held: Images that the trainer still uses if it does not copy them.
        num_ranks: Ranks on this machine.

    Raises:
        ValueError: Not even chunks of one image fit. The message names the place and the remedies.
    """
    if num_workers == 0:
        return Transfer(chunk_size)
    prefetch = max(PREFETCH, -(-chunks_ahead // num_workers))
    if not SHARED_MEMORY.is_dir():
        return Transfer(chunk_size, prefetch)
    free = shutil.disk_usage(SHARED_MEMORY).free
    capacity = USABLE_SHARE * free / (image_bytes * num_ranks)  # images of this rank
    if prefetch * num_workers * chunk_size + images_held <= capacity:
        return Transfer(chunk_size, prefetch)
    least = PREFETCH * num_workers + 1  # chunks under way
    if capacity < least:
        raise ValueError(
            f"data.num_workers: {num_workers} workers for each of {num_ranks} ranks on this "
            f"machine have at least {num_ranks * least} images of {image_bytes / 2**20:.2f} MiB "
            f"under way, and {SHARED_MEMORY} has {free / 2**20:.1f} MiB free; {REMEDY}"
        )
    smaller = min(chunk_size, int(capacity / least))
    note = (
        f"data.num_workers: {SHARED_MEMORY} has {free / 2**20:.0f} MiB free, so workers send "
        f"{smaller} images at a time instead of {chunk_size}, which is slower; {REMEDY}"
    )
    return Transfer(smaller, copies=True, note=note)
