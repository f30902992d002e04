"""Loss of MAE: the pixels of masked patches are reconstructed."""

import math

import torch
from torch import Tensor

from ssl_pretrain.losses.similarity import upcast

VARIANCE_EPS = 1e-6  # added to the variance of a patch, as in the authors' code


def mae(predictions: Tensor, images: Tensor, masked: Tensor, *, normalize: bool = True) -> Tensor:
    """Mean squared error of MAE on the pixels of masked patches.

    Implements section 3 of He et al., CVPR 2022 (arXiv:2111.06377).

    Args:
        predictions: Pixels of all patches, row by row, shape (local_batch, patches, patch_size *
            patch_size * C). The pixels of a patch are row by row, with the channels last.
        images: The images, normalized as the backbone's input, shape (local_batch, C, height,
            width).
        masked: True for the patches that count, bool (local_batch, patches).
        normalize: Subtract the mean of each patch from its target, and divide by the standard
            deviation. The authors' recipe does so.

    Returns:
        Scalar mean over this rank's images of the mean over an image's masked patches
        (dimensionless). The mean over ranks is the global loss.

    Raises:
        ValueError: If the shapes do not match.

    Example:
        >>> images = torch.ones(2, 3, 32, 32)
        >>> masked = torch.arange(4).expand(2, 4) > 0
        >>> mae(torch.zeros(2, 4, 768), images, masked, normalize=False)
        tensor(1.)
    """
    targets = cut_patches(upcast(images), _check_shapes(predictions, images, masked))
    if normalize:
        variance, mean = torch.var_mean(targets, dim=2, keepdim=True)
        targets = (targets - mean) / (variance + VARIANCE_EPS).sqrt()
    errors = (upcast(predictions) - targets).square().mean(2)
    weights = masked.to(errors.dtype)
    return ((errors * weights).sum(1) / weights.sum(1).clamp(min=1)).mean()


def cut_patches(images: Tensor, patch_size: int) -> Tensor:
    """Return the pixels of every patch, shape (B, patches, patch_size * patch_size * C)."""
    batch, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    grid = images.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, -1)


def _check_shapes(predictions: Tensor, images: Tensor, masked: Tensor) -> int:
    """Return the patch size, or raise ValueError unless the arguments of `mae` match."""
    if images.ndim != 4:
        raise ValueError(
            f"mae: images must be (local_batch, C, height, width), got {tuple(images.shape)}"
        )
    num_images, channels, height, width = images.shape
    patch_size = math.isqrt(predictions.shape[-1] // channels)
    patches = (height // max(1, patch_size)) * (width // max(1, patch_size))
    expected = num_images, patches, channels * patch_size**2
    if predictions.shape != expected or patches * patch_size**2 != height * width:
        raise ValueError(
            f"mae: predictions must be (local_batch, patches, {channels} * patch_size**2) for "
            f"images of shape {tuple(images.shape)}, got {tuple(predictions.shape)}"
        )
    if masked.shape != predictions.shape[:2]:
        raise ValueError(
            f"mae: masked must be {tuple(predictions.shape[:2])}, got {tuple(masked.shape)}"
        )
    return patch_size
