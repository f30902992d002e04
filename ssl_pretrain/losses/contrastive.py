"""Losses of the form "logits of anchors against candidates". This rank's anchors meet the candidates of all ranks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_pretrain import distributed


def nt_xent(z_a: Tensor, z_b: Tensor, *, temperature: float) -> Tensor:
    """Normalized-temperature cross entropy: eq. 1 of SimCLR (Chen et al., ICML 2020, arXiv:2002.05709).

    Row i of `z_a` has one positive, row i of `z_b`, and 2N - 2 negatives: every other
    embedding of both views on all ranks, N = local_batch * world_size.

    Args:
        z_a: embeddings of view a, (local_batch, dim). Normalized here, so any scale.
        z_b: embeddings of view b, same shape; row i is the same image as z_a[i].
        temperature: divides cosine similarities, so dimensionless; the paper uses 0.1 to 0.5.

    Returns:
        This rank's mean over its 2 * local_batch anchors, in nats. The mean over ranks is
        the global loss, which is what DDP's averaging needs.

    Raises:
        ValueError: the shapes differ or are not 2-D, or temperature is not positive.
    """
    if z_a.shape != z_b.shape or z_a.ndim != 2:
        raise ValueError(f"nt_xent: z_a and z_b must share one (local_batch, dim) shape, got {tuple(z_a.shape)} and {tuple(z_b.shape)}")
    if temperature <= 0:
        raise ValueError(f"nt_xent: temperature must be > 0, got {temperature}")
    z_a, z_b = F.normalize(_precise(z_a), dim=1), F.normalize(_precise(z_b), dim=1)
    all_a, all_b = distributed.gather(z_a), distributed.gather(z_b)  # (N, dim)
    own = torch.arange(len(z_a), device=z_a.device) + distributed.rank() * len(z_a)  # this rank's rows of N

    def half(anchor: Tensor, same_view: Tensor, other_view: Tensor) -> Tensor:
        to_same = (anchor @ same_view.T / temperature).scatter(1, own[:, None], float("-inf"))  # no self-pairs
        to_other = anchor @ other_view.T / temperature
        return F.cross_entropy(torch.cat([to_other, to_same], dim=1), own)

    with torch.autocast(z_a.device.type, enabled=False):
        return (half(z_a, all_a, all_b) + half(z_b, all_b, all_a)) / 2  # the mean; SimCLR's method multiplies by 2, as its authors sum


def _precise(z: Tensor) -> Tensor:
    return z if z.dtype == torch.float64 else z.float()  # similarities in float32 whatever the autocast
