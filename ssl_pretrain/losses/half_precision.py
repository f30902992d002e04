"""Embeddings in float16 or bfloat16, which ranks send and the fused kernels read as they are.

Unit vectors rounded to bfloat16 would have relative errors of 2^-9. Therefore the embeddings stay
as the network returned them, and their inverse lengths are float32 factors. A product of two
numbers of 16 bits is exact in float32, so the logits factor_i * factor_j * (row_i @ row_j) are as
accurate as those of float32 embeddings.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.losses.similarity import inverse_lengths, upcast

HALF_DTYPES = (torch.float16, torch.bfloat16)


class ScaledRows(NamedTuple):
    """Rows of shape (num_rows, dim), with a float32 factor per row if they are in half precision.

    The kernels take no factors of rows in float32, but plain tiles do.
    """

    rows: Tensor
    factors: Tensor | None = None

    def multiply(self, indices: slice = slice(None)) -> Tensor:
        """Return some rows times their factors, in float32 or wider."""
        rows = upcast(self.rows[indices])
        return rows if self.factors is None else rows * self.factors[indices, None]


def half_rows(*embeddings: Tensor) -> Tensor | None:
    """Concatenate the embeddings without a graph. Return None unless all have one half dtype."""
    dtypes = {z.dtype for z in embeddings}
    if len(dtypes) > 1 or embeddings[0].dtype not in HALF_DTYPES:
        return None
    detached = [z.detach() for z in embeddings]
    # Under autocast to bfloat16 on a CPU, torch.cat refuses float16.
    with torch.autocast(detached[0].device.type, enabled=False):
        return detached[0] if len(detached) == 1 else torch.cat(detached)


def half_pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return both embeddings without a graph. Return None unless both have one half dtype."""
    is_half = a.dtype == b.dtype and a.dtype in HALF_DTYPES
    return (a.detach(), b.detach()) if is_half else None


def unit_rows(embeddings: Tensor) -> Tensor:
    """Return embeddings of unit length. Those that are not in half precision already have it."""
    is_half = embeddings.dtype in HALF_DTYPES
    return F.normalize(upcast(embeddings), dim=1) if is_half else embeddings


def scaled_rows(embeddings: Tensor, scale: float | Tensor = 1.0) -> ScaledRows:
    """Return embeddings of unit length times `scale`, in the form that the kernels read.

    Args:
        embeddings: Embeddings in half precision of any length, or else of unit length.
        scale: Number, or a tensor of shape (num_rows,) for embeddings in half precision.
    """
    if embeddings.dtype not in HALF_DTYPES:
        is_scaled = isinstance(scale, Tensor) or scale != 1
        return ScaledRows(embeddings * scale if is_scaled else embeddings)
    return ScaledRows(embeddings, inverse_lengths(embeddings, scale))


def scaled_pair(
    anchors: Tensor | None, candidates: Tensor | None, scale: float | Tensor
) -> tuple[ScaledRows, ScaledRows] | None:
    """Return scaled anchors and unit candidates. Return None unless both have one half dtype."""
    if anchors is None or candidates is None or anchors.dtype != candidates.dtype:
        return None
    return scaled_rows(anchors, scale), scaled_rows(candidates)


def gather_unit(unit: Tensor, half: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Gather embeddings from all ranks. Embeddings in half precision are sent in it.

    Args:
        unit: Embeddings of this rank, of unit length, shape (rows, dim).
        half: The embeddings in half precision that they were normalized from, if there are any.

    Returns:
        `unit` and `half` of all ranks. Gradients of the former flow to all ranks in its dtype.
    """
    if half is None or process_group.world_size() == 1:
        return collectives.gather(unit), half
    all_unit, all_half = _GatherUnit.apply(unit, half)
    return all_unit, all_half


class _GatherUnit(torch.autograd.Function):
    """Gather embeddings in half precision, and pass gradients to the normalized embeddings."""

    @staticmethod
    def forward(ctx: Any, unit: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
        all_half = collectives.gather(half)
        ctx.mark_non_differentiable(all_half)
        return unit_rows(all_half), all_half

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, None]:
        return collectives.reduce_scatter(grad), None
