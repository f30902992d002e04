"""The sums of `tiles` as two fused kernels for CUDA: a tile of logits lives in registers, and none is ever written.

Forward is an online log-sum-exp over tiles of candidates; backward computes each tile again. Few anchors against many
candidates would leave most of a GPU idle, so the candidates are split among programs whose results are combined after.
float32 in and out, products as three TF32 ones (about float32's precision) on tensor cores that have them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_DIM = 256  # of an embedding: a block of them has to fit into shared memory
_ROWS = 64  # of a block
_PROGRAMS = 264  # twice the multiprocessors of an H100
_NEVER = 2**30  # an offset that excludes nothing


def fits(anchors: Tensor) -> bool:
    return anchors.dtype == torch.float32 and anchors.shape[1] <= MAX_DIM


def log_sum_exp(anchors: Tensor, candidates: Tensor, own: int, excluded: Sequence[int]) -> Tensor:
    """log sum_j exp(anchors[i] @ candidates[j]), (num_anchors,).

    Without the pairs (i, own + i + d) for d in `excluded`, three at most; the candidates from `own` on, as many as anchors, are
    this rank's, and only they are excluded.
    """
    anchors, candidates = anchors.contiguous(), candidates.contiguous()
    width, splits, per_split = _split(anchors, candidates)
    parts = anchors.new_empty(splits, len(anchors))
    grid = (triton.cdiv(len(anchors), _ROWS), splits)
    _log_sum_exp[grid](
        anchors, candidates, parts, len(anchors), len(candidates), per_split, own, len(anchors), *_offsets(excluded), False,
        DIM=anchors.shape[1], PADDED=_padded(anchors), ROWS=_ROWS, COLUMNS=width, PRECISION=_precision(anchors),
    )  # fmt: skip
    return parts[0] if splits == 1 else torch.logsumexp(parts, dim=0)


def weighted_sum(
    anchors: Tensor, candidates: Tensor, *, own: int, excluded: Sequence[int],
    of_anchors: tuple[Tensor, Tensor] | None = None, of_candidates: tuple[Tensor, Tensor] | None = None, swapped: bool = False,
) -> Tensor:  # fmt: skip
    """sum_j weight_ij * candidates[j], (num_anchors, dim), in which an excluded pair has no weight.

    swapped: what is called anchors here are candidates, and `own` and `excluded` are of the pairs seen from the other side.

    weight_ij = gradient_i exp(s_ij - lse_i), of `of_anchors` = (lse, gradient), plus gradient_j exp(s_ij - lse_j), of `of_candidates`.
    """
    assert of_anchors is not None or of_candidates is not None, "something has to weigh"
    anchors, candidates = anchors.contiguous(), candidates.contiguous()
    width, splits, per_split = _split(anchors, candidates)
    parts = anchors.new_empty(splits, *anchors.shape)
    rows = tuple(x.contiguous() for x in of_anchors) if of_anchors else (anchors, anchors)  # never read
    columns = tuple(x.contiguous() for x in of_candidates) if of_candidates else (anchors, anchors)
    grid = (triton.cdiv(len(anchors), _ROWS), splits)
    _weighted_sum[grid](
        anchors, candidates, parts, *rows, *columns, len(anchors), len(candidates), per_split,
        own, len(candidates if swapped else anchors), *_offsets(excluded), swapped,
        DIM=anchors.shape[1], PADDED=_padded(anchors), ROWS=_ROWS, COLUMNS=width, PRECISION=_precision(anchors),
        BY_ROW=of_anchors is not None, BY_COLUMN=of_candidates is not None,
    )  # fmt: skip
    return parts[0] if splits == 1 else parts.sum(0)


def _split(anchors: Tensor, candidates: Tensor) -> tuple[int, int, int]:
    """Columns of a block; into how many parts the candidates are split, and how many of them each has."""
    width = 64 if _padded(anchors) <= 128 else 32
    blocks = triton.cdiv(len(candidates), width)
    wanted = max(1, min(_PROGRAMS // triton.cdiv(len(anchors), _ROWS), blocks))
    per_split = triton.cdiv(blocks, wanted) * width
    return width, triton.cdiv(len(candidates), per_split), per_split


def _padded(anchors: Tensor) -> int:
    return max(16, triton.next_power_of_2(anchors.shape[1]))


def _offsets(excluded: Sequence[int]) -> tuple[int, int, int]:
    assert len(excluded) <= 3, "the kernels know three offsets"
    first, second, third = (*excluded, *[_NEVER] * (3 - len(excluded)))
    return first, second, third


def _precision(anchors: Tensor) -> str:
    tensor_cores = anchors.is_cuda and torch.cuda.get_device_capability(anchors.device) >= (8, 0)
    return "tf32x3" if tensor_cores else "ieee"


@triton.jit
def _counts(row, column, own, num_own, first, second, third, SWAPPED: tl.constexpr):
    """Whether a pair counts: anchor i and one of this rank's `num_own` candidates, own + i + d, do not for the three d."""
    if SWAPPED:
        anchor, candidate = column, row - own
    else:
        anchor, candidate = row, column - own
    away = candidate - anchor
    return (candidate < 0) | (candidate >= num_own) | ((away != first) & (away != second) & (away != third))


@triton.jit
def _vectors(pointer, rows, count, DIM: tl.constexpr, PADDED: tl.constexpr):
    """Rows of a (count, DIM) matrix, with zeros where there is none and up to PADDED."""
    at = tl.arange(0, PADDED)
    return tl.load(pointer + rows[:, None] * DIM + at[None, :], mask=(rows < count)[:, None] & (at < DIM)[None, :], other=0.0)


@triton.jit
def _tile(
    a, rows, candidates, columns, num_candidates, own, num_own, first, second, third, SWAPPED: tl.constexpr,
    DIM: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(candidates of a tile, its logits): minus infinity where a pair does not count."""
    c = _vectors(candidates, columns, num_candidates, DIM, PADDED)
    logits = tl.dot(a, tl.trans(c), input_precision=PRECISION)
    counts = (columns < num_candidates)[None, :] & _counts(rows[:, None], columns[None, :], own, num_own, first, second, third, SWAPPED)
    return c, tl.where(counts, logits, float("-inf"))


@triton.jit
def _log_sum_exp(
    anchors, candidates, parts, num_anchors, num_candidates, per_split, own, num_own, first, second, third, SWAPPED: tl.constexpr,
    DIM: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    a = _vectors(anchors, rows, num_anchors, DIM, PADDED)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    begin = tl.program_id(1) * per_split
    for start in range(begin, tl.minimum(begin + per_split, num_candidates), COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        _, logits = _tile(
            a, rows, candidates, columns, num_candidates, own, num_own, first, second, third, SWAPPED, DIM, PADDED, PRECISION
        )
        now = tl.maximum(largest, tl.max(logits, axis=1))
        shift = tl.where(now == float("-inf"), 0.0, now)  # a row whose tiles so far are all excluded
        total = total * tl.exp(largest - shift) + tl.sum(tl.exp(logits - shift[:, None]), axis=1)
        largest = now
    tl.store(parts + tl.program_id(1) * num_anchors + rows, largest + tl.log(total), mask=rows < num_anchors)


@triton.jit
def _weighted_sum(
    anchors, candidates, parts, row_lse, row_gradient, column_lse, column_gradient,
    num_anchors, num_candidates, per_split, own, num_own, first, second, third, SWAPPED: tl.constexpr,
    DIM: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
    BY_ROW: tl.constexpr, BY_COLUMN: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    a = _vectors(anchors, rows, num_anchors, DIM, PADDED)
    if BY_ROW:
        lse_of_row = tl.load(row_lse + rows, mask=rows < num_anchors, other=0.0)
        gradient_of_row = tl.load(row_gradient + rows, mask=rows < num_anchors, other=0.0)
    total = tl.zeros([ROWS, PADDED], tl.float32)
    begin = tl.program_id(1) * per_split
    for start in range(begin, tl.minimum(begin + per_split, num_candidates), COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        c, logits = _tile(
            a, rows, candidates, columns, num_candidates, own, num_own, first, second, third, SWAPPED, DIM, PADDED, PRECISION
        )
        weights = tl.zeros([ROWS, COLUMNS], tl.float32)
        if BY_ROW:
            weights += tl.exp(logits - lse_of_row[:, None]) * gradient_of_row[:, None]
        if BY_COLUMN:
            lse = tl.load(column_lse + columns, mask=columns < num_candidates, other=0.0)
            gradient = tl.load(column_gradient + columns, mask=columns < num_candidates, other=0.0)
            weights += tl.exp(logits - lse[None, :]) * gradient[None, :]
        total += tl.dot(weights, c, input_precision=PRECISION)
    at = tl.arange(0, PADDED)
    to = parts + tl.program_id(1) * num_anchors * DIM + rows[:, None] * DIM + at[None, :]
    tl.store(to, total, mask=(rows < num_anchors)[:, None] & (at < DIM)[None, :])
