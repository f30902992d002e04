"""Sums over all pairs of embeddings, tile by tile: nothing of size anchors x candidates is ever stored.

Forward keeps one log-sum-exp an anchor; backward computes each tile again (as FlashAttention, arXiv:2205.14135, does
for softmax). Everything is float32, or float64 where the embeddings are, whatever the autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ssl_pretrain.distributed import collectives, process_group

T = TypeVar("T")
TILE = {
    "cpu": (512, 1024),
    "cuda": (8192, 8192),
}  # rows x columns; on CPU a tile stays in the cache
FUSED_ON = ("cuda",)  # devices whose sums are the kernels of tiles_triton
SAFE = 40.0  # exp of logits up to here, and sums of 2**30 of them, are normal float32 numbers: no maximum is needed


@contextmanager
def sized_for(device_type: str) -> Iterator[None]:
    """Tiles on a CPU as large as those of another device: for a plan, which traces that device's program."""
    before = TILE["cpu"]
    TILE["cpu"] = TILE[device_type]
    try:
        yield
    finally:
        TILE["cpu"] = before


class _Tile(NamedTuple):
    rows: slice
    columns: slice
    own: bool  # its columns are this rank's rows


def log_sum_exp(
    anchors: Tensor,
    candidates: Tensor,
    *,
    bound: float = float("inf"),
    own: int = 0,
    excluded: Sequence[int] = (),
) -> Tensor:
    """log sum_j exp(anchors[i] @ candidates[j]): (num_anchors,), differentiable in both.

    Args:
        anchors: this rank's, (num_anchors, dim), with the temperature already in them.
        candidates: of all ranks, (num_candidates, dim). Gathered with a graph, their gradient is reduce-scattered.
        bound: no |logit| is larger; a small one saves the search for maxima.
        own: the column of this rank's first candidate, for `excluded`.
        excluded: the pairs (i, own + i + d), for each d here, do not count.
    """
    with torch.autocast(anchors.device.type, enabled=False):
        return _LogSumExp.apply(anchors, candidates, bound <= SAFE, own, tuple(excluded))


def log_sum_exp_among(
    z: Tensor, *, scale: float, excluded: Sequence[int] = (0,), labels: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Over the embeddings of all ranks, each against all others: the similarity matrix is symmetric.

    The embeddings travel once, forward. Backward takes the column's part of the gradient from everybody's
    log-sum-exps: grad_i = scale * sum_j (g_i exp(s_ij - lse_i) + g_j exp(s_ij - lse_j)) z_j, so that only two numbers
    an embedding travel.

    Args:
        z: this rank's embeddings, unit length, (rows, dim).
        scale: 1 / temperature.
        excluded: offsets d within this rank's rows: the pairs (i, i + d) do not count. Mutual: with d, also -d.
        labels: (rows,), to sum over the positives too.

    Returns:
        log sum_j exp(scale * z_i @ z_j), (rows,), and the mean of scale * z_i @ z_j over the other rows j of i's label,
        (rows,), 0 where there are none; without labels, zeros.
    """
    with torch.autocast(z.device.type, enabled=False):
        return _LogSumExpAmong.apply(z, scale, tuple(excluded), labels)


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchors: Tensor,
        candidates: Tensor,
        bounded: bool,
        own: int,
        excluded: tuple[int, ...],
    ) -> Tensor:
        lse = _fused(
            anchors, lambda kernels: kernels.log_sum_exp(anchors, candidates, own, excluded)
        )
        if lse is None:
            accumulate = _Sums(len(anchors), anchors, bounded)
            for tile, logits in _logits(anchors, candidates, own, excluded):
                accumulate.rows(tile, logits)
            lse = accumulate.log()
        ctx.save_for_backward(anchors, candidates, lse)
        ctx.arguments = own, excluded
        return lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        anchors, candidates, lse = ctx.saved_tensors
        own, excluded = ctx.arguments
        fused = _fused(anchors, lambda kernels: _by_kernels(kernels, ctx, grad))
        if fused is not None:
            return *fused, None, None, None
        for_anchors = torch.zeros_like(anchors) if ctx.needs_input_grad[0] else None
        for_candidates = torch.zeros_like(candidates) if ctx.needs_input_grad[1] else None
        with torch.autocast(anchors.device.type, enabled=False):
            for tile, logits in _logits(anchors, candidates, own, excluded):
                weights = logits.sub_(lse[tile.rows, None]).exp_().mul_(grad[tile.rows, None])
                if for_anchors is not None:
                    for_anchors[tile.rows].addmm_(weights, candidates[tile.columns])
                if for_candidates is not None:
                    for_candidates[tile.columns].addmm_(weights.T, anchors[tile.rows])
        return for_anchors, for_candidates, None, None, None


class _LogSumExpAmong(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, scale: float, excluded: tuple[int, ...], labels: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        everyone, own, bounded = collectives.gather(z), process_group.rank() * len(z), scale <= SAFE
        lse = _fused(z, lambda kernels: kernels.log_sum_exp(z * scale, everyone, own, excluded))
        if lse is None:
            accumulate = _Sums(len(z), z, bounded)
            for tile, logits in _logits(z * scale, everyone, own, excluded, halved=bounded):
                accumulate.rows(tile, logits)
                if (
                    bounded and tile.own and tile.columns.start != own + tile.rows.start
                ):  # its mirror image is not visited
                    accumulate.columns(
                        slice(tile.columns.start - own, tile.columns.stop - own), logits
                    )
            lse = accumulate.log()
        classes = _classes(collectives.gather(labels)) if labels is not None else None
        positives = torch.zeros_like(lse)
        if classes is not None:
            sums, others, mine = (
                _class_sums(everyone, classes),
                _class_sizes(classes) - 1,
                slice(own, own + len(z)),
            )
            positives = ((sums[classes[mine]] - z) * z).sum(1) * scale / others[mine].clamp(min=1)
        ctx.save_for_backward(z, everyone, lse, classes)
        ctx.arguments = scale, own, excluded, bounded
        return lse, positives

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_positives: Tensor) -> Any:
        z, everyone, lse, classes = ctx.saved_tensors
        scale, own, excluded, _ = ctx.arguments
        with torch.autocast(z.device.type, enabled=False):
            all_lse, all_grad, all_positives = collectives.gather(
                torch.stack([lse, grad, grad_positives], dim=1)
            ).unbind(1)
            weights = {
                "own": own,
                "excluded": excluded,
                "of_anchors": (lse, grad),
                "of_candidates": (all_lse, all_grad),
            }
            total = _fused(z, lambda kernels: kernels.weighted_sum(z * scale, everyone, **weights))
            if total is None:
                total = _by_tiles(ctx.arguments, z, everyone, all_lse, all_grad)
            if classes is not None:  # sum_p of s_ip is symmetric, too
                mine, share = (
                    classes[own : own + len(z)],
                    (all_positives / (_class_sizes(classes) - 1).clamp(min=1))[:, None],
                )
                sums, weighted = (
                    _class_sums(everyone, classes),
                    _class_sums(everyone * share, classes),
                )
                own_share = share[own : own + len(z)]
                total += own_share * (sums[mine] - z) + weighted[mine] - own_share * z
        return total * scale, None, None, None


def _by_kernels(kernels: Any, ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of `_LogSumExp` by its anchors and candidates."""
    (anchors, candidates, lse), (own, excluded) = ctx.saved_tensors, ctx.arguments
    for_anchors = for_candidates = None
    if ctx.needs_input_grad[0]:
        for_anchors = kernels.weighted_sum(
            anchors, candidates, own=own, excluded=excluded, of_anchors=(lse, grad)
        )
    if ctx.needs_input_grad[1]:
        for_candidates = kernels.weighted_sum(
            candidates, anchors, own=own, excluded=excluded, of_candidates=(lse, grad), swapped=True
        )
    return for_anchors, for_candidates


def _by_tiles(
    arguments: Any, z: Tensor, everyone: Tensor, all_lse: Tensor, all_grad: Tensor
) -> Tensor:
    """sum_j (g_i exp(s_ij - lse_i) + g_j exp(s_ij - lse_j)) z_j for this rank's rows i."""
    scale, own, excluded, bounded = arguments
    total = torch.zeros_like(z)
    shares = all_grad * torch.exp(-all_lse) if bounded else None
    for tile, logits in _logits(z * scale, everyone, own, excluded, halved=bounded):
        rows = slice(own + tile.rows.start, own + tile.rows.stop)
        if shares is not None:
            weights = logits.exp_().mul_(shares[rows, None] + shares[None, tile.columns])
        else:
            weights = (logits - all_lse[rows, None]).exp_().mul_(all_grad[rows, None])
            weights += (
                logits.sub_(all_lse[None, tile.columns]).exp_().mul_(all_grad[None, tile.columns])
            )
        total[tile.rows].addmm_(weights, everyone[tile.columns])
        if bounded and tile.own and tile.columns.start != rows.start:
            total[tile.columns.start - own : tile.columns.stop - own].addmm_(
                weights.T, z[tile.rows]
            )
    return total


def _fused(anchors: Tensor, compute: Callable[[ModuleType], T]) -> T | None:
    """Return `compute(kernels)` where the fused kernels take these embeddings, else None.

    They run on CUDA, in float32, where Triton is installed. A device on which a launch does not fit is left to the plain
    tiles from then on, with one warning.
    """
    if anchors.device.type not in FUSED_ON or find_spec("triton") is None:
        return None
    from ssl_pretrain.losses import tiles_triton

    if not tiles_triton.fits(anchors):
        return None
    try:
        return compute(tiles_triton)
    except tiles_triton.OutOfResources as error:
        tiles_triton.refuse(anchors.device, error)
        return None


class _Sums:
    """Running sums of exponentials, one a row."""

    def __init__(self, rows: int, like: Tensor, bounded: bool):
        self.sum = like.new_zeros(rows)
        self.maximum = None if bounded else like.new_full((rows,), torch.finfo(like.dtype).min)

    def rows(self, tile: _Tile, logits: Tensor) -> None:
        """Adds a tile to its rows and leaves its exponentials in `logits`, shifted where they are not bounded."""
        if self.maximum is None:
            self.sum[tile.rows] += logits.exp_().sum(1)
            return
        before = self.maximum[tile.rows].clone()
        now = torch.maximum(before, logits.amax(1))
        self.sum[tile.rows] = self.sum[tile.rows] * torch.exp(before - now) + logits.sub_(
            now[:, None]
        ).exp_().sum(1)
        self.maximum[tile.rows] = now

    def columns(self, rows: slice, exponentials: Tensor) -> None:
        self.sum[rows] += exponentials.sum(0)

    def log(self) -> Tensor:
        return self.sum.log() if self.maximum is None else self.sum.log() + self.maximum


def _logits(
    anchors: Tensor, candidates: Tensor, own: int, excluded: tuple[int, ...], halved: bool = False
) -> Iterator[tuple[_Tile, Tensor]]:
    """Every tile with its logits, -inf where excluded, in one buffer that the next tile overwrites.

    halved: of this rank's rows against themselves, only the diagonal and what is above it.
    """
    height, width = TILE[anchors.device.type]
    width = height if halved else width  # square, so that the diagonal cuts no tile but its own
    buffer = anchors.new_empty(min(height, len(anchors)) * min(width, len(candidates)))
    for tile in _tiles(len(anchors), len(candidates), own, height, width):
        if halved and tile.own and tile.columns.start - own < tile.rows.start:
            continue
        shape = tile.rows.stop - tile.rows.start, tile.columns.stop - tile.columns.start
        logits = buffer[: shape[0] * shape[1]].view(shape)
        torch.mm(anchors[tile.rows], candidates[tile.columns].T, out=logits)
        for offset in excluded if tile.own else ():
            logits.diagonal(own + tile.rows.start + offset - tile.columns.start).fill_(
                float("-inf")
            )
        yield tile, logits


def _tiles(num_rows: int, num_columns: int, own: int, height: int, width: int) -> Iterator[_Tile]:
    """Tiles that cover everything once; none holds both this rank's columns and others'."""
    for row in range(0, num_rows, height):
        rows = slice(row, min(row + height, num_rows))
        for start, stop, is_own in (
            (0, own, False),
            (own, min(own + num_rows, num_columns), True),
            (own + num_rows, num_columns, False),
        ):
            for column in range(start, stop, width):
                yield _Tile(rows, slice(column, min(column + width, stop)), is_own)


def _classes(labels: Tensor) -> Tensor:
    """Labels as numbers below len(labels), equal where they are; the device is not read."""
    ordered, where = labels.sort()
    first = torch.ones_like(ordered)
    first[1:] = ordered[1:] != ordered[:-1]
    return torch.empty_like(labels).scatter_(0, where, first.cumsum(0) - 1)


def _class_sums(rows: Tensor, classes: Tensor) -> Tensor:
    return torch.zeros_like(rows).index_add_(0, classes, rows)


def _class_sizes(classes: Tensor) -> Tensor:
    """(rows,): how many rows share each row's class."""
    return torch.zeros_like(classes).index_add_(0, classes, torch.ones_like(classes))[classes]
