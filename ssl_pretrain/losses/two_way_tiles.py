"""Log-sum-exps of the logits between two kinds of embeddings, over the rows and over the columns.

Rows are the anchors of this rank and columns are the candidates of all ranks. Each tile of logits
is computed once for both directions, and once more in the backward pass. Only the candidates are
gathered. The sums of a column over the anchors of all ranks are added up between the ranks.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.losses.backend import Backend, backend_for
from ssl_pretrain.losses.half_precision import ScaledRows, scaled_rows, unit_rows
from ssl_pretrain.losses.logit_tiles import iterate_logits
from ssl_pretrain.losses.running_sums import LARGEST_SAFE_LOGIT, RunningSums


def two_way_log_sum_exp(
    anchors: Tensor,
    candidates: Tensor,
    *,
    logit_bound: float = float("inf"),
    half_anchors: ScaledRows | None = None,
    half_candidates: Tensor | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Return log sum_j exp(l_ij) per anchor i and log sum_i exp(l_ij) per candidate j of this rank.

    The logit l_ij is anchors[i] @ candidates[j], and the sums are over all ranks. On one process,
    the results are ``torch.logsumexp(anchors @ candidates.T, dim)`` with dim 1 and 0.

    Args:
        anchors: Embeddings of this rank times the scale of the logits, shape (local_batch, dim).
        candidates: Embeddings of this rank, same shape.
        logit_bound: Largest absolute value of a logit. A small bound makes subtracting maxima
            unnecessary.
        half_anchors: The anchors in half precision, for the fused kernels. They must have the data
            type of `half_candidates`.
        half_candidates: The embeddings in half precision that `candidates` were normalized from.
            Ranks send them instead of `candidates`.
        backend: Implementation of the sums. The default suits the device.

    Returns:
        Two tensors of shape (local_batch,). Gradients flow to the embeddings of all ranks.
    """
    backend = backend or backend_for(anchors)
    sent = candidates.detach() if half_candidates is None else half_candidates
    exp_is_safe = logit_bound <= LARGEST_SAFE_LOGIT
    with torch.autocast(anchors.device.type, enabled=False):
        return _TwoWayLogSumExp.apply(anchors, candidates, sent, half_anchors, exp_is_safe, backend)


class _TwoWayLogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchors: Tensor,
        candidates: Tensor,
        sent: Tensor,
        half_anchors: ScaledRows | None,
        exp_is_safe: bool,
        backend: Backend,
    ) -> tuple[Tensor, Tensor]:
        all_sent = collectives.gather(sent)
        kernel_anchors, kernel_candidates = _kernel_rows(anchors, all_sent, half_anchors)
        results = backend.run_fused(
            kernel_anchors.rows,
            lambda kernels: (
                kernels.log_sum_exp(kernel_anchors, kernel_candidates, 0, ()),
                kernels.log_sum_exp(kernel_candidates, kernel_anchors, 0, ()),
            ),
        )
        row_lse, partial_column_lse = results or _tiled_log_sum_exp(
            anchors, unit_rows(all_sent), exp_is_safe, backend
        )
        all_column_lse = _log_add_over_ranks(partial_column_lse)
        ctx.save_for_backward(anchors, all_sent, row_lse, all_column_lse, *(half_anchors or ()))
        ctx.arguments = exp_is_safe, backend
        local_start = process_group.rank() * len(anchors)
        return row_lse, all_column_lse[local_start:][: len(anchors)].clone()

    @staticmethod
    def backward(ctx: Any, row_grad: Tensor, column_grad: Tensor) -> Any:
        anchors, all_sent, row_lse, all_column_lse, *half = ctx.saved_tensors
        exp_is_safe, backend = ctx.arguments
        needs_gradients = ctx.needs_input_grad[:2]
        with torch.autocast(anchors.device.type, enabled=False):
            terms = row_lse, row_grad, all_column_lse, collectives.gather(column_grad)
            sides = _kernel_rows(anchors, all_sent, ScaledRows(*half) if half else None)
            gradients = backend.run_fused(
                sides[0].rows,
                lambda kernels: _fused_gradients(kernels, needs_gradients, *sides, *terms),
            )
            anchors_grad, candidates_grad = gradients or _tiled_gradients(
                needs_gradients, anchors, unit_rows(all_sent), *terms, exp_is_safe, backend
            )
            if candidates_grad is not None and process_group.world_size() > 1:
                candidates_grad = collectives.reduce_scatter(candidates_grad)
        return anchors_grad, candidates_grad, None, None, None, None


def _kernel_rows(
    anchors: Tensor, all_sent: Tensor, half_anchors: ScaledRows | None
) -> tuple[ScaledRows, ScaledRows]:
    """Return the anchors and all candidates in the form that the kernels read, of one dtype."""
    if half_anchors is None:
        return ScaledRows(anchors), ScaledRows(unit_rows(all_sent))
    return half_anchors, scaled_rows(all_sent)


def _tiled_log_sum_exp(
    anchors: Tensor, candidates: Tensor, exp_is_safe: bool, backend: Backend
) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exp of each anchor, and of each candidate over this rank's anchors."""
    rows = RunningSums(len(anchors), anchors, exp_is_safe)
    columns = RunningSums(len(candidates), anchors, exp_is_safe)
    for tile, logits in iterate_logits(anchors, candidates, 0, (), backend):
        if exp_is_safe:
            rows.add(tile.rows, logits)  # leaves exp(logits), which both directions need
            columns.sum[tile.columns] += logits.sum(0)
        else:
            columns.add(tile.columns, logits.clone().T)
            rows.add(tile.rows, logits)
    return rows.log(), columns.log()


def _log_add_over_ranks(partial_lse: Tensor) -> Tensor:
    """Return the logarithm of the sum of exp(partial_lse) over the ranks."""
    if process_group.world_size() == 1:
        return partial_lse
    maximum = collectives.reduce_max(partial_lse)
    return maximum + collectives.reduce_sum(torch.exp(partial_lse - maximum)).log()


def _fused_gradients(
    kernels: Any,
    needs_gradients: tuple[bool, bool],
    anchors: ScaledRows,
    candidates: ScaledRows,
    row_lse: Tensor,
    row_grad: Tensor,
    column_lse: Tensor,
    column_grad: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    """Compute with kernels what `_tiled_gradients` returns."""
    weighted_sum = partial(kernels.weighted_sum, local_start=0, excluded_offsets=())
    rows, columns = (row_lse, row_grad), (column_lse, column_grad)
    anchors_grad = candidates_grad = None
    if needs_gradients[0]:
        anchors_grad = weighted_sum(anchors, candidates, anchor_terms=rows, candidate_terms=columns)
    if needs_gradients[1]:
        candidates_grad = weighted_sum(
            candidates, anchors, anchor_terms=columns, candidate_terms=rows
        )
    return anchors_grad, candidates_grad


def _tiled_gradients(
    needs_gradients: tuple[bool, bool],
    anchors: Tensor,
    candidates: Tensor,
    row_lse: Tensor,
    row_grad: Tensor,
    column_lse: Tensor,
    column_grad: Tensor,
    exp_is_safe: bool,
    backend: Backend,
) -> tuple[Tensor | None, Tensor | None]:
    """Return sum_j w_ij candidates[j] per anchor i and sum_i w_ij anchors[i] per candidate j.

    With the logits l_ij = anchors[i] @ candidates[j], the weights are
    w_ij = row_grad_i exp(l_ij - row_lse_i) + column_grad_j exp(l_ij - column_lse_j). A gradient
    is None unless it is needed.
    """
    anchors_grad = torch.zeros_like(anchors) if needs_gradients[0] else None
    candidates_grad = torch.zeros_like(candidates) if needs_gradients[1] else None
    row_factors, column_factors = (
        row_grad * torch.exp(-row_lse),
        column_grad * torch.exp(-column_lse),
    )
    for tile, logits in iterate_logits(anchors, candidates, 0, (), backend):
        rows, columns = tile.rows, tile.columns
        if exp_is_safe:
            weights = logits.exp_().mul_(row_factors[rows, None] + column_factors[columns])
        else:
            weights = (logits - row_lse[rows, None]).exp_().mul_(row_grad[rows, None])
            weights += logits.sub_(column_lse[columns]).exp_().mul_(column_grad[columns])
        if anchors_grad is not None:
            anchors_grad[rows].addmm_(weights, candidates[columns])
        if candidates_grad is not None:
            candidates_grad[columns].addmm_(weights.T, anchors[rows])
    return anchors_grad, candidates_grad
