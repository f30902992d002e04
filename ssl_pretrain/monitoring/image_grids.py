"""Draw the pictures that a run saves. They show views, and queries with their nearest neighbors."""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import make_grid, save_image

NUM_IMAGES = 8  # rows of a grid of views
BORDER = 3  # width in pixels of the frame around a neighbor
GREEN, RED = (0.18, 0.56, 0.36), (0.78, 0.27, 0.24)


def view_grid(views: list[Tensor], mean: list[float], std: list[float]) -> Tensor:
    """Draw the views of the first images, one row per image.

    Args:
        views: Normalized views, each (batch, 3, size, size).
        mean: Channel means that the normalization subtracted.
        std: Channel standard deviations by which the normalization divided.

    Returns:
        Picture (3, height, width) in [0, 1].
    """
    size = max(view.shape[-1] for view in views)
    offset, scale = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    columns = []
    for view in views:
        pixels = view[:NUM_IMAGES].float().cpu() * scale + offset
        height, width = view.shape[-2:]
        columns.append(F.pad(pixels, (0, size - width, 0, size - height), value=1.0))
    images = torch.stack(columns, dim=1).flatten(0, 1)
    return make_grid(images, nrow=len(views), padding=2, pad_value=1.0).clamp(0, 1)


def neighbor_grid(queries: Tensor, neighbors: Tensor, same_class: Tensor) -> Tensor:
    """Draw each query and its neighbors in a row.

    Neighbors of the query's class have a green frame, and others have a red frame.

    Args:
        queries: Images, uint8 (num_queries, 3, size, size).
        neighbors: Images, uint8 (num_queries, k, 3, size, size).
        same_class: True for neighbors of the query's class, bool (num_queries, k).

    Returns:
        Picture (3, height, width) in [0, 1].
    """
    images = torch.cat([queries[:, None], neighbors], dim=1).float() / 255
    framed = F.pad(images, (BORDER, BORDER, BORDER, BORDER), value=1.0)
    colors = torch.where(same_class[..., None], torch.tensor(GREEN), torch.tensor(RED))
    frame = torch.ones(framed.shape[-2:], dtype=torch.bool)
    frame[BORDER:-BORDER, BORDER:-BORDER] = False
    framed[:, 1:] = torch.where(frame, colors[..., None, None], framed[:, 1:])
    return make_grid(framed.flatten(0, 1), nrow=framed.shape[1], padding=2, pad_value=1.0)


def save_png(picture: Tensor, path: Path) -> None:
    """Write a picture as a PNG. Its folder is created if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(picture, path)
