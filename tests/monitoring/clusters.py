"""Random features of a few overlapping classes."""

import torch
from torch import Tensor


def clusters(
    num_rows: int, dim: int = 6, num_classes: int = 4, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return features and their classes. The centers are the same for all seeds."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (num_rows,), generator=generator)
    centers = torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(99))
    return centers[labels] + 1.5 * torch.randn(num_rows, dim, generator=generator), labels
