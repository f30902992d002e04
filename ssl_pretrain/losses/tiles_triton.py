"""Launch two fused CUDA kernels for the sums of `tiles`, which never store the matrix of logits.

A tile of logits stays in registers. The forward pass is an online log-sum-exp over tiles of
candidates, and the backward pass recomputes each tile. Few anchors with many candidates would leave
most of a GPU idle, so several programs share the candidates of an anchor and their results are
combined afterwards. Outputs are float32.
"""

import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from ssl_pretrain.losses.half_precision import HALF_DTYPES, ScaledRows
from ssl_pretrain.losses.tile_kernels_triton import log_sum_exp_kernel, weighted_sum_kernel

__all__ = ["OutOfResources", "disable_kernels", "log_sum_exp", "supports", "weighted_sum"]

MAX_DIM = 256  # largest embedding dimension whose blocks fit into shared memory
_NUM_PROGRAMS = 264  # target number of programs, twice the multiprocessors of an H100
_NO_OFFSET = 2**30  # an offset that excludes no pair


class Blocks(NamedTuple):
    """Block sizes with which a kernel is compiled."""

    rows: int  # anchors per program
    columns: int  # candidates per iteration of its loop
    num_warps: int  # groups of 32 threads per program
    num_stages: int  # iterations whose loads overlap


# Block sizes by the bytes of shared memory that one program may use, then by padded dimension.
# They were chosen for few spilled registers, in particular those of float32 kernels, which need the
# most. tests/losses/test_tiles_compile.py compiles each entry for an architecture with that limit.
_BLOCKS: dict[int, dict[int, Blocks]] = {
    232_448: {
        64: Blocks(64, 64, 4, 3),
        128: Blocks(128, 32, 8, 2),
        256: Blocks(64, 32, 4, 1),
    },  # sm_90
    166_912: {
        64: Blocks(64, 32, 4, 2),
        128: Blocks(64, 32, 4, 2),
        256: Blocks(16, 32, 4, 2),
    },  # sm_80
    101_376: {
        64: Blocks(32, 32, 4, 2),
        128: Blocks(32, 32, 4, 2),
        256: Blocks(16, 16, 4, 2),
    },  # sm_86, sm_89
}
_disabled_devices: set[torch.device] = set()  # devices whose limits a launch exceeded


def supports(anchors: Tensor) -> bool:
    """Return True if the kernels support these embeddings, shape (num_anchors, dim)."""
    return (
        anchors.dtype in (torch.float32, *HALF_DTYPES)
        and anchors.shape[1] <= MAX_DIM
        and anchors.device not in _disabled_devices
    )


def choose_blocks(padded_dim: int, shared_memory_bytes: int) -> Blocks:
    """Return the block sizes for embeddings padded to `padded_dim` dimensions.

    Args:
        padded_dim: Power of two from 16 to `MAX_DIM`.
        shared_memory_bytes: Bytes of shared memory that one program may use on the device.
    """
    limit = next((limit for limit in _BLOCKS if limit <= shared_memory_bytes), min(_BLOCKS))
    return next(blocks for dim, blocks in _BLOCKS[limit].items() if padded_dim <= dim)


def disable_kernels(device: torch.device, error: Exception) -> None:
    """Print a warning and use the plain tiles on this device from now on.

    Args:
        device: The CUDA device on which a launch failed.
        error: The error of the launch, which the warning quotes.
    """
    _disabled_devices.add(device)
    warnings.warn(
        f"the fused loss kernels do not fit {torch.cuda.get_device_name(device)} ({error}); the "
        "loss is computed by plain tiles, with the same result but slower",
        stacklevel=2,
    )


def log_sum_exp(
    anchors: ScaledRows, candidates: ScaledRows, local_start: int, excluded_offsets: Sequence[int]
) -> Tensor:
    """Return log sum_j exp(anchors[i] @ candidates[j]) for each anchor i.

    Args:
        anchors: Embeddings of this rank, divided by the temperature, shape (num_anchors, dim).
        candidates: Embeddings of all ranks, shape (num_candidates, dim).
        local_start: Index of this rank's first candidate. The rank has as many candidates as
            anchors.
        excluded_offsets: Up to three offsets d. The pair (i, local_start + i + d) is excluded if
            that candidate belongs to this rank.

    Returns:
        float32 tensor of shape (num_anchors,).
    """
    grid, sizes, constants = _plan_launch(anchors.rows, candidates.rows)
    num_anchors = sizes[0]
    partial_results = anchors.rows.new_empty(grid[1], num_anchors, dtype=torch.float32)
    pairs = local_start, num_anchors, *_offsets(excluded_offsets), False
    inputs = _pointers(anchors, candidates)
    log_sum_exp_kernel[grid](*inputs, partial_results, *sizes, *pairs, **constants)
    return partial_results[0] if grid[1] == 1 else torch.logsumexp(partial_results, dim=0)


def weighted_sum(
    anchors: ScaledRows,
    candidates: ScaledRows,
    *,
    local_start: int,
    excluded_offsets: Sequence[int],
    anchor_terms: tuple[Tensor, Tensor] | None = None,
    candidate_terms: tuple[Tensor, Tensor] | None = None,
    swapped: bool = False,
) -> Tensor:
    """Return sum_j weight_ij * candidates[j] for each anchor i. Excluded pairs have no weight.

    With s_ij = anchors[i] @ candidates[j],
    weight_ij = gradient_i exp(s_ij - lse_i) + gradient_j exp(s_ij - lse_j).
    The first term needs `anchor_terms`, the second `candidate_terms`.

    Args:
        anchors: Shape (num_anchors, dim).
        candidates: Shape (num_candidates, dim).
        local_start: As in `log_sum_exp`.
        excluded_offsets: As in `log_sum_exp`.
        anchor_terms: (lse, gradient) of the anchors, each of shape (num_anchors,).
        candidate_terms: (lse, gradient) of the candidates, each of shape (num_candidates,).
        swapped: True if `anchors` are the candidates of `log_sum_exp` and `candidates` are its
            anchors. `local_start` and `excluded_offsets` keep their meaning.

    Returns:
        float32 tensor of shape (num_anchors, dim).
    """
    assert anchor_terms is not None or candidate_terms is not None, (
        "anchor_terms or candidate_terms must be given"
    )
    grid, sizes, constants = _plan_launch(anchors.rows, candidates.rows)
    num_anchors, num_candidates, _ = sizes
    inputs = _pointers(anchors, candidates)
    partial_results = inputs[0].new_empty(grid[1], *anchors.rows.shape, dtype=torch.float32)
    placeholders = inputs[:2]  # the kernel needs pointers, but does not read them
    row_terms = [tensor.contiguous() for tensor in anchor_terms or placeholders]
    column_terms = [tensor.contiguous() for tensor in candidate_terms or placeholders]
    num_local = num_candidates if swapped else num_anchors
    pairs = local_start, num_local, *_offsets(excluded_offsets), swapped
    constants |= {
        "HAS_ROW_TERMS": anchor_terms is not None,
        "HAS_COLUMN_TERMS": candidate_terms is not None,
    }
    weighted_sum_kernel[grid](
        *inputs, partial_results, *row_terms, *column_terms, *sizes, *pairs, **constants
    )
    return partial_results[0] if grid[1] == 1 else partial_results.sum(0)


def _pointers(*sides: ScaledRows) -> list[Tensor]:
    """Return the rows of both sides and then their factors, as the kernels take them."""
    rows = [side.rows.contiguous() for side in sides]
    # Without factors, the kernels need pointers to them, but do not read them.
    return rows + [rows[0] if side.factors is None else side.factors for side in sides]


def _plan_launch(
    anchors: Tensor, candidates: Tensor
) -> tuple[tuple[int, int], tuple[int, int, int], dict[str, Any]]:
    """Divide the pairs among programs.

    Returns:
        The grid: the number of anchor blocks and the number of programs that share the candidates.
        The sizes: the numbers of anchors, of candidates and of candidates per program. The
        constants with which the kernels are compiled.
    """
    padded_dim = max(16, triton.next_power_of_2(anchors.shape[1]))
    blocks = choose_blocks(padded_dim, _shared_memory(anchors.device))
    num_row_blocks = triton.cdiv(len(anchors), blocks.rows)
    num_column_blocks = triton.cdiv(len(candidates), blocks.columns)
    num_splits = max(1, min(_NUM_PROGRAMS // num_row_blocks, num_column_blocks))
    candidates_per_split = triton.cdiv(num_column_blocks, num_splits) * blocks.columns
    tensor_cores = anchors.is_cuda and torch.cuda.get_device_capability(anchors.device) >= (8, 0)
    constants = {
        "DIM": anchors.shape[1],
        "PADDED_DIM": padded_dim,
        "ROWS": blocks.rows,
        "COLUMNS": blocks.columns,
        "PRECISION": "tf32x3" if tensor_cores else "ieee",
        "HAS_FACTORS": anchors.dtype in HALF_DTYPES,
        "num_warps": blocks.num_warps,
        "num_stages": blocks.num_stages,
    }
    grid = num_row_blocks, triton.cdiv(len(candidates), candidates_per_split)
    return grid, (len(anchors), len(candidates), candidates_per_split), constants


@lru_cache(maxsize=16)
def _shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that a program may use.

    Triton's interpreter has no limit and uses the blocks of sm_90.
    """
    if device.type != "cuda":
        return max(_BLOCKS)
    index = torch.cuda.current_device() if device.index is None else device.index
    properties = triton.runtime.driver.active.utils.get_device_properties(index)
    return int(properties["max_shared_mem"])


def _offsets(excluded_offsets: Sequence[int]) -> tuple[int, int, int]:
    """Return exactly three offsets for the kernels. The added ones exclude no pair."""
    num_offsets = len(excluded_offsets)
    assert num_offsets <= 3, f"the kernels take at most three offsets, got {num_offsets}"
    first, second, third = (*excluded_offsets, *[_NO_OFFSET] * (3 - num_offsets))
    return first, second, third
