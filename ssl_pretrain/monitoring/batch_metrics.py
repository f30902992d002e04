"""Collapse metrics of one batch, over the embeddings of all ranks."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.methods.base import Monitored
from ssl_pretrain.monitoring import collapse_metrics

NUM_POINTS = 64  # points of a curve that are stored

Scalars = dict[str, Tensor]
Curves = dict[str, Tensor]


@torch.no_grad()
def measure(
    monitored: Monitored, features: Tensor | None = None, max_rows: int = 1024
) -> tuple[Scalars, Curves]:
    """Measure the embeddings of all ranks. Nothing waits for the device.

    If any tensor is not finite, all metrics are NaN. A decomposition would raise an error, and the
    NaN guard reports such a step better.

    Args:
        monitored: The method's tensors on this rank.
        features: The backbone's outputs on this rank, (rows, feature_dim).
        max_rows: Number of rows, over all ranks, that are measured.

    Returns:
        Scalars and vectors on the device, the same on every rank.
    """

    def gather(rows: Tensor) -> Tensor:
        rows = rows.detach()[: max(1, max_rows // process_group.world_size())]
        narrow = rows.is_floating_point() and rows.dtype != torch.float64
        return collectives.gather(rows.float() if narrow else rows)

    z, finite = _zero_unless_finite(gather(monitored.embeddings.flatten(1)))
    scalars, curves = _embedding_metrics(z)
    if monitored.pair is not None:
        (z_a, finite_a), (z_b, finite_b) = (
            _zero_unless_finite(gather(view)) for view in monitored.pair
        )
        scalars |= _pair_metrics(z_a, z_b)
        finite = finite & finite_a & finite_b
    if features is not None:
        rows, finite_features = _zero_unless_finite(gather(features))
        spectrum = collapse_metrics.singular_values(collapse_metrics.centered(rows))
        scalars["feature_rank_centered"] = collapse_metrics.effective_rank(spectrum)
        scalars["alpha_req"] = collapse_metrics.alpha_req(spectrum.square())
        finite = finite & finite_features
    if monitored.assignments is not None:
        usage, entropy = collapse_metrics.prototype_use(
            gather(monitored.assignments), monitored.num_prototypes
        )
        scalars |= {"prototype_usage": usage, "prototype_entropy": entropy}
    return {name: torch.where(finite, value, torch.nan) for name, value in scalars.items()}, curves


def _embedding_metrics(z: Tensor) -> tuple[Scalars, Curves]:
    deviations = collapse_metrics.deviations(z)
    spectrum = collapse_metrics.singular_values(collapse_metrics.centered(z))
    variances = spectrum.square() / max(1, len(z) - 1)
    max_rank = min(len(z) - 1, z.shape[1])
    rank = collapse_metrics.effective_rank(spectrum[:max_rank])
    scalars = {
        "rankme": collapse_metrics.effective_rank(collapse_metrics.singular_values(z)),
        "effective_rank_centered": rank,
        "rank_share": rank / max_rank,
        "top5_ratio": variances[:5].sum() / variances.sum().clamp(min=1e-30),
        "embedding_std": deviations.mean(),
        "embedding_std_min": deviations.min(),
        "embedding_scale": z.std(0, unbiased=False).mean(),
        "uniformity": collapse_metrics.uniformity(z),
    }
    points = torch.linspace(0, max_rank - 1, min(NUM_POINTS, max_rank), device=z.device)
    index = points.round().long()
    return scalars, {
        "spectrum_index": index + 1,
        "spectrum": variances[index],
        "deviations": deviations.sort().values[_evenly_spaced(len(deviations))],
    }


def _evenly_spaced(length: int) -> list[int]:
    num_points = min(NUM_POINTS, length)
    return [round(i * (length - 1) / max(1, num_points - 1)) for i in range(num_points)]


def _pair_metrics(z_a: Tensor, z_b: Tensor) -> Scalars:
    rank = collapse_metrics.positive_rank(z_a, z_b)
    return {
        "alignment": collapse_metrics.alignment(z_a, z_b),
        "pair_cosine": F.cosine_similarity(z_a, z_b, dim=1).mean(),
        "positive_rank": rank,
        "positive_chance": 2 * rank / (len(z_a) + 1),
    }


def _zero_unless_finite(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows and a flag, or zeros if any number is not finite."""
    finite = torch.isfinite(rows).all()
    return torch.where(finite, rows, torch.zeros_like(rows)), finite
