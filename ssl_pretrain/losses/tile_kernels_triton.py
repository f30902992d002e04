"""Triton kernels of `tiles_triton`: a log-sum-exp and a weighted sum over tiles of candidates.

Tensor cores compute each product of float32 numbers from three TF32 products, with about the
precision of float32. Products of float16 or bfloat16 numbers are exact in float32 and need one. The
float32 weights of the backward pass are each the exact sum of three bfloat16 numbers.
"""

import triton
import triton.language as tl


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
def log_sum_exp_kernel(
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
def weighted_sum_kernel(
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
