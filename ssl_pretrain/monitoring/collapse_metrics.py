"""Collapse metrics as functions of tensors, with the value of a healthy and a collapsed batch.

Rows are images, of all ranks.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

EPSILON = 1e-7  # RankMe's, added to each share of the spectrum
FIRST, LAST = 5, 100  # eigenvalues that the power law is fitted to, counted from 1


def singular_values(z: Tensor) -> Tensor:
    """Return the singular values of a matrix, largest first, in float64.

    They come from the eigenvalues of the smaller one of z z^T and z^T z. This is several times
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
    """Return the effective rank: RankMe (Garrido et al., ICML 2023, arXiv:2210.02885, equation 1).

    It is the exponential of the entropy of the normalized singular values. It ranges from 1, if all
    rows are on a line or zero, to the number of values, if they are equal.
    """
    share = singular_values / singular_values.sum().clamp(min=1e-30) + EPSILON
    return torch.exp(-(share * share.log()).sum())


def alpha_req(variances: Tensor) -> Tensor:
    """Return alpha of the power law variance_i ~ i^-alpha.

    alpha-ReQ (Agrawal et al., NeurIPS 2022, arXiv:2202.05808). About 1 is best for downstream
    tasks. If it is large, few directions hold nearly all the variance.

    The fit is least squares of logarithms over the variances `FIRST` to `LAST`. Each point has the
    weight 1 / i, so that every octave counts the same. With fewer than two points it is NaN.

    Args:
        variances: Eigenvalues of the covariance, largest first.
    """
    usable = variances[: min(LAST, len(variances))][FIRST - 1 :]
    index = torch.arange(FIRST, FIRST + len(usable), device=usable.device, dtype=usable.dtype)
    positive = usable > 1e-12 * variances[:1].clamp(min=1e-30)
    weight = torch.where(positive, 1 / index, torch.zeros_like(index))
    x, y = index.log(), usable.clamp(min=1e-300).log()
    total = weight.sum()
    x_mean, y_mean = (weight * x).sum() / total, (weight * y).sum() / total
    return -(weight * (x - x_mean) * (y - y_mean)).sum() / (weight * (x - x_mean).square()).sum()


def deviations(z: Tensor) -> Tensor:
    """Return the standard deviation of each dimension of unit-length embeddings, times sqrt(dim).

    SimSiam (Chen and He, arXiv:2011.10566, section 4.1). All are 1 on a uniform sphere and 0 if the
    embeddings have collapsed to a point.
    """
    return F.normalize(z, dim=1).std(0, unbiased=False) * math.sqrt(z.shape[1])


def alignment(z_a: Tensor, z_b: Tensor) -> Tensor:
    """Return the mean squared distance of the unit-length embeddings of two views.

    Wang and Isola (ICML 2020, arXiv:2005.10242, section 4.1, alpha = 2). It is 0 for equal views
    and 2 for unrelated ones.

    Args:
        z_a: Embeddings of the first view, (num_rows, dim).
        z_b: Embeddings of the second view. Row i is the same image as ``z_a[i]``.
    """
    return (F.normalize(z_a, dim=1) - F.normalize(z_b, dim=1)).square().sum(1).mean()


def uniformity(z: Tensor, t: float = 2.0) -> Tensor:
    """Return the log of the mean of exp(-t |z_i - z_j|^2) over pairs of unit-length embeddings.

    Wang and Isola, section 4.1. It is 0 if all are equal, and at best -2 t in many dimensions.
    """
    unit = F.normalize(z, dim=1)
    count = len(unit)
    others = ~torch.eye(count, dtype=torch.bool, device=z.device)
    return torch.log(((2 * t * (unit @ unit.T - 1)).exp() * others).sum() / (count * (count - 1)))


def positive_rank(z_a: Tensor, z_b: Tensor) -> Tensor:
    """Return the rank of an image's second view among all second views by cosine, mean over images.

    The first rank is 1. Ties count half, so that a collapsed batch of N images has (N + 1) / 2,
    which is also the value of random embeddings.
    """
    similarity = F.normalize(z_a, dim=1) @ F.normalize(z_b, dim=1).T
    positive = similarity.diagonal()[:, None]
    num_ahead = (similarity > positive).sum(1) + ((similarity == positive).sum(1) - 1) / 2
    return (1 + num_ahead).mean()


def prototype_use(assignments: Tensor, num_prototypes: int) -> tuple[Tensor, Tensor]:
    """Return how many prototypes are used and how evenly.

    Both numbers are relative to the maximum for so many rows, min(num_rows, num_prototypes).

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
