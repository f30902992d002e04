"""Collapse metrics of one batch over all ranks, with their healthy and collapsed values.

Each row of a matrix of embeddings or features is one image.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.losses import characteristic, normality
from ssl_pretrain.losses.random_slices import random_slices
from ssl_pretrain.methods.base import Monitored

EPSILON = 1e-7  # added to each share of the spectrum, as in RankMe
FIRST_EIGENVALUE, LAST_EIGENVALUE = 5, 100  # range of the power-law fit, counted from 1
NUM_SLICES = 256  # random directions in which the distribution of the embeddings is measured
MAX_CURVE_POINTS = 64  # largest number of points per curve in plots.jsonl

Scalars = dict[str, Tensor]
Curves = dict[str, Tensor]


@torch.no_grad()
def measure(
    monitored: Monitored, features: Tensor | None = None, max_rows: int = 1024
) -> tuple[Scalars, Curves]:
    """Measure the embeddings of all ranks, without waiting for the device.

    If any tensor has a non-finite value, all scalars are NaN. Decomposing such a tensor would
    raise an error, and the NaN guard gives a better report of the step.

    Args:
        monitored: The method's tensors on this rank.
        features: The backbone's outputs on this rank, (rows, feature_dim).
        max_rows: Largest number of rows to measure, over all ranks.

    Returns:
        Scalars and vectors on the device, the same on every rank.
    """

    def gather(rows: Tensor) -> Tensor:
        rows = rows.detach()[: max(1, max_rows // process_group.world_size())]
        is_low_precision = rows.is_floating_point() and rows.dtype != torch.float64
        return collectives.gather(rows.float() if is_low_precision else rows)

    z, finite = _zero_unless_finite(gather(monitored.embeddings.flatten(1)))
    scalars, curves = _embedding_metrics(z)
    if monitored.target_is_gaussian:
        scalars["gaussianity"] = gaussianity(z)
    if monitored.pair is not None:
        (z_a, finite_a), (z_b, finite_b) = (
            _zero_unless_finite(gather(view)) for view in monitored.pair
        )
        scalars |= _pair_metrics(z_a, z_b)
        finite = finite & finite_a & finite_b
    if features is not None:
        rows, finite_features = _zero_unless_finite(gather(features))
        spectrum = singular_values(centered(rows))
        scalars["feature_rank_centered"] = effective_rank(spectrum)
        scalars["alpha_req"] = alpha_req(spectrum.square())
        finite = finite & finite_features
    if monitored.assignments is not None:
        assignments = gather(monitored.assignments)
        usage, entropy = prototype_usage_and_entropy(assignments, monitored.num_prototypes)
        scalars |= {"prototype_usage": usage, "prototype_entropy": entropy}
    return {name: torch.where(finite, value, torch.nan) for name, value in scalars.items()}, curves


def _embedding_metrics(z: Tensor) -> tuple[Scalars, Curves]:
    stds = normalized_stds(z)
    spectrum = singular_values(centered(z))
    variances = spectrum.square() / max(1, len(z) - 1)
    max_rank = min(len(z) - 1, z.shape[1])
    rank = effective_rank(spectrum[:max_rank])
    scalars = {
        "rankme": effective_rank(singular_values(z)),
        "effective_rank_centered": rank,
        "rank_share": rank / max_rank,
        "top5_ratio": variances[:5].sum() / variances.sum().clamp(min=1e-30),
        "embedding_std": stds.mean(),
        "embedding_std_min": stds.min(),
        "embedding_scale": z.std(0, unbiased=False).mean(),
        "uniformity": uniformity(z),
    }
    points = torch.linspace(0, max_rank - 1, min(MAX_CURVE_POINTS, max_rank), device=z.device)
    index = points.round().long()
    return scalars, {
        "spectrum_index": index + 1,
        "spectrum": variances[index],
        "deviations": stds.sort().values[_evenly_spaced(len(stds))],
    }


def _evenly_spaced(length: int) -> list[int]:
    """Return up to `MAX_CURVE_POINTS` indices of a vector, from the first to the last."""
    num_points = min(MAX_CURVE_POINTS, length)
    return [round(i * (length - 1) / max(1, num_points - 1)) for i in range(num_points)]


def _pair_metrics(z_a: Tensor, z_b: Tensor) -> Scalars:
    rank = positive_rank(z_a, z_b)
    return {
        "alignment": alignment(z_a, z_b),
        "pair_cosine": F.cosine_similarity(z_a, z_b, dim=1).mean(),
        "positive_rank": rank,
        "positive_chance": 2 * rank / (len(z_a) + 1),
    }


def _zero_unless_finite(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows, or zeros if any value is not finite, and whether all values are finite."""
    finite = torch.isfinite(rows).all()
    return torch.where(finite, rows, torch.zeros_like(rows)), finite


def gaussianity(z: Tensor) -> Tensor:
    """Return 1 minus the statistic of SIGReg relative to that of a collapsed batch.

    It is near 1 for standard normal embeddings, 0 if all embeddings are 0, and negative if all are
    at another point or very far apart. The slices are always the same.

    Args:
        z: Embeddings of all ranks, (num_rows, dim).
    """
    slices = random_slices(z.shape[1], NUM_SLICES, seed=0, step=0, device=z.device, dtype=z.dtype)

    def error(z: Tensor) -> Tensor:
        sums = characteristic.characteristic_sums(z[:, None], slices)
        return normality.integral(sums / len(z)).mean()

    return 1 - error(z) / error(torch.zeros_like(z[:1]))


def singular_values(z: Tensor) -> Tensor:
    """Return the singular values of a matrix, largest first, in float64.

    They come from the eigenvalues of z z^T or z^T z, whichever is smaller. This is several times
    cheaper than a decomposition of `z`. The error is below 1e-8 of the largest value, which is less
    than RankMe's epsilon.

    Args:
        z: Rows, (num_rows, dim).

    Returns:
        Shape (min(num_rows, dim),).
    """
    z = z.double()
    product = z.T @ z if z.shape[1] <= z.shape[0] else z @ z.T
    return torch.linalg.eigvalsh(product).flip(0).clamp(min=0).sqrt()


def centered(z: Tensor) -> Tensor:
    """Subtract the mean row, in float64."""
    z = z.double()
    return z - z.mean(0)


def effective_rank(singular_values: Tensor) -> Tensor:
    """Return RankMe (Garrido et al., ICML 2023, arXiv:2210.02885, equation 1).

    This effective rank is the exponential of the entropy of the normalized singular values. It
    ranges from 1, if all rows lie on one line through the origin, to the number of values, if all
    values are equal.
    """
    share = singular_values / singular_values.sum().clamp(min=1e-30) + EPSILON
    return torch.exp(-(share * share.log()).sum())


def alpha_req(variances: Tensor) -> Tensor:
    """Return alpha of the power law variance_i ~ i^-alpha.

    alpha-ReQ (Agrawal et al., NeurIPS 2022, arXiv:2202.05808). About 1 is best for downstream
    tasks. If it is large, few directions hold nearly all the variance.

    A line is fitted by least squares to the logarithms of variances `FIRST_EIGENVALUE` to
    `LAST_EIGENVALUE`. Point i has weight 1 / i, so that every octave counts equally. The result is
    NaN with fewer than two points.

    Args:
        variances: Eigenvalues of the covariance, largest first.
    """
    usable = variances[: min(LAST_EIGENVALUE, len(variances))][FIRST_EIGENVALUE - 1 :]
    end = FIRST_EIGENVALUE + len(usable)
    index = torch.arange(FIRST_EIGENVALUE, end, device=usable.device, dtype=usable.dtype)
    positive = usable > 1e-12 * variances[:1].clamp(min=1e-30)
    weight = torch.where(positive, 1 / index, torch.zeros_like(index))
    x, y = index.log(), usable.clamp(min=1e-300).log()
    total = weight.sum()
    x_mean, y_mean = (weight * x).sum() / total, (weight * y).sum() / total
    return -(weight * (x - x_mean) * (y - y_mean)).sum() / (weight * (x - x_mean).square()).sum()


def normalized_stds(z: Tensor) -> Tensor:
    """Return the standard deviation of each dimension of unit-length embeddings, times sqrt(dim).

    SimSiam (Chen and He, arXiv:2011.10566, section 4.1). All are about 1 if the embeddings
    are spread uniformly over the sphere, and 0 if they have collapsed to a point.
    """
    return F.normalize(z, dim=1).std(0, unbiased=False) * math.sqrt(z.shape[1])


def alignment(z_a: Tensor, z_b: Tensor) -> Tensor:
    """Return the mean squared distance between the unit-length embeddings of two views.

    Wang and Isola (ICML 2020, arXiv:2005.10242, section 4.1, alpha = 2). It is 0 for equal views
    and 2 for unrelated ones.

    Args:
        z_a: Embeddings of the first view, (num_rows, dim).
        z_b: Embeddings of the second view. Row i is the same image as ``z_a[i]``.
    """
    return (F.normalize(z_a, dim=1) - F.normalize(z_b, dim=1)).square().sum(1).mean()


def uniformity(z: Tensor, t: float = 2.0) -> Tensor:
    """Return the log of the mean of exp(-t |z_i - z_j|^2) over pairs of unit-length embeddings.

    Wang and Isola, section 4.1. It is 0 if all embeddings are equal. Its best value in high
    dimensions is about -2 t.
    """
    unit = F.normalize(z, dim=1)
    count = len(unit)
    off_diagonal = ~torch.eye(count, dtype=torch.bool, device=z.device)
    kernel = (2 * t * (unit @ unit.T - 1)).exp()
    return torch.log((kernel * off_diagonal).sum() / (count * (count - 1)))


def positive_rank(z_a: Tensor, z_b: Tensor) -> Tensor:
    """Return the mean rank of an image's second view among all second views, by cosine.

    Ranks start at 1. Ties count half, so that the mean rank of a collapsed batch of N images is
    (N + 1) / 2, the same as for random embeddings.
    """
    similarity = F.normalize(z_a, dim=1) @ F.normalize(z_b, dim=1).T
    positive = similarity.diagonal()[:, None]
    num_ahead = (similarity > positive).sum(1) + ((similarity == positive).sum(1) - 1) / 2
    return (1 + num_ahead).mean()


def prototype_usage_and_entropy(assignments: Tensor, num_prototypes: int) -> tuple[Tensor, Tensor]:
    """Return the share of prototypes in use, and how evenly they are used.

    Both numbers are relative to the maximum for this many rows, min(num_rows, num_prototypes).

    Args:
        assignments: Index of the prototype of each row, (num_rows,).
        num_prototypes: Number of prototypes.

    Returns:
        Share of prototypes with at least one row, and normalized entropy of the counts. The entropy
        is 1 if the rows are spread evenly and 0 if one prototype has all of them.
    """
    counts = torch.bincount(assignments.flatten(), minlength=num_prototypes).double()
    maximum = min(assignments.numel(), num_prototypes)
    share = counts / counts.sum()
    entropy = -(share * share.clamp(min=1e-30).log()).sum() / max(math.log(maximum), 1e-12)
    return (counts > 0).sum() / maximum, entropy
