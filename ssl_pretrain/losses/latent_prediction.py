"""Loss of I-JEPA: features of masked blocks are predicted from the visible patches."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_pretrain.losses.similarity import upcast


def ijepa(predictions: Tensor, targets: Tensor, valid: Tensor | None = None) -> Tensor:
    """Smooth L1 loss of I-JEPA between predicted and actual features of the target blocks.

    Implements section 3 of Assran et al., CVPR 2023 (arXiv:2301.08243), with the smooth L1 distance
    of the authors' code in place of the paper's squared one. Only patches of one image are
    compared. All images count equally, whatever the sizes of their blocks.

    Args:
        predictions: The predictor's outputs, shape (local_batch, blocks, patches, dim).
        targets: The teacher's features of the same patches, same shape. The authors normalize each
            patch to mean 0 and variance 1.
        valid: False for padding, which has no weight, bool (local_batch, blocks, patches). None if
            there is no padding.

    Returns:
        Scalar mean over this rank's images. The mean over ranks is the global loss.

    Raises:
        ValueError: If the shapes do not match.

    Example:
        >>> ijepa(torch.zeros(2, 4, 6, 8), torch.ones(2, 4, 6, 8))
        tensor(0.5000)
    """
    if predictions.ndim != 4 or predictions.shape != targets.shape:
        raise ValueError(
            "ijepa: predictions and targets must both be (local_batch, blocks, patches, dim), got "
            f"{tuple(predictions.shape)} and {tuple(targets.shape)}"
        )
    if valid is not None and valid.shape != predictions.shape[:3]:
        raise ValueError(
            f"ijepa: valid must be {tuple(predictions.shape[:3])}, got {tuple(valid.shape)}"
        )
    distances = F.smooth_l1_loss(upcast(predictions), upcast(targets), reduction="none").mean(3)
    if valid is None:
        return distances.mean()
    # Padding may have any value, even one that is not finite.
    sums = torch.where(valid, distances, 0.0).sum((1, 2))
    return (sums / valid.sum((1, 2)).clamp(min=1)).mean()
