"""Pictures that a run leaves in its folder: grids of views, and of queries with their nearest neighbours."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torchvision.utils import make_grid, save_image

NUM_IMAGES = 8
RIGHT, WRONG = (0.18, 0.56, 0.36), (0.78, 0.27, 0.24)


def views(views: list[Tensor], mean: list[float], std: list[float]) -> Tensor:
    """One row an image, its views side by side as the network sees them, for the first 8 images: (3, height, width) in [0, 1]."""
    size = max(view.shape[-1] for view in views)
    undo = [
        view[:NUM_IMAGES].float().cpu() * torch.tensor(std).view(3, 1, 1)
        + torch.tensor(mean).view(3, 1, 1)
        for view in views
    ]
    padded = [
        torch.nn.functional.pad(
            view, (0, size - view.shape[-1], 0, size - view.shape[-2]), value=1.0
        )
        for view in undo
    ]
    return make_grid(
        torch.stack(padded, dim=1).flatten(0, 1), nrow=len(views), padding=2, pad_value=1.0
    ).clamp(0, 1)


def neighbours(queries: Tensor, nearest: Tensor, right: Tensor) -> Tensor:
    """A row a query: the query, then its neighbours in a frame, green where `right`: (3, height, width) in [0, 1].

    Args:
        queries: uint8 (num, 3, size, size).
        nearest: uint8 (num, k, 3, size, size).
        right: bool (num, k).
    """
    border = 3
    shown = torch.cat([queries[:, None], nearest], dim=1).float() / 255
    framed = torch.nn.functional.pad(shown, (border, border, border, border), value=1.0)
    colours = torch.where(right[..., None], torch.tensor(RIGHT), torch.tensor(WRONG))
    frame = torch.ones(framed.shape[-2:], dtype=torch.bool)
    frame[border:-border, border:-border] = False
    framed[:, 1:] = torch.where(frame, colours[..., None, None], framed[:, 1:])
    return make_grid(framed.flatten(0, 1), nrow=framed.shape[1], padding=2, pad_value=1.0)


def save(picture: Tensor, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(picture, path)
    return path
