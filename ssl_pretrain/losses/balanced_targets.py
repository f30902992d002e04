"""Sinkhorn-Knopp over a teacher's outputs of the global batch, without keeping any logits.

The assignments of Sinkhorn-Knopp are a softmax of the logits plus one offset per prototype. Only
these offsets depend on other images. They are computed from the inputs of the prototype layer,
which are narrow. The logits are computed tile by tile and dropped.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.losses.arguments import check_positive
from ssl_pretrain.losses.similarity import upcast

MAX_LOGITS = 2**24  # largest number of logits in memory at a time; 64 MiB in float32


@torch.no_grad()
def sinkhorn_offsets(
    embeddings: Tensor,
    prototypes: Tensor,
    valid: Tensor | None = None,
    *,
    temperature: float,
    num_iterations: int = 3,
) -> Tensor:
    """Return the offset that Sinkhorn-Knopp over all ranks adds to the logits of each prototype.

    The assignments of a row are `softmax(embeddings @ prototypes.T / temperature + offsets)`. They
    equal those of DINOv2 (Oquab et al., TMLR 2024, arXiv:2304.07193, section 4) and of equation 3
    of SwAV (arXiv:2006.09882), where the prototypes get equal shares of the rows of all ranks. An
    iteration subtracts from each offset the logarithm of the prototype's share. The first one
    uses exponentials that are not normalized, as these algorithms do.

    The extra memory does not depend on the number of rows. All sums are computed as logarithms, so
    large logits do not overflow.

    Args:
        embeddings: Inputs of the last layer, shape (rows, dim). Ranks may have different numbers of
            rows, or none.
        prototypes: Weights of the last layer, shape (num_prototypes, dim).
        valid: False for rows that do not count, such as padding, bool (rows,). By default all
            count.
        temperature: Divisor of the logits.
        num_iterations: Rounds of normalizing prototypes and rows.

    Returns:
        Offsets in float32 or wider, shape (num_prototypes,), the same on every rank.

    Raises:
        ValueError: If the shapes do not match, or a number is not positive.

    Example:
        >>> z = torch.tensor([[1.0, 0.9], [1.0, 0.2]])
        >>> offsets = sinkhorn_offsets(z, torch.eye(2), temperature=0.5, num_iterations=100)
        >>> torch.softmax(z / 0.5 + offsets, dim=1)
        tensor([[0.33..., 0.66...],
                [0.66..., 0.33...]])
    """
    check_positive("sinkhorn_offsets", temperature=temperature, num_iterations=num_iterations)
    if embeddings.ndim != 2 or prototypes.ndim != 2 or embeddings.shape[1] != prototypes.shape[1]:
        raise ValueError(
            "sinkhorn_offsets: embeddings must be (rows, dim) and prototypes (num_prototypes, "
            f"dim), got {tuple(embeddings.shape)} and {tuple(prototypes.shape)}"
        )
    if valid is not None and valid.shape != embeddings.shape[:1]:
        raise ValueError(
            f"sinkhorn_offsets: valid must be (rows,) for {len(embeddings)} rows, "
            f"got {tuple(valid.shape)}"
        )
    with torch.autocast(embeddings.device.type, enabled=False):
        embeddings, prototypes = upcast(embeddings), upcast(prototypes)
        offsets = embeddings.new_zeros(len(prototypes))
        for iteration in range(num_iterations):
            shares = _log_shares(
                embeddings, prototypes, valid, offsets, temperature, normalized=iteration > 0
            )
            offsets = offsets - shares.masked_fill(shares.isneginf(), 0.0)  # no valid row
    return offsets


def _log_shares(
    embeddings: Tensor,
    prototypes: Tensor,
    valid: Tensor | None,
    offsets: Tensor,
    temperature: float,
    *,
    normalized: bool,
) -> Tensor:
    """Return the logarithm of each prototype's sum over the valid rows of all ranks.

    If `normalized`, a row's terms are its assignments, which sum to 1. Otherwise they are the
    exponentials of its logits.
    """
    total = offsets.new_full((len(prototypes),), -torch.inf)
    rows_per_tile = max(1, MAX_LOGITS // len(prototypes))
    for start in range(0, len(embeddings), rows_per_tile):
        rows = slice(start, start + rows_per_tile)
        logits = torch.addmm(offsets, embeddings[rows], prototypes.T, alpha=1 / temperature)
        if normalized:
            logits = F.log_softmax(logits, dim=1)
        if valid is not None:
            logits = logits.masked_fill(~valid[rows, None], -torch.inf)
        total = torch.logaddexp(total, logits.logsumexp(0))
    if process_group.world_size() == 1:
        return total
    return collectives.gather(total[None]).logsumexp(0)
