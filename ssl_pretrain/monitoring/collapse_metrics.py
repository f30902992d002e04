"""What embeddings look like, in numbers: each a function of a tensor, with the paper and the value of a healthy and a collapsed batch.

Rows are images. Where a function takes the embeddings of one rank it says so; all others take those of all ranks, gathered.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

EPSILON = 1e-7  # added to each share of the spectrum, RankMe's
FIRST, LAST = 5, 100  # eigenvalues that the power law is fitted to, counted from 1


def singular_values(z: Tensor) -> Tensor:
    """Singular values of `z` (rows, dim), largest first, float64 (min(rows, dim),).

    From the eigenvalues of the smaller of z z^T and z^T z in float64: a few times cheaper than a decomposition of `z`,
    and exact to 1e-8 of the largest, which is below RankMe's epsilon.
    """
    z = z.double()
    product = z.T @ z if z.shape[1] <= z.shape[0] else z @ z.T
    return torch.linalg.eigvalsh(product).flip(0).clamp(min=0).sqrt()


def centred(z: Tensor) -> Tensor:
    """`z` minus its mean row, in float64."""
    z = z.double()
    return z - z.mean(0)


def rank_of(values: Tensor) -> Tensor:
    """exp of the entropy of singular values divided by their sum: RankMe (Garrido et al., ICML 2023, arXiv:2210.02885, eq. 1).

    From 1 (one direction holds everything, or there is nothing) to the number of values (all alike).
    """
    share = values / values.sum().clamp(min=1e-30) + EPSILON
    return torch.exp(-(share * share.log()).sum())


def alpha_req(variances: Tensor) -> Tensor:
    """alpha in variance_i ~ i^-alpha, fitted to variances `FIRST` to `LAST`, which are given largest first: alpha-ReQ
    (Agrawal et al., NeurIPS 2022, arXiv:2202.05808). About 1 is best for what follows; large: few directions hold all.

    Least squares of logarithms, each point weighted by 1 / i so that every octave counts alike. NaN with fewer than two points.
    """
    usable = variances[: min(LAST, len(variances))][FIRST - 1 :]
    index = torch.arange(FIRST, FIRST + len(usable), device=usable.device, dtype=usable.dtype)
    weight = torch.where(
        usable > 1e-12 * variances[:1].clamp(min=1e-30), 1 / index, torch.zeros_like(index)
    )
    x, y = index.log(), usable.clamp(min=1e-300).log()
    total = weight.sum()
    x_mean, y_mean = (weight * x).sum() / total, (weight * y).sum() / total
    return -(weight * (x - x_mean) * (y - y_mean)).sum() / (weight * (x - x_mean).square()).sum()


def deviations(z: Tensor) -> Tensor:
    """Deviation over images of each dimension of unit-length embeddings, times sqrt(dim): (dim,). SimSiam (arXiv:2011.10566,
    section 4.1). On a uniform sphere all are 1; collapsed to a point, 0."""
    return F.normalize(z, dim=1).std(0, unbiased=False) * math.sqrt(z.shape[1])


def alignment(z_a: Tensor, z_b: Tensor) -> Tensor:
    """Mean squared distance of two views' unit-length embeddings, row i of both being one image: Wang and Isola (ICML 2020,
    arXiv:2005.10242, section 4.1, alpha 2). 0: the same; 2: unrelated."""
    return (F.normalize(z_a, dim=1) - F.normalize(z_b, dim=1)).square().sum(1).mean()


def uniformity(z: Tensor, t: float = 2.0) -> Tensor:
    """log of the mean over pairs of images of exp(-t |z_i - z_j|^2), unit length: same paper, section 4.1. 0: all the same;
    -2 t at best, in many dimensions."""
    unit = F.normalize(z, dim=1)
    count = len(unit)
    others = ~torch.eye(count, dtype=torch.bool, device=z.device)
    return torch.log(((2 * t * (unit @ unit.T - 1)).exp() * others).sum() / (count * (count - 1)))


def positive_rank(z_a: Tensor, z_b: Tensor) -> Tensor:
    """Where an image's other view stands among all images' other views by cosine, mean over images: 1 is first. Ties count
    half, so that a collapsed batch of N gives (N + 1) / 2, what chance gives."""
    similarity = F.normalize(z_a, dim=1) @ F.normalize(z_b, dim=1).T
    own = similarity.diagonal()[:, None]
    ahead = (similarity > own).sum(1) + ((similarity == own).sum(1) - 1) / 2
    return (1 + ahead).mean()


def assignments(assigned: Tensor, num_prototypes: int) -> tuple[Tensor, Tensor]:
    """(usage, entropy) of hard assignments (rows,): the share of prototypes with an image, and the entropy of the counts,
    each over the most that so many rows can reach, min(rows, prototypes). 1: evenly spread; 0: one prototype has all."""
    counts = torch.bincount(assigned.flatten(), minlength=num_prototypes).double()
    most = min(assigned.numel(), num_prototypes)
    share = counts / counts.sum()
    entropy = -(share * share.clamp(min=1e-30).log()).sum() / max(math.log(most), 1e-12)
    return (counts > 0).sum() / most, entropy


def norm(tensors: list[Tensor]) -> Tensor:
    """Euclidean norm of all of them together; of the whole where they are sharded over ranks."""
    total = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))
    return total.full_tensor() if hasattr(total, "full_tensor") else total
