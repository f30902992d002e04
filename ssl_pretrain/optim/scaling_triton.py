"""CUDA kernel that scales many tensors, each by its own factor, in one launch.

A table on the device lists chunks of the tensors by their addresses. One program scales one chunk.
"""

from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 4096  # elements per program
_ALIGNMENT = 16  # bytes of the widest load
# Columns of the table: address, address of the addend, length, index of the tensor.
_NUM_COLUMNS = tl.constexpr(4)


def scale(tensors: list[Tensor], factors: Tensor) -> None:
    """Multiply each tensor in place by its factor. See `scaling.scale`."""
    # The kernel takes pointers to addends and their factors, but does not read them.
    _launch(tensors, tensors, factors, factors, has_addend=False)


def add_and_scale(
    tensors: list[Tensor], others: list[Tensor], other_factors: Tensor, factors: Tensor
) -> None:
    """Set each tensor to (tensor + other_factor * other) * factor. See `scaling`."""
    _launch(tensors, others, other_factors, factors, has_addend=True)


def _launch(
    tensors: list[Tensor],
    others: list[Tensor],
    other_factors: Tensor,
    factors: Tensor,
    has_addend: bool,
) -> None:
    addresses = tuple(tensor.data_ptr() for tensor in tensors)
    other_addresses = tuple(tensor.data_ptr() for tensor in others)
    sizes = tuple(tensor.numel() for tensor in tensors)
    # Tensors without memory all have address 0, so a cached table could be one of other tensors.
    build = build_table if all(addresses) else build_table.__wrapped__
    table = build(addresses, other_addresses, sizes, factors.device)
    if len(table):
        _scale[(len(table),)](
            table,
            factors.contiguous(),
            other_factors.contiguous(),
            HAS_ADDEND=has_addend,
            IS_ALIGNED=not any(value % _ALIGNMENT for value in (*addresses, *other_addresses)),
            CHUNK=CHUNK,
            num_warps=8,
        )


@lru_cache(maxsize=8)  # torch's allocator returns the same addresses in most steps
def build_table(
    addresses: tuple[int, ...],
    other_addresses: tuple[int, ...],
    sizes: tuple[int, ...],
    device: torch.device,
) -> Tensor:
    """Return the chunks of all tensors as an int64 table (num_chunks, 4) on the device.

    Args:
        addresses: Addresses of the tensors' first elements.
        other_addresses: Addresses of the addends' first elements.
        sizes: Numbers of elements.
        device: Device of the tensors.
    """
    counts = np.array([-(-size // CHUNK) for size in sizes], dtype=np.int64)
    tensor_indices = np.repeat(np.arange(len(sizes)), counts)
    first_chunk = np.cumsum(counts) - counts  # first row of each tensor in the table
    starts = (np.arange(len(tensor_indices)) - first_chunk[tensor_indices]) * CHUNK
    lengths = np.minimum(np.array(sizes, dtype=np.int64)[tensor_indices] - starts, CHUNK)
    byte_offsets = torch.float32.itemsize * starts
    columns = (
        np.array(addresses, dtype=np.int64)[tensor_indices] + byte_offsets,
        np.array(other_addresses, dtype=np.int64)[tensor_indices] + byte_offsets,
        lengths,
        tensor_indices,
    )
    table = torch.from_numpy(np.stack(columns, axis=1))
    # A copy from pinned memory does not block the host.
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


@triton.jit
def _scale(
    table,
    factors,
    other_factors,
    HAS_ADDEND: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = table + tl.program_id(0) * _NUM_COLUMNS
    pointer = tl.load(row).to(tl.pointer_type(tl.float32))
    other_pointer = tl.load(row + 1).to(tl.pointer_type(tl.float32))
    length = tl.load(row + 2).to(tl.int32)
    tensor = tl.load(row + 3)
    if IS_ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
        other_pointer = tl.multiple_of(other_pointer, 16)
    factor = tl.load(factors + tensor)
    offsets = tl.arange(0, CHUNK)
    if length == CHUNK:  # without a mask, loads are wider
        values = tl.load(pointer + offsets)
        if HAS_ADDEND:
            values += tl.load(other_factors + tensor) * tl.load(other_pointer + offsets)
        tl.store(pointer + offsets, values * factor)
    else:
        mask = offsets < length
        values = tl.load(pointer + offsets, mask=mask)
        if HAS_ADDEND:
            values += tl.load(other_factors + tensor) * tl.load(other_pointer + offsets, mask=mask)
        tl.store(pointer + offsets, values * factor, mask=mask)
