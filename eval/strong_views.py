"""AutoAugment and random erasing of training views, as V-JEPA's code takes them from timm."""

import random
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import auto_augment_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from ssl_pretrain import rng

POLICY = "original"  # timm's name for the policy of the AutoAugment paper
ERASING = 0.25  # probability of erasing a rectangle
AUGMENT_SEED, ERASE_SEED = 0, 1


def auto_augment(view: Tensor, epoch: int, index: int, *, mean: tuple[float, ...]) -> Tensor:
    """Augment one view with AutoAugment (Cubuk et al., arXiv:1805.09501).

    The random choices only depend on the epoch and the image.

    Args:
        view: View, uint8 (3, height, width).
        epoch: Training epoch.
        index: Index of the image in its data set.
        mean: Fill color for pixels from outside the view, in [0, 1].

    Returns:
        The augmented view, with the same shape and data type.
    """
    _seed(AUGMENT_SEED, epoch, index)
    image = Image.fromarray(view.permute(1, 2, 0).contiguous().numpy())
    augmented = _build_policy(mean, min(view.shape[-2:]))(image)
    return torch.from_numpy(np.array(augmented)).permute(2, 0, 1)


def erase(views: Tensor, epoch: int, indices: Tensor) -> Tensor:
    """Replace a rectangle of some normalized views by noise, in place.

    The random choices only depend on the epoch and the image, not on the rank.

    Args:
        views: Normalized views, (batch, 3, height, width).
        epoch: Training epoch.
        indices: Indices of the images in their data set, (batch,).

    Returns:
        The views.
    """
    erasing = RandomErasing(ERASING, mode="pixel", device=views.device.type)
    with torch.random.fork_rng([views.device] if views.is_cuda else []):
        for view, index in zip(views, indices.tolist()):
            _seed(ERASE_SEED, epoch, index)
            erasing(view)
    return views


def _seed(purpose: int, epoch: int, index: int) -> None:
    seed = rng.derive_seed(purpose, epoch, index)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@lru_cache(maxsize=4)
def _build_policy(mean: tuple[float, ...], shorter_side: int) -> Any:
    fill = tuple(min(255, round(255 * value)) for value in mean)
    options = {"translate_const": int(shorter_side * 0.45), "img_mean": fill}
    return auto_augment_transform(POLICY, options | {"interpolation": Image.Resampling.BICUBIC})
