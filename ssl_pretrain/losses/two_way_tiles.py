"""Log-sum-exps of the logits between two kinds of embeddings, over the rows and over the columns.

Rows are the anchors of this rank and columns are the candidates of all ranks. A plain tile of
logits serves both directions, and is computed once more in the backward pass. The fused kernels
make one pass per direction. Only the candidates are gathered. The sums of a column over the anchors
of all ranks are added up across ranks.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.losses.backend import Backend, backend_for
from ssl_pretrain.losses.half_precision import HALF_DTYPES, ScaledRows
from ssl_pretrain.losses.logit_tiles import iterate_scaled_logits
from ssl_pretrain.losses.running_sums import LARGEST_SAFE_LOGIT, RunningSums
from ssl_pretrain.losses.similarity import (
    inverse_lengths,
    normalization_gradient,
    row_products,
    upcast,
)

Terms = tuple[Tensor, Tensor]  # log-sum-exps and their gradients


def two_way_log_sum_exp(
    anchors: Tensor,
    candidates: Tensor,
    scale: Tensor,
    *,
    logit_bound: float = float("inf"),
    half: tuple[Tensor, Tensor] | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log sum_j exp(l_ij) per anchor i, log sum_i exp(l_ij) per candidate j, and l_ii.

    The logit l_ij is scale_i times the cosine similarity of anchor i and candidate j. The sums are
    over all ranks, and gradients flow to the embeddings and scales of all ranks.

    Args:
        anchors: Embeddings of this rank in float32 or float64, shape (local_batch, dim). Normalized
            inside.
        candidates: Embeddings of this rank, same shape. Row i matches ``anchors[i]``.
        scale: Factors of the similarities, shape (local_batch,).
        logit_bound: Largest absolute value of a logit. A small bound makes subtracting maxima
            unnecessary.
        half: `anchors` and `candidates` in half precision, if they were converted from it. Ranks
            send the latter, and the fused kernels read both.
        backend: Implementation of the sums. The default suits the device.

    Returns:
        Three tensors of shape (local_batch,).
    """
    backend = backend or backend_for(anchors)
    read, sent = half or (anchors.detach(), candidates.detach())
    exp_is_safe = logit_bound <= LARGEST_SAFE_LOGIT
    with torch.autocast(anchors.device.type, enabled=False):
        return _TwoWayLogSumExp.apply(anchors, candidates, scale, read, sent, exp_is_safe, backend)


class _TwoWayLogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchors: Tensor,
        candidates: Tensor,
        scale: Tensor,
        read: Tensor,
        sent: Tensor,
        exp_is_safe: bool,
        backend: Backend,
    ) -> tuple[Tensor, Tensor, Tensor]:
        all_sent = collectives.gather(sent)
        rows = ScaledRows(read, scale * inverse_lengths(read))
        columns = ScaledRows(all_sent, inverse_lengths(all_sent))
        results = backend.run_fused(read, partial(_fused_log_sum_exp, rows, columns))
        row_lse, partial_lse = results or _tiled_log_sum_exp(rows, columns, exp_is_safe, backend)
        column_lse = _log_add_over_ranks(partial_lse)
        ctx.save_for_backward(anchors, candidates, scale, read, all_sent, row_lse, column_lse)
        ctx.arguments = exp_is_safe, backend
        cosines = row_products(anchors, candidates)
        cosines *= inverse_lengths(anchors) * inverse_lengths(candidates)
        return row_lse, _local_rows(column_lse, len(read)).clone(), scale * cosines

    @staticmethod
    def backward(ctx: Any, row_grad: Tensor, column_grad: Tensor, match_grad: Tensor) -> Any:
        anchors, candidates, scale, read, all_sent, row_lse, column_lse = ctx.saved_tensors
        needs_gradients = (
            ctx.needs_input_grad[0] or ctx.needs_input_grad[2],
            ctx.needs_input_grad[1],
        )
        exp_is_safe, backend = ctx.arguments
        with torch.autocast(anchors.device.type, enabled=False):
            arguments = (
                needs_gradients,
                ScaledRows(read, scale * inverse_lengths(read)),
                ScaledRows(all_sent, inverse_lengths(all_sent)),
                (row_lse, row_grad),
                (column_lse, collectives.gather(column_grad)),
            )
            anchors_grad, candidates_grad = backend.run_fused(
                read, partial(_fused_gradients, *arguments)
            ) or _tiled_gradients(*arguments, exp_is_safe, backend)
            if candidates_grad is not None and process_group.world_size() > 1:
                candidates_grad = collectives.reduce_scatter(candidates_grad)
            one = torch.ones_like(scale)
            anchors_grad, scale_grad = _embedding_gradients(
                anchors, scale, candidates, one, match_grad, anchors_grad
            )
            candidates_grad, _ = _embedding_gradients(
                candidates, one, anchors, scale, match_grad, candidates_grad
            )
        return anchors_grad, candidates_grad, scale_grad, None, None, None, None


def _embedding_gradients(
    z: Tensor,
    scale: Tensor,
    matches: Tensor,
    match_scale: Tensor,
    match_grad: Tensor,
    grad: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of embeddings before normalization, and of their scale.

    Args:
        z: Embeddings of this rank, shape (local_batch, dim).
        scale: Factors of the normalized embeddings, shape (local_batch,).
        matches: Embeddings that match those of `z`, same shape.
        match_scale: Factors of the normalized matches, shape (local_batch,).
        match_grad: Gradient of the logits between `z` and its matches, shape (local_batch,).
        grad: Gradient of the log-sum-exps with respect to the normalized and scaled embeddings,
            which is overwritten. None if it is not needed.
    """
    if grad is None:
        return None, None
    grad.addcmul_(matches, (match_grad * match_scale * inverse_lengths(matches))[:, None])
    return normalization_gradient(z, scale, grad)


def _local_rows(gathered: Tensor, num_rows: int) -> Tensor:
    """Return this rank's rows of a tensor with those of all ranks."""
    return gathered[process_group.rank() * num_rows :][:num_rows]


def _log_add_over_ranks(partial_lse: Tensor) -> Tensor:
    """Return the logarithm of the sum of exp(partial_lse) over the ranks."""
    if process_group.world_size() == 1:
        return partial_lse
    maximum = collectives.reduce_max(partial_lse)
    return maximum + collectives.reduce_sum(torch.exp(partial_lse - maximum)).log()


def _tiled_log_sum_exp(
    anchors: ScaledRows, candidates: ScaledRows, exp_is_safe: bool, backend: Backend
) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exp of each anchor, and of each candidate over this rank's anchors."""
    like = upcast(anchors.rows[:0])
    rows, columns = (
        RunningSums(len(side.rows), like, exp_is_safe) for side in (anchors, candidates)
    )
    for tile in iterate_scaled_logits(anchors, candidates, backend):
        if exp_is_safe:
            rows.add(tile.rows, tile.logits)  # leaves exp(logits), which both directions need
            columns.sum[tile.columns] += tile.logits.sum(0)
        else:
            columns.add(tile.columns, tile.logits.clone().T)
            rows.add(tile.rows, tile.logits)
    return rows.log(), columns.log()


def _tiled_gradients(
    needs_gradients: tuple[bool, bool],
    anchors: ScaledRows,
    candidates: ScaledRows,
    rows: Terms,
    columns: Terms,
    exp_is_safe: bool,
    backend: Backend,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of the scaled anchors a_i and candidates b_j, or None if not needed.

    They are sum_j w_ij b_j and sum_i w_ij a_i, where the weight w_ij is
    row_grad_i exp(l_ij - row_lse_i) + column_grad_j exp(l_ij - column_lse_j).
    """
    dtype = upcast(anchors.rows[:0]).dtype
    anchors_grad, candidates_grad = (
        torch.zeros_like(side.rows, dtype=dtype) if is_needed else None
        for side, is_needed in zip((anchors, candidates), needs_gradients, strict=True)
    )
    for tile in iterate_scaled_logits(anchors, candidates, backend):
        row_terms = rows[0][tile.rows, None], rows[1][tile.rows, None]
        column_terms = columns[0][tile.columns], columns[1][tile.columns]
        weights = _weights(tile.logits, row_terms, column_terms, exp_is_safe)
        if anchors_grad is not None:
            anchors_grad[tile.rows].addmm_(weights, tile.candidates)
        if candidates_grad is not None:
            candidates_grad[tile.columns].addmm_(weights.T, tile.anchors)
    return anchors_grad, candidates_grad


def _weights(logits: Tensor, rows: Terms, columns: Terms, exp_is_safe: bool) -> Tensor:
    """Return the weights of a tile, and overwrite `logits`."""
    (row_lse, row_grad), (column_lse, column_grad) = rows, columns
    if exp_is_safe:
        factors = row_grad * torch.exp(-row_lse) + column_grad * torch.exp(-column_lse)
        return logits.exp_().mul_(factors)
    weights = (logits - row_lse).exp_().mul_(row_grad)
    return weights.add_(logits.sub_(column_lse).exp_().mul_(column_grad))


def _kernel_rows(*sides: ScaledRows) -> list[ScaledRows]:
    """Return rows in the form that the kernels read. They have no factors in float32."""
    return [
        side if side.rows.dtype in HALF_DTYPES else ScaledRows(side.multiply()) for side in sides
    ]


def _fused_log_sum_exp(
    anchors: ScaledRows, candidates: ScaledRows, kernels: Any
) -> tuple[Tensor, Tensor]:
    """Compute with kernels what `_tiled_log_sum_exp` returns."""
    anchors, candidates = _kernel_rows(anchors, candidates)
    row_lse = kernels.log_sum_exp(anchors, candidates, 0, ())
    return row_lse, kernels.log_sum_exp(candidates, anchors, 0, ())


def _fused_gradients(
    needs_gradients: tuple[bool, bool],
    anchors: ScaledRows,
    candidates: ScaledRows,
    rows: Terms,
    columns: Terms,
    kernels: Any,
) -> tuple[Tensor | None, Tensor | None]:
    """Compute with kernels what `_tiled_gradients` returns."""
    anchors, candidates = _kernel_rows(anchors, candidates)
    weighted_sum = partial(kernels.weighted_sum, local_start=0, excluded_offsets=())
    anchors_grad = candidates_grad = None
    if needs_gradients[0]:
        anchors_grad = weighted_sum(anchors, candidates, anchor_terms=rows, candidate_terms=columns)
    if needs_gradients[1]:
        candidates_grad = weighted_sum(
            candidates, anchors, anchor_terms=columns, candidate_terms=rows
        )
    return anchors_grad, candidates_grad
