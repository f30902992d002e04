"""Shared memory for the chunks of images that workers send to the trainer."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

SHARED_MEMORY = Path("/dev/shm")
MIN_PREFETCH_FACTOR = 2  # smallest number of chunks that each worker prepares in advance
USABLE_FRACTION = 0.8  # largest usable fraction of the shared memory that is free at startup
SHARED_MEMORY_REMEDY = (
    "give the container more shared memory (--shm-size=8g or --ipc=host), or lower "
    "data.num_workers (0 needs no shared memory)"
)


class SharedMemoryFull(RuntimeError):
    """Shared memory has no room for a worker's chunk."""


def allocate(num_bytes: int) -> Tensor:
    """Return an uninitialized uint8 tensor, in shared memory if this is a worker process.

    If a worker allocated ordinary memory, its queue would move the chunk to shared memory in a
    background thread. That thread prints an error and drops the chunk if shared memory is full.

    Raises:
        SharedMemoryFull: If there is no room for it.
    """
    if torch.utils.data.get_worker_info() is None:
        return torch.empty(num_bytes, dtype=torch.uint8)
    try:
        storage = torch.UntypedStorage._new_shared(num_bytes)
    except RuntimeError as error:
        raise SharedMemoryFull(
            f"cannot allocate {num_bytes / 2**20:.1f} MiB of shared memory: {error}"
        ) from None
    return torch.empty(0, dtype=torch.uint8).set_(storage)


@dataclass(frozen=True)
class Transfer:
    """Settings for the transfer of images from the workers to the trainer.

    Attributes:
        chunk_size: Images per chunk.
        prefetch_factor: Chunks that each worker prepares in advance.
        copies_chunks: The trainer copies each chunk out of shared memory as soon as it arrives.
        note: Message to the user if low memory slows the run down, else empty.
    """

    chunk_size: int
    prefetch_factor: int = MIN_PREFETCH_FACTOR
    copies_chunks: bool = False
    note: str = ""


def plan_transfer(
    bytes_per_image: int,
    chunk_size: int,
    num_workers: int,
    *,
    num_chunks_ahead: int,
    num_images_held: int,
    num_ranks: int,
) -> Transfer:
    """Choose a chunk size that fits in the free shared memory of this machine.

    Args:
        bytes_per_image: Bytes of all views of one image, or 0 if only texts are read.
        chunk_size: Images per chunk if there is room.
        num_workers: Processes per rank.
        num_chunks_ahead: Chunks that the workers of a rank prepare in advance, in total.
        num_images_held: Images that the trainer keeps in shared memory unless it copies them.
        num_ranks: Ranks on this machine.

    Raises:
        ValueError: If not even chunks of one image fit.
    """
    if num_workers == 0:
        return Transfer(chunk_size)
    prefetch_factor = max(MIN_PREFETCH_FACTOR, -(-num_chunks_ahead // num_workers))
    if not SHARED_MEMORY.is_dir() or not bytes_per_image:
        return Transfer(chunk_size, prefetch_factor)
    free_bytes = shutil.disk_usage(SHARED_MEMORY).free
    capacity = USABLE_FRACTION * free_bytes / (bytes_per_image * num_ranks)  # images per rank
    if prefetch_factor * num_workers * chunk_size + num_images_held <= capacity:
        return Transfer(chunk_size, prefetch_factor)
    min_chunks = MIN_PREFETCH_FACTOR * num_workers + 1  # all prefetched chunks and the one in use
    if capacity < min_chunks:
        raise ValueError(
            f"data.num_workers: {num_workers} workers for each of {num_ranks} ranks on this "
            f"machine have at least {num_ranks * min_chunks} images of "
            f"{bytes_per_image / 2**20:.2f} MiB in flight, and {SHARED_MEMORY} has "
            f"{free_bytes / 2**20:.1f} MiB free; {SHARED_MEMORY_REMEDY}"
        )
    smaller_size = min(chunk_size, int(capacity / min_chunks))
    note = (
        f"data.num_workers: {SHARED_MEMORY} has {free_bytes / 2**20:.0f} MiB free, so workers send "
        f"{smaller_size} images at a time instead of {chunk_size}, which is slower; "
        f"{SHARED_MEMORY_REMEDY}"
    )
    return Transfer(smaller_size, copies_chunks=True, note=note)
