"""Maps of images: each image at its place in a projection, as a colored dot or as a thumbnail."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from PIL import Image
from scipy.optimize import linear_sum_assignment

from ssl_pretrain.eval.html import page
from ssl_pretrain.eval.html.colors import color

MAX_THUMBNAILS = 300  # images of a map of thumbnails
MAX_DOTS = 600  # images of a map of dots, whose thumbnails appear on demand
THUMBNAIL_SIDE, SMALL_THUMBNAIL_SIDE = 56, 40  # pixels in a map of thumbnails and of dots
SPRITE_QUALITY = 72
CELLS_PER_IMAGE = 1.9  # free cells leave the gaps between clusters visible
ASPECT = 1.6  # width over height of a map of thumbnails
MARGIN = 3.0  # percent of the map's width and height that no point's center enters


@dataclass(frozen=True)
class Sprite:
    """Thumbnails of images in one picture, row by row."""

    src: str  # data URL
    columns: int
    rows: int


def build_sprite(pictures: np.ndarray, max_side: int) -> Sprite:
    """Return the thumbnails of pictures, uint8 (n, 3, height, width), as one picture."""
    columns = int(np.ceil(np.sqrt(len(pictures))))
    rows = -(-len(pictures) // columns)
    height, width = pictures.shape[-2:]
    scale = min(1.0, max_side / max(height, width))
    height, width = max(1, round(height * scale)), max(1, round(width * scale))
    sheet = Image.new("RGB", (columns * width, rows * height))
    for index, pixels in enumerate(pictures):
        image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
        image = image.resize((width, height), Image.Resampling.LANCZOS)
        sheet.paste(image, (index % columns * width, index // columns * height))
    return Sprite(page.image_data_url(sheet, SPRITE_QUALITY), columns, rows)


def draw_dots(
    positions: np.ndarray, labels: np.ndarray, num_classes: int, names: Sequence[str]
) -> Markup:
    """Draw images at their positions (n, 2) as dots, each in the color of its class.

    The dots refer to the thumbnails of the page's sprite by their index.
    """
    places = MARGIN + (100 - 2 * MARGIN) * _to_unit_square(positions)
    colors = [color(int(label), num_classes) for label in labels]
    items = [
        Markup('<i title="{}" style="left:{:.1f}%;top:{:.1f}%;--i:{};--c:{}"></i>').format(
            name, x, y, index, dot_color
        )
        for index, ((x, y), dot_color, name) in enumerate(zip(places, colors, names))
    ]
    return _map("dots", items)


def draw_thumbnails(positions: np.ndarray, names: Sequence[str]) -> Markup:
    """Draw images as thumbnails in the free cells of a grid that are closest to their positions."""
    num_rows = max(1, round(np.sqrt(CELLS_PER_IMAGE * len(positions) / ASPECT)))
    num_columns = -(-round(CELLS_PER_IMAGE * len(positions)) // num_rows)
    cells = assign_cells(positions, num_columns, num_rows)
    items = [
        Markup('<i title="{}" style="left:{:.2f}%;top:{:.2f}%;--i:{}"></i>').format(
            name, 100 * column / num_columns, 100 * row / num_rows, index
        )
        for index, ((column, row), name) in enumerate(zip(cells, names))
    ]
    style = f"--w:{100 / num_columns:.3f}%;aspect-ratio:{num_columns}/{num_rows}"
    return _map("thumbnails", items, style)


def assign_cells(positions: np.ndarray, num_columns: int, num_rows: int) -> np.ndarray:
    """Move each position (n, 2) to a cell (column, row) of its own, by the least total distance."""
    assert len(positions) <= num_columns * num_rows, "there are more images than cells"
    columns, rows = np.meshgrid(np.arange(num_columns), np.arange(num_rows))
    cells = np.stack([columns.ravel(), rows.ravel()], axis=1)
    targets = _to_unit_square(positions) * [num_columns - 1, num_rows - 1]
    distances = ((targets[:, None] - cells[None]) ** 2).sum(axis=2)
    return cells[linear_sum_assignment(distances)[1]]


def _to_unit_square(positions: np.ndarray) -> np.ndarray:
    """Scale positions (n, 2) to [0, 1] in both directions."""
    low, high = positions.min(axis=0), positions.max(axis=0)
    return (positions - low) / np.where(high > low, high - low, 1.0)


def _map(kind: str, items: Sequence[Markup], style: str = "") -> Markup:
    return Markup(
        '<div class="map {}" role="group" tabindex="0" data-roving aria-label="{}" style="{}">'
        "{}</div>"
    ).format(kind, f"Map of {len(items)} images", style, Markup("").join(items))
