"""Sums over all pairs of embeddings, tile by tile, without storing a matrix of all pairs.

The forward pass stores one log-sum-exp per anchor. The backward pass recomputes each tile, as
FlashAttention (arXiv:2205.14135) does for softmax. All values are float32, or float64 if the
embeddings are float64, even under autocast. Only the fused kernels read embeddings in half
precision.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.losses import similarity
from ssl_pretrain.losses.backend import Backend, backend_for
from ssl_pretrain.losses.half_precision import ScaledRows, scaled_rows, unit_rows
from ssl_pretrain.losses.log_odds import log_odds, log_odds_slope
from ssl_pretrain.losses.logit_tiles import iterate_logits
from ssl_pretrain.losses.running_sums import LARGEST_SAFE_LOGIT, RunningSums


def log_sum_exp(
    anchors: Tensor,
    candidates: Tensor,
    *,
    logit_bound: float = float("inf"),
    local_start: int = 0,
    excluded_offsets: Sequence[int] = (),
    half: tuple[ScaledRows, ScaledRows] | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Return log sum_j exp(anchors[i] @ candidates[j]), differentiable in both.

    On one process, this is ``torch.logsumexp(anchors @ candidates.T, dim=1)``.

    Args:
        anchors: Embeddings of this rank, divided by the temperature, shape (num_anchors, dim).
        candidates: Embeddings of all ranks, shape (num_candidates, dim). If gathering them was
            differentiable, their gradients are reduced to the ranks that they came from.
        logit_bound: Largest absolute value of a logit. A small bound makes subtracting maxima
            unnecessary.
        local_start: Index of this rank's first candidate, for `excluded_offsets`.
        excluded_offsets: Offsets d. The pairs (i, local_start + i + d) are left out of the sums.
        half: `anchors` and `candidates` in half precision, for the fused kernels.
        backend: Implementation of the sums. The default suits the device.

    Returns:
        Tensor of shape (num_anchors,).
    """
    backend = backend or backend_for(anchors)
    exp_is_safe = logit_bound <= LARGEST_SAFE_LOGIT
    with torch.autocast(anchors.device.type, enabled=False):
        return _LogSumExp.apply(
            anchors, candidates, half, exp_is_safe, local_start, tuple(excluded_offsets), backend
        )


def symmetric_log_sum_exp(
    z: Tensor,
    *,
    scale: float,
    excluded_offsets: Sequence[int] = (0,),
    labels: Tensor | None = None,
    half: Tensor | None = None,
    uses_log_odds: bool = False,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the log-sum-exp of each embedding's similarities to the embeddings of all ranks.

    The matrix of similarities is symmetric, so only the forward pass gathers the embeddings. The
    backward pass gathers a few numbers per embedding, the log-sum-exps and their gradients, and
    computes grad_i = scale * sum_j (g_i exp(s_ij - lse_i) + g_j exp(s_ij - lse_j)) z_j.

    Args:
        z: Embeddings of this rank, of unit length, shape (rows, dim).
        scale: 1 / temperature.
        excluded_offsets: Offsets d within this rank's rows. The pairs (i, i + d) are left out of
            the sums. For each d, -d must be given too.
        labels: Labels of the rows, shape (rows,), for the means over positives.
        half: The embeddings in half precision that `z` was normalized from, if there are any. Ranks
            send them instead of `z`, and the fused kernels read them.
        uses_log_odds: Replace each similarity by its log-odds, see `log_odds`. The scale must be 1
            and the fused kernels are not used.
        backend: Implementation of the sums. The default suits the device.

    Returns:
        log sum_j exp(scale * z_i @ z_j), shape (rows,), and the mean of scale * z_i @ z_j over the
        other rows j with the label of i, shape (rows,). The mean is 0 without such rows or without
        `labels`.
    """
    backend = backend or backend_for(z)
    if uses_log_odds:
        assert scale == 1 and labels is None, "log-odds have neither a scale nor positive means"
        backend = backend.with_small_plain_tiles()
    sent = z.detach() if half is None else half  # the tensor that ranks send to each other
    with torch.autocast(z.device.type, enabled=False):
        return _SymmetricLogSumExp.apply(
            z, sent, scale, tuple(excluded_offsets), labels, uses_log_odds, backend
        )


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchors: Tensor,
        candidates: Tensor,
        half: tuple[ScaledRows, ScaledRows] | None,
        exp_is_safe: bool,
        local_start: int,
        excluded_offsets: tuple[int, ...],
        backend: Backend,
    ) -> Tensor:
        anchor_rows, candidate_rows = half or (ScaledRows(anchors), ScaledRows(candidates))
        lse = backend.run_fused(
            anchor_rows.rows,
            lambda kernels: kernels.log_sum_exp(
                anchor_rows, candidate_rows, local_start, excluded_offsets
            ),
        )
        if lse is None:
            sums = RunningSums(len(anchors), anchors, exp_is_safe)
            for tile, logits in iterate_logits(
                anchors, candidates, local_start, excluded_offsets, backend
            ):
                sums.add(tile.rows, logits)
            lse = sums.log()
        half_tensors = () if half is None else (*half[0], *half[1])
        ctx.save_for_backward(anchors, candidates, lse, *half_tensors)
        ctx.arguments = local_start, excluded_offsets, backend
        return lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        anchors, candidates, lse, *half = ctx.saved_tensors
        local_start, excluded_offsets, backend = ctx.arguments
        fused = backend.run_fused(
            half[0] if half else anchors, lambda kernels: _fused_gradients(kernels, ctx, grad)
        )
        if fused is not None:
            return *fused, None, None, None, None, None
        anchors_grad = torch.zeros_like(anchors) if ctx.needs_input_grad[0] else None
        candidates_grad = torch.zeros_like(candidates) if ctx.needs_input_grad[1] else None
        with torch.autocast(anchors.device.type, enabled=False):
            for tile, logits in iterate_logits(
                anchors, candidates, local_start, excluded_offsets, backend
            ):
                weights = logits.sub_(lse[tile.rows, None]).exp_().mul_(grad[tile.rows, None])
                if anchors_grad is not None:
                    anchors_grad[tile.rows].addmm_(weights, candidates[tile.columns])
                if candidates_grad is not None:
                    candidates_grad[tile.columns].addmm_(weights.T, anchors[tile.rows])
        return anchors_grad, candidates_grad, None, None, None, None, None


class _SymmetricLogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        sent: Tensor,
        scale: float,
        excluded_offsets: tuple[int, ...],
        labels: Tensor | None,
        uses_log_odds: bool,
        backend: Backend,
    ) -> tuple[Tensor, Tensor]:
        all_sent, local_start = collectives.gather(sent), process_group.rank() * len(z)
        exp_is_safe = scale <= LARGEST_SAFE_LOGIT
        lse = backend.run_fused(
            sent,
            lambda kernels: kernels.log_sum_exp(
                scaled_rows(sent, scale), scaled_rows(all_sent), local_start, excluded_offsets
            ),
        )
        if lse is None:
            sums, all_z = RunningSums(len(z), z, exp_is_safe), unit_rows(all_sent)
            for tile, logits in iterate_logits(
                z * scale, all_z, local_start, excluded_offsets, backend, skip_mirrors=exp_is_safe
            ):
                if uses_log_odds:
                    logits = log_odds(logits)
                sums.add(tile.rows, logits)
                if exp_is_safe and tile.mirror_rows is not None:
                    sums.sum[tile.mirror_rows] += logits.sum(0)
            lse = sums.log()
        classes, positive_means = None, torch.zeros_like(lse)
        if labels is not None:
            classes = similarity.class_indices(collectives.gather(labels))
            positive_means = similarity.mean_positive_logits(
                z, unit_rows(all_sent), classes, local_start, scale
            )
        ctx.save_for_backward(z, sent, all_sent, lse, classes)
        ctx.arguments = scale, local_start, excluded_offsets, exp_is_safe, uses_log_odds, backend
        return lse, positive_means

    @staticmethod
    def backward(ctx: Any, grad: Tensor, positives_grad: Tensor) -> Any:
        z, sent, all_sent, lse, classes = ctx.saved_tensors
        scale, local_start, excluded_offsets, _, _, backend = ctx.arguments
        with torch.autocast(z.device.type, enabled=False):
            all_lse, all_grad, all_positives_grad = collectives.gather(
                torch.stack([lse, grad, positives_grad], dim=1)
            ).unbind(1)
            total = backend.run_fused(
                sent,
                lambda kernels: kernels.weighted_sum(
                    scaled_rows(sent, scale),
                    scaled_rows(all_sent),
                    local_start=local_start,
                    excluded_offsets=excluded_offsets,
                    anchor_terms=(lse, grad),
                    candidate_terms=(all_lse, all_grad),
                ),
            )
            if total is None:
                total = _tiled_gradient(ctx.arguments, z, unit_rows(all_sent), all_lse, all_grad)
            if classes is not None:
                total += similarity.mean_positive_logits_gradient(
                    z, unit_rows(all_sent), classes, local_start, all_positives_grad
                )
        return total * scale, None, None, None, None, None, None


def _fused_gradients(kernels: Any, ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of `_LogSumExp` with respect to its anchors and candidates."""
    anchors, candidates, lse, *half = ctx.saved_tensors
    anchor_rows, candidate_rows = ScaledRows(anchors), ScaledRows(candidates)
    if half:
        anchor_rows, candidate_rows = ScaledRows(*half[:2]), ScaledRows(*half[2:])
    local_start, excluded_offsets, _ = ctx.arguments
    weighted_sum = partial(
        kernels.weighted_sum, local_start=local_start, excluded_offsets=excluded_offsets
    )
    anchors_grad = candidates_grad = None
    if ctx.needs_input_grad[0]:
        anchors_grad = weighted_sum(anchor_rows, candidate_rows, anchor_terms=(lse, grad))
    if ctx.needs_input_grad[1]:
        candidates_grad = weighted_sum(
            candidate_rows, anchor_rows, candidate_terms=(lse, grad), swapped=True
        )
    return anchors_grad, candidates_grad


def _tiled_gradient(
    arguments: Any, z: Tensor, all_z: Tensor, all_lse: Tensor, all_grad: Tensor
) -> Tensor:
    """Return sum_j (g_i exp(s_ij - lse_i) + g_j exp(s_ij - lse_j)) z_j for this rank's rows i.

    If s_ij is a function of the similarity, its derivative multiplies each term.
    """
    scale, local_start, excluded_offsets, exp_is_safe, uses_log_odds, backend = arguments
    total = torch.zeros_like(z)
    coefficients = all_grad * torch.exp(-all_lse) if exp_is_safe else None
    for tile, logits in iterate_logits(
        z * scale, all_z, local_start, excluded_offsets, backend, skip_mirrors=exp_is_safe
    ):
        rows = slice(local_start + tile.rows.start, local_start + tile.rows.stop)
        columns = tile.columns
        slope = log_odds_slope(logits) if uses_log_odds else None
        if uses_log_odds:
            logits = log_odds(logits)
        if coefficients is not None:
            weights = logits.exp_().mul_(coefficients[rows, None] + coefficients[None, columns])
        else:
            weights = (logits - all_lse[rows, None]).exp_().mul_(all_grad[rows, None])
            weights += logits.sub_(all_lse[None, columns]).exp_().mul_(all_grad[None, columns])
        if slope is not None:
            weights.mul_(slope)
        total[tile.rows].addmm_(weights, all_z[columns])
        if exp_is_safe and tile.mirror_rows is not None:
            total[tile.mirror_rows].addmm_(weights.T, z[tile.rows])
    return total
