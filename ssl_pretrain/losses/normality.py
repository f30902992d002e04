"""Loss of LeJEPA: sketched isotropic Gaussian regularization (SIGReg) and prediction.

SIGReg projects the embeddings onto random directions, the slices. The statistic of Epps and Pulley
measures how far each projection is from a standard normal distribution.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.losses.characteristic import (
    LAST_POINT,
    NUM_POINTS,
    characteristic_sums,
    points,
)
from ssl_pretrain.losses.random_slices import random_slices
from ssl_pretrain.losses.similarity import upcast


def sigreg(
    z: Tensor, *, step: int | Tensor, seed: int | Tensor = 0, num_slices: int = 1024
) -> Tensor:
    """Sketched isotropic Gaussian regularization, over the global batch.

    Implements the SIGReg objective of Balestriero and LeCun, 2025 (arXiv:2511.08544) with the
    statistic of Epps and Pulley, as in the authors' code. The statistic of a projection x is N
    times the integral of |mean(exp(i t x)) - exp(-t^2 / 2)|^2 exp(-t^2 / 2) over t from -3 to 3,
    where N is the number of images in the global batch.

    Its mean is 1.05 for standard normal embeddings at any N. It is 0.40 N if all embeddings are 0.

    Args:
        z: Embeddings, shape (local_batch, dim) or (local_batch, views, dim). Not normalized. Views
            are measured separately.
        step: Number of optimizer steps before this one, the same on all ranks. Every step has
            new slices. It may be a tensor on the device.
        seed: Seed of the slices, the same on all ranks. It may be a tensor on the device.
        num_slices: Number of slices. The authors use 1,024, and 256 for small data sets.

    Returns:
        Scalar mean over slices and views (dimensionless), the same on all ranks.

    Raises:
        ValueError: If ``z`` is not 2- or 3-dimensional, or there are no slices.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> sigreg(torch.randn(4096, 16), step=0)
        tensor(0.99...)
        >>> sigreg(torch.zeros(4096, 16), step=0) / 4096
        tensor(0.40...)
    """
    if z.ndim not in (2, 3):
        raise ValueError(
            "sigreg: z must be (local_batch, dim) or (local_batch, views, dim), "
            f"got {tuple(z.shape)}"
        )
    _check_num_slices("sigreg", num_slices)
    views = z if z.ndim == 3 else z[:, None]
    return _sliced_statistic(views, _slices(z, step, seed, num_slices))


class LeJEPATerms(NamedTuple):
    """Terms of the loss of LeJEPA."""

    prediction: Tensor
    sigreg: Tensor

    def weighted_sum(self, *, sigreg_weight: float) -> Tensor:
        """Return the loss, where lambda is the weight of SIGReg."""
        return sigreg_weight * self.sigreg + (1 - sigreg_weight) * self.prediction


def lejepa(
    z: Tensor,
    *,
    step: int | Tensor,
    seed: int | Tensor = 0,
    num_global_views: int = 2,
    num_slices: int = 1024,
    sigreg_weight: float = 0.05,
) -> Tensor:
    """Loss of LeJEPA, over the global batch.

    Implements the objective of Balestriero and LeCun, 2025 (arXiv:2511.08544): lambda * SIGReg +
    (1 - lambda) * prediction. The prediction term is the mean squared distance of the embeddings
    of all views to the mean embedding of the image's global views, divided by the dimension.
    Gradients flow through both the views and the mean.

    Args:
        z: Embeddings of all views, global ones first, shape (local_batch, views, dim).
        step: Number of optimizer steps before this one, as in `sigreg`.
        seed: Seed of the slices, as in `sigreg`.
        num_global_views: Number of global views V_g.
        num_slices: Number of slices, as in `sigreg`.
        sigreg_weight: Weight lambda of SIGReg, in [0, 1]. The authors use 0.05, and 0.02 with four
            equal views. The statistic grows with the batch, so lambda depends on its size.

    Returns:
        Scalar loss (dimensionless). The mean over ranks is the global loss.

    Raises:
        ValueError: If ``z`` is not 3-dimensional or has fewer than two views, or another argument
            is out of range.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> z = torch.randn(64, 1, 16) + 0.1 * torch.randn(64, 4, 16)
        >>> lejepa(z, step=0)
        tensor(0.07...)
    """
    if not 0 <= sigreg_weight <= 1:
        raise ValueError(f"lejepa: sigreg_weight must be in [0, 1], got {sigreg_weight}")
    terms = lejepa_terms(
        z, step=step, seed=seed, num_global_views=num_global_views, num_slices=num_slices
    )
    return terms.weighted_sum(sigreg_weight=sigreg_weight)


def lejepa_terms(
    z: Tensor, *, step: int | Tensor, seed: int | Tensor, num_global_views: int, num_slices: int
) -> LeJEPATerms:
    """Return the two terms of `lejepa`, before they are weighted.

    The arguments and errors are those of `lejepa`.
    """
    if z.ndim != 3 or z.shape[1] < 2:
        raise ValueError(
            "lejepa: z must be (local_batch, views, dim) with at least 2 views, "
            f"got {tuple(z.shape)}"
        )
    if not 1 <= num_global_views <= z.shape[1]:
        raise ValueError(
            f"lejepa: num_global_views must be from 1 to {z.shape[1]}, got {num_global_views}"
        )
    _check_num_slices("lejepa", num_slices)
    z = upcast(z)
    prediction = (z[:, :num_global_views].mean(1, keepdim=True) - z).square().mean()
    return LeJEPATerms(prediction, _sliced_statistic(z, _slices(z, step, seed, num_slices)))


def _sliced_statistic(z: Tensor, slices: Tensor) -> Tensor:
    """Return the statistic of Epps and Pulley, averaged over views and slices.

    In a single process, with the integral over t from 0 to 3 doubled by symmetry::

        x = (z @ slices)[..., None] * t                         # (images, views, slices, points)
        error = (x.cos().mean(0) - phi) ** 2 + x.sin().mean(0) ** 2
        statistic = len(z) * 2 * torch.trapezoid(error * phi, t).mean()

    Args:
        z: Embeddings, shape (local_batch, views, dim).
        slices: Columns of unit length, shape (dim, num_slices).
    """
    num_images = len(z) * process_group.world_size()
    with torch.autocast(z.device.type, enabled=False):
        sums = collectives.reduce_sum(characteristic_sums(upcast(z), slices))
        return num_images * integral(sums / num_images).mean()


def integral(means: Tensor) -> Tensor:
    """Return the weighted integral of |means - exp(-t^2 / 2)|^2 over t from -3 to 3.

    Args:
        means: Empirical characteristic function, its cosines and sines, shape (2, ..., points).

    Returns:
        Shape (...), the statistic of Epps and Pulley divided by the number of images.
    """
    t = points(means)
    # Both the characteristic function of the standard normal distribution and the weight.
    phi = (-t.square() / 2).exp()
    cosines, sines = means
    error = (cosines - phi).square() + sines.square()
    spacing = LAST_POINT / (NUM_POINTS - 1)
    return 2 * torch.trapezoid(error * phi, dx=spacing)  # the integrand is even


def _slices(z: Tensor, step: int | Tensor, seed: int | Tensor, num_slices: int) -> Tensor:
    return random_slices(
        z.shape[-1],
        num_slices,
        seed=seed,
        step=step,
        device=z.device,
        dtype=torch.promote_types(z.dtype, torch.float32),
    )


def _check_num_slices(loss: str, num_slices: int) -> None:
    if num_slices < 1:
        raise ValueError(f"{loss}: num_slices must be at least 1, got {num_slices}")
