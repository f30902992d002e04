"""Losses of Barlow Twins and VICReg, which need neither negatives nor a teacher.

Both compare the dimensions of the embeddings over the global batch. `second_moments` computes the
correlation and covariance matrices over all ranks, with their exact gradient.
"""

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from ssl_pretrain.losses.arguments import check_embeddings, check_two_images
from ssl_pretrain.losses.second_moments import (
    cross_correlation,
    diagonal_error,
    global_covariance,
    off_diagonal_energy,
    variance_hinge,
)
from ssl_pretrain.losses.similarity import upcast


class BarlowTwinsTerms(NamedTuple):
    """Terms of the loss of Barlow Twins."""

    invariance: Tensor
    redundancy: Tensor

    def weighted_sum(self, *, redundancy_weight: float) -> Tensor:
        """Return the loss, equation 1 of the paper."""
        return self.invariance + redundancy_weight * self.redundancy


def barlow_twins(z_a: Tensor, z_b: Tensor, *, redundancy_weight: float = 0.0051) -> Tensor:
    """Loss of Barlow Twins, over the global batch.

    Implements equation 1 of Zbontar et al., ICML 2021 (arXiv:2103.03230). The cross-correlation of
    the dimensions of both views is pulled toward the identity. The gradient is the true one. The
    gradient of the authors' code on W ranks is smaller by a factor of W.

    Args:
        z_a: Embeddings of the first view, shape (local_batch, dim). Standardized inside.
        z_b: Embeddings of the second view, same shape. Row i is the same image as ``z_a[i]``.
        redundancy_weight: Weight lambda of the terms off the diagonal. The paper uses 0.0051.

    Returns:
        Scalar sum over the entries of the correlation matrix (dimensionless). The mean over ranks
        is the global loss.

    Raises:
        ValueError: If the shapes differ or are not 2-D, or the global batch is a single image.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> z_a, z_b = torch.randn(2, 8, 16)
        >>> barlow_twins(z_a, z_b)
        tensor(16.01...)
    """
    return barlow_twins_terms(z_a, z_b).weighted_sum(redundancy_weight=redundancy_weight)


def barlow_twins_terms(z_a: Tensor, z_b: Tensor) -> BarlowTwinsTerms:
    """Return the two terms of `barlow_twins`, before they are weighted.

    The arguments and errors are those of `barlow_twins`.
    """
    check_embeddings("barlow_twins", z_a=z_a, z_b=z_b)
    check_two_images("barlow_twins", z_a, missing="correlation")
    correlation = cross_correlation(z_a, z_b)  # equation 2
    return BarlowTwinsTerms(diagonal_error(correlation), off_diagonal_energy(correlation))


class VICRegTerms(NamedTuple):
    """Terms of the loss of VICReg."""

    invariance: Tensor
    variance: Tensor
    covariance: Tensor

    def weighted_sum(
        self, *, invariance_weight: float, variance_weight: float, covariance_weight: float
    ) -> Tensor:
        """Return the loss, equation 6 of the paper."""
        return (
            invariance_weight * self.invariance
            + variance_weight * self.variance
            + covariance_weight * self.covariance
        )


def vicreg(
    z_a: Tensor,
    z_b: Tensor,
    *,
    invariance_weight: float = 25.0,
    variance_weight: float = 25.0,
    covariance_weight: float = 1.0,
) -> Tensor:
    """Loss of VICReg, over the global batch.

    Implements equation 6 of Bardes, Ponce and LeCun, ICLR 2022 (arXiv:2105.04906), as in the
    authors' code. The invariance term is also divided by the dimension, and the variance term is
    averaged over the views.

    Args:
        z_a: Embeddings of the first view, shape (local_batch, dim). Not normalized.
        z_b: Embeddings of the second view, same shape. Row i is the same image as ``z_a[i]``.
        invariance_weight: Weight lambda of the squared distance between the views of an image.
        variance_weight: Weight mu of the hinge that keeps each standard deviation above 1.
        covariance_weight: Weight nu of the squared covariances between dimensions.

    Returns:
        Scalar loss (dimensionless). The mean over ranks is the global loss.

    Raises:
        ValueError: If the shapes differ or are not 2-D, or the global batch is a single image.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> z_a, z_b = torch.randn(2, 8, 16)
        >>> vicreg(z_a, z_b)
        tensor(46.39...)
    """
    return vicreg_terms(z_a, z_b).weighted_sum(
        invariance_weight=invariance_weight,
        variance_weight=variance_weight,
        covariance_weight=covariance_weight,
    )


def vicreg_terms(z_a: Tensor, z_b: Tensor) -> VICRegTerms:
    """Return the three terms of `vicreg`, before they are weighted.

    The arguments and errors are those of `vicreg`.
    """
    check_embeddings("vicreg", z_a=z_a, z_b=z_b)
    check_two_images("vicreg", z_a, missing="variance")
    z_a, z_b = upcast(z_a), upcast(z_b)
    dim = z_a.shape[1]
    covariance_a, covariance_b = global_covariance(z_a), global_covariance(z_b)  # equation 3

    invariance = F.mse_loss(z_a, z_b)  # equation 5, also divided by the dimension
    variance = (variance_hinge(covariance_a) + variance_hinge(covariance_b)) / 2  # equation 1
    covariance = (  # equation 4
        off_diagonal_energy(covariance_a) / dim + off_diagonal_energy(covariance_b) / dim
    )
    return VICRegTerms(invariance, variance, covariance)
