"""Draw the pictures that a run saves: views and their masks, and queries with their neighbors."""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import make_grid, save_image

from ssl_pretrain.monitoring.shown_bands import to_rgb
from ssl_pretrain.views import recipe
from ssl_pretrain.views.batch import Batch, MaskSet
from ssl_pretrain.views.recipe import ViewsConfig

NUM_IMAGES = 8  # rows of a grid of views
BORDER = 3  # width in pixels of the frame around a neighbor
GREEN, RED = (0.18, 0.56, 0.36), (0.78, 0.27, 0.24)
BLUE, ORANGE = (0.20, 0.45, 0.80), (0.93, 0.56, 0.14)
GRAY = 0.5  # color of patches that the student does not see
CONTRAST_OF_HIDDEN = 0.15  # contrast of the image in these patches
TINT = 0.4  # weight of the color of a target


def view_grid(batch: Batch, config: ViewsConfig, bands: Sequence[int] = ()) -> Tensor:
    """Draw the views of the first images, one row per image, each with its masks on its right.

    Args:
        batch: Normalized views and their masks.
        config: Recipe of the views.
        bands: The setting `log.bands`.

    Returns:
        Picture (3, height, width) in [0, 1].
    """
    height, width = (max(view.shape[axis] for view in batch.views) for axis in (-2, -1))
    offset, scale = (torch.tensor(values).view(-1, 1, 1) for values in (config.mean, config.std))
    columns = []
    for number, (view, crop) in enumerate(zip(batch.views, recipe.crop_per_view(config))):
        pixels = to_rgb((view[:NUM_IMAGES].float().cpu() * scale + offset).clamp(0, 1), bands)
        columns.append(pixels)
        if mask_sets := [masks for masks in batch.masks if masks.view == number]:
            columns.append(_draw_masks(pixels, mask_sets, crop.mask.patch_size))
    padded = [
        F.pad(column, (0, width - column.shape[-1], 0, height - column.shape[-2]), value=1.0)
        for column in columns
    ]
    images = torch.stack(padded, dim=1).flatten(0, 1)
    return make_grid(images, nrow=len(columns), padding=2, pad_value=1.0)


def _draw_masks(views: Tensor, mask_sets: list[MaskSet], patch_size: int) -> Tensor:
    """Gray out the patches that the student does not see. Tint and frame each target in a color.

    Args:
        views: Views of the first images in [0, 1], (num_images, 3, height, width).
        mask_sets: Masks of these views.
        patch_size: Pixels per side of a patch.
    """
    picture = views
    rows, columns = (length // patch_size for length in views.shape[-2:])
    frames = []
    for masks in mask_sets:
        for k, rgb in zip(range(masks.indices.shape[1]), cycle((BLUE, ORANGE, GREEN, RED))):
            grid = masks.as_grid(rows * columns, k)[: len(views)].cpu().view(-1, 1, rows, columns)
            area = grid.repeat_interleave(patch_size, 2).repeat_interleave(patch_size, 3)
            if masks.name == "targets":
                color = torch.tensor(rgb).view(3, 1, 1)
                picture = torch.where(area, views + TINT * (color - views), picture)
                frames.append((_frame(area, max(1, patch_size // 8)), color))
            else:
                hidden = area if masks.name == "masked" else ~area
                faint = GRAY + CONTRAST_OF_HIDDEN * (views - GRAY)
                picture = torch.where(hidden, faint, picture)
    for frame, color in frames:  # after all targets, because they overlap
        picture = torch.where(frame, color, picture)
    return picture


def _frame(area: Tensor, width: int) -> Tensor:
    """Return True for the pixels of an area that are near its border, (n, 1, height, width)."""
    outside = F.pad((~area).float(), (width, width, width, width), value=1.0)
    return area & (F.max_pool2d(outside, 2 * width + 1, stride=1) > 0)


def neighbor_grid(
    queries: Tensor, neighbors: Tensor, same_class: Tensor, bands: Sequence[int] = ()
) -> Tensor:
    """Draw each query and its neighbors in a row.

    Neighbors of the query's class have a green frame, and others have a red frame.

    Args:
        queries: Images, uint8 (num_queries, C, height, width).
        neighbors: Images, uint8 (num_queries, k, C, height, width).
        same_class: True for neighbors of the query's class, bool (num_queries, k).
        bands: The setting `log.bands`.

    Returns:
        Picture (3, height, width) in [0, 1].
    """
    images = to_rgb(torch.cat([queries[:, None], neighbors], dim=1).float() / 255, bands)
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
