"""Loss of alignment and uniformity on the unit sphere."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.losses.arguments import check_embeddings, check_positive, check_two_images
from ssl_pretrain.losses.half_precision import half_rows
from ssl_pretrain.losses.similarity import upcast
from ssl_pretrain.losses.tiles import symmetric_log_sum_exp


class AlignUniformTerms(NamedTuple):
    """Terms of the loss of alignment and uniformity."""

    align: Tensor
    uniform: Tensor

    def weighted_sum(self, *, align_weight: float, uniform_weight: float) -> Tensor:
        """Return the weighted sum of both terms, which is the loss."""
        return align_weight * self.align + uniform_weight * self.uniform


def align_uniform(
    z_a: Tensor,
    z_b: Tensor,
    *,
    align_weight: float = 1.0,
    uniform_weight: float = 1.0,
    alpha: float = 2.0,
    t: float = 2.0,
) -> Tensor:
    """Alignment of the views of an image and uniformity of all images, over the global batch.

    Implements L_align and L_uniform of section 4.1 of Wang and Isola, ICML 2020 (arXiv:2005.10242).
    Uniformity is computed for each view separately and averaged, as in the authors' code.

    Args:
        z_a: Embeddings of the first view, shape (local_batch, dim). Normalized inside.
        z_b: Embeddings of the second view, same shape. Row i is the same image as ``z_a[i]``.
        align_weight: Weight of the mean distance between the views of an image.
        uniform_weight: Weight of the logarithm of the mean Gaussian kernel between two images.
        alpha: Power of the distance.
        t: Sharpness of the Gaussian kernel, the factor of the squared distance.

    Returns:
        Scalar loss (dimensionless). The mean over ranks is the global loss.

    Raises:
        ValueError: If the shapes differ or are not 2-D, ``alpha`` or ``t`` is not positive, or the
            global batch is a single image.

    Example:
        >>> poles = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        >>> align_uniform(poles, poles)  # -t times the squared distance of the poles
        tensor(-8.)
    """
    terms = align_uniform_terms(z_a, z_b, alpha=alpha, t=t)
    return terms.weighted_sum(align_weight=align_weight, uniform_weight=uniform_weight)


def align_uniform_terms(z_a: Tensor, z_b: Tensor, *, alpha: float, t: float) -> AlignUniformTerms:
    """Return the two terms of `align_uniform`, before they are weighted.

    The arguments and errors are those of `align_uniform`.
    """
    check_embeddings("align_uniform", z_a=z_a, z_b=z_b)
    check_positive("align_uniform", alpha=alpha, t=t)
    check_two_images("align_uniform", z_a, missing="uniformity")
    half_a, half_b = half_rows(z_a), half_rows(z_b)
    z_a, z_b = F.normalize(upcast(z_a)), F.normalize(upcast(z_b))
    squared_distance = (z_a - z_b).square().sum(1).clamp(min=1e-12)
    align = squared_distance.pow(alpha / 2).mean()  # L_align of section 4.1
    # L_uniform of section 4.1
    uniform = (log_mean_gaussian(z_a, t, half_a) + log_mean_gaussian(z_b, t, half_b)) / 2
    return AlignUniformTerms(align, uniform)


def log_mean_gaussian(z: Tensor, t: float, half: Tensor | None = None) -> Tensor:
    """Return the logarithm of the mean of exp(-t |z_i - z_j|^2) over all pairs of the global batch.

    Args:
        z: Embeddings of unit length, shape (local_batch, dim).
        t: Sharpness of the Gaussian kernel.
        half: The embeddings in half precision that `z` was normalized from, if there are any.

    Returns:
        Scalar, at most 0 and the same on all ranks.
    """
    # |z_i - z_j|^2 = 2 - 2 z_i @ z_j for unit vectors
    log_row_sums, _ = symmetric_log_sum_exp(z, scale=2 * t, half=half)
    total = collectives.reduce_sum(torch.exp(log_row_sums - 2 * t).sum())
    num_rows = len(z) * process_group.world_size()
    return torch.log(total) - math.log(num_rows * (num_rows - 1))
