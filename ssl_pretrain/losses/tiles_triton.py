"""Two fused CUDA kernels for the sums of `tiles`, which never store the matrix of logits.

A tile of logits stays in registers. The forward pass is an online log-sum-exp over tiles of
candidates, and the backward pass recomputes each tile. Few anchors with many candidates would leave
most of a GPU idle, so several programs share the candidates of an anchor and their results are
combined afterwards. Outputs are float32.

Tensor cores compute each product of float32 numbers from three TF32 products, with about the
precision of float32. Products of float16 or bfloat16 numbers are exact in float32 and need one. Of
the backward pass's weights, which are float32, each is the exact sum of three bfloat16 numbers.
"""

import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

from ssl_pretrain.losses.half_precision import HALF_DTYPES, ScaledRows

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
    _log_sum_exp[grid](*inputs, partial_results, *sizes, *pairs, **constants)
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
    _weighted_sum[grid](
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


@triton.jit
def _is_included(
    row,
    column,
    local_start,
    num_local,
    first_offset,
    second_offset,
    third_offset,
    SWAPPED: tl.constexpr,
):
    """Return a mask that is False for excluded pairs.

    The pair of anchor i and candidate local_start + i + d is excluded if d is an excluded offset
    and the candidate is one of the `num_local` candidates of this rank.
    """
    if SWAPPED:
        anchor, candidate = column, row - local_start
    else:
        anchor, candidate = row, column - local_start
    offset = candidate - anchor
    return (
        (candidate < 0)
        | (candidate >= num_local)
        | ((offset != first_offset) & (offset != second_offset) & (offset != third_offset))
    )


@triton.jit
def _load_rows(pointer, rows, count, DIM: tl.constexpr, PADDED_DIM: tl.constexpr):
    """Load rows of a (count, DIM) matrix and pad them to PADDED_DIM columns.

    Rows and columns beyond the matrix are 0.
    """
    dims = tl.arange(0, PADDED_DIM)
    return tl.load(
        pointer + rows[:, None] * DIM + dims[None, :],
        mask=(rows < count)[:, None] & (dims < DIM)[None, :],
        other=0.0,
    )


@triton.jit
def _load_factors(pointer, rows, count, HAS_FACTORS: tl.constexpr):
    """Load the factors of rows. Without factors, they are 1."""
    if HAS_FACTORS:
        return tl.load(pointer + rows, mask=rows < count, other=0.0)
    else:
        return tl.full(rows.shape, 1.0, tl.float32)


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    """Return the matrix product of two tiles of one dtype in float32.

    Without tensor cores, and in Triton's interpreter, there is no product of bfloat16 tiles.
    """
    if PRECISION == "ieee":
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _leading_bfloat16(x):
    """Return float32 numbers with all but the 8 leading bits of their significands set to 0."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _weighted_rows(weights, tile, PRECISION: tl.constexpr):
    """Return the matrix product of float32 weights and a tile of any dtype, in float32."""
    if tile.dtype == tl.bfloat16:
        high = _leading_bfloat16(weights)
        middle = _leading_bfloat16(weights - high)
        low = weights - high - middle  # its significand has the last 8 of the weight's 24 bits
        total = _dot(low.to(tl.bfloat16), tile, PRECISION)
        total += _dot(middle.to(tl.bfloat16), tile, PRECISION)
        total += _dot(high.to(tl.bfloat16), tile, PRECISION)
        return total
    else:  # small weights would underflow in float16
        return _dot(weights, tile.to(tl.float32), PRECISION)


@triton.jit
def _tile(
    anchor_tile,
    anchor_scale,
    rows,
    candidates,
    candidate_factors,
    columns,
    num_candidates,
    local_start,
    num_local,
    first_offset,
    second_offset,
    third_offset,
    SWAPPED: tl.constexpr,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
):
    """Return the candidates of a tile, their factors, and logits: -inf for excluded pairs."""
    candidate_tile = _load_rows(candidates, columns, num_candidates, DIM, PADDED_DIM)
    candidate_scale = _load_factors(candidate_factors, columns, num_candidates, HAS_FACTORS)
    logits = _dot(anchor_tile, tl.trans(candidate_tile), PRECISION)
    logits = logits * anchor_scale[:, None] * candidate_scale[None, :]
    is_included = (columns < num_candidates)[None, :] & _is_included(
        rows[:, None],
        columns[None, :],
        local_start,
        num_local,
        first_offset,
        second_offset,
        third_offset,
        SWAPPED,
    )
    return candidate_tile, candidate_scale, tl.where(is_included, logits, float("-inf"))


@triton.jit
def _log_sum_exp(
    anchors,
    candidates,
    anchor_factors,
    candidate_factors,
    results,
    num_anchors,
    num_candidates,
    candidates_per_split,
    local_start,
    num_local,
    first_offset,
    second_offset,
    third_offset,
    SWAPPED: tl.constexpr,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
):
    """Store the log-sum-exp of ROWS anchors over this program's share of the candidates."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    anchor_tile = _load_rows(anchors, rows, num_anchors, DIM, PADDED_DIM)
    anchor_scale = _load_factors(anchor_factors, rows, num_anchors, HAS_FACTORS)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    begin = tl.program_id(1) * candidates_per_split
    for start in range(begin, tl.minimum(begin + candidates_per_split, num_candidates), COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        _, _, logits = _tile(
            anchor_tile,
            anchor_scale,
            rows,
            candidates,
            candidate_factors,
            columns,
            num_candidates,
            local_start,
            num_local,
            first_offset,
            second_offset,
            third_offset,
            SWAPPED,
            DIM,
            PADDED_DIM,
            PRECISION,
            HAS_FACTORS,
        )
        new_largest = tl.maximum(largest, tl.max(logits, axis=1))
        # The maximum is -inf as long as all pairs of a row are excluded.
        shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        total = total * tl.exp(largest - shift) + tl.sum(tl.exp(logits - shift[:, None]), axis=1)
        largest = new_largest
    tl.store(
        results + tl.program_id(1) * num_anchors + rows,
        largest + tl.log(total),
        mask=rows < num_anchors,
    )


@triton.jit
def _weighted_sum(
    anchors,
    candidates,
    anchor_factors,
    candidate_factors,
    results,
    row_lse,
    row_gradient,
    column_lse,
    column_gradient,
    num_anchors,
    num_candidates,
    candidates_per_split,
    local_start,
    num_local,
    first_offset,
    second_offset,
    third_offset,
    SWAPPED: tl.constexpr,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    HAS_ROW_TERMS: tl.constexpr,
    HAS_COLUMN_TERMS: tl.constexpr,
):
    """Store the weighted sums of ROWS anchors over this program's share of the candidates."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    anchor_tile = _load_rows(anchors, rows, num_anchors, DIM, PADDED_DIM)
    anchor_scale = _load_factors(anchor_factors, rows, num_anchors, HAS_FACTORS)
    if HAS_ROW_TERMS:
        lse_of_row = tl.load(row_lse + rows, mask=rows < num_anchors, other=0.0)
        gradient_of_row = tl.load(row_gradient + rows, mask=rows < num_anchors, other=0.0)
    total = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    begin = tl.program_id(1) * candidates_per_split
    for start in range(begin, tl.minimum(begin + candidates_per_split, num_candidates), COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        candidate_tile, candidate_scale, logits = _tile(
            anchor_tile,
            anchor_scale,
            rows,
            candidates,
            candidate_factors,
            columns,
            num_candidates,
            local_start,
            num_local,
            first_offset,
            second_offset,
            third_offset,
            SWAPPED,
            DIM,
            PADDED_DIM,
            PRECISION,
            HAS_FACTORS,
        )
        weights = tl.zeros([ROWS, COLUMNS], tl.float32)
        if HAS_ROW_TERMS:
            weights += tl.exp(logits - lse_of_row[:, None]) * gradient_of_row[:, None]
        if HAS_COLUMN_TERMS:
            lse = tl.load(column_lse + columns, mask=columns < num_candidates, other=0.0)
            gradient = tl.load(column_gradient + columns, mask=columns < num_candidates, other=0.0)
            weights += tl.exp(logits - lse[None, :]) * gradient[None, :]
        weights *= candidate_scale[None, :]
        total += _weighted_rows(weights, candidate_tile, PRECISION)
    dims = tl.arange(0, PADDED_DIM)
    origin = results + tl.program_id(1) * num_anchors * DIM
    pointers = origin + rows[:, None] * DIM + dims[None, :]
    tl.store(pointers, total, mask=(rows < num_anchors)[:, None] & (dims < DIM)[None, :])
