"""Pictures that a run saved during training: views, and nearest neighbors at several steps."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from markupsafe import Markup
from PIL import Image

from ssl_pretrain import config, schema
from ssl_pretrain.data.config import DataConfig
from ssl_pretrain.eval import saved_settings
from ssl_pretrain.eval.html import page
from ssl_pretrain.eval.html.training_figures import evenly_spaced
from ssl_pretrain.monitoring import image_grids, metric_names, online_knn, shown_bands
from ssl_pretrain.schema.image_sizes import height_and_width
from ssl_pretrain.views import recipe
from ssl_pretrain.views.recipe import ViewsConfig

NUM_NEIGHBOR_PICTURES = 4
VIEW_GAP = 2  # pixels between the views in views.png
MIN_VIEW_SIDE = 64  # pixels on the page of the longer side of the largest view
MAX_PIXELATED_SIZE = 64  # views up to this size are enlarged without smoothing


@dataclass(frozen=True)
class View:
    """A training view on the page."""

    src: str  # data URL of its <img>
    width: int  # on the page, in pixels
    description: str  # the random choices that produced it


def read_views_config(run_path: Path) -> ViewsConfig | None:
    """Return the recipe of the run's views, or None for published weights, which have none."""
    settings = saved_settings.read_if_intact(run_path)
    if not schema.value_at(settings, "views.crops"):
        return None
    return config.from_dict(settings).views


def describe_training_bands(run_path: Path) -> str:
    """Describe the channels that the pictures of the training show, from RUN/config.yaml.

    Return an empty string for plain gray and RGB.
    """
    settings = saved_settings.read_if_intact(run_path)
    num_channels = schema.value_at(settings, "data.channels") or DataConfig().channels
    return shown_bands.describe(schema.value_at(settings, "log.bands") or [], num_channels)


def is_pixelated(views: ViewsConfig | None) -> bool:
    """Return True if the images are so small that the page should not smooth them."""
    return (
        views is not None
        and max(height_and_width(recipe.enclosing_size(views))) <= MAX_PIXELATED_SIZE
    )


def cut_view_rows(run_path: Path, views: ViewsConfig | None) -> list[list[View]]:
    """Cut the trainer's grid of views into rows, one per image. Return no rows without a grid.

    Views smaller than the tiles of the grid lose the padding.
    """
    path, descriptions_path = run_path / "views.png", run_path / "views.json"
    if views is None or not path.is_file():
        return []
    grid = Image.open(path).convert("RGB")
    height, width = height_and_width(recipe.enclosing_size(views))
    if (grid.width - VIEW_GAP) % (width + VIEW_GAP) or (grid.height - VIEW_GAP) % (
        height + VIEW_GAP
    ):
        return [[View(page.image_data_url(grid), grid.width, "training views")]]
    has_descriptions = descriptions_path.is_file()
    descriptions = json.loads(descriptions_path.read_text()) if has_descriptions else []
    lefts = range(VIEW_GAP, grid.width, width + VIEW_GAP)
    sizes = _column_sizes(views)
    if len(sizes) != len(lefts):
        sizes = [(height, width)] * len(lefts)
    scale = max(1.0, MIN_VIEW_SIDE / max(height, width))
    rows = []
    for row, top in enumerate(range(VIEW_GAP, grid.height, height + VIEW_GAP)):
        texts = descriptions[row] if row < len(descriptions) else []
        if len(texts) != len(lefts):
            texts = ["view"] * len(lefts)
        crops = [grid.crop((left, top, left + w, top + h)) for left, (h, w) in zip(lefts, sizes)]
        rows.append(
            [
                View(page.image_data_url(crop), round(crop.width * scale), text)
                for crop, text in zip(crops, texts)
            ]
        )
    return rows


def _column_sizes(views: ViewsConfig) -> list[tuple[int, int]]:
    """Return the height and width of the pictures in a row: each view, then its masks if any."""
    return [
        (crop.height, crop.width)
        for crop in recipe.crop_per_view(views)
        for _ in range(1 if crop.mask.kind == "none" else 2)
    ]


def read_neighbor_figures(run_path: Path) -> list[page.Figure]:
    """Return pictures of some queries and their nearest training images at several steps."""
    folders = metric_names.existing_paths(run_path, "neighbors")
    paths = [path for folder in folders for path in sorted(folder.glob("step_*.png"))]
    figures = []
    for path in evenly_spaced(paths, NUM_NEIGHBOR_PICTURES):
        picture = _without_gaps(Image.open(path).convert("RGB"))
        step = f"Step {int(path.stem.removeprefix('step_')):,}"
        css_class = "picture pixel" if picture.width < 2 * page.MAX_PICTURE_SIDE else "picture"
        image = Markup('<img class="{}" alt="Neighbors at {}" src="{}">').format(
            css_class, step.lower(), page.image_data_url(picture)
        )
        figures.append(page.Figure(image, step))
    return figures


def _without_gaps(picture: Image.Image) -> Image.Image:
    """Make the white gaps between the pictures of `image_grids.neighbor_grid` transparent.

    A large picture stays as it is, because it is embedded without transparency.
    """
    num_columns = online_knn.NUM_NEIGHBORS + 1
    width, rest = divmod(picture.width - VIEW_GAP, num_columns)
    if rest or picture.width * picture.height > page.MAX_PNG_PIXELS:
        return picture
    pixels = np.array(picture)
    is_white = (pixels == 255).all(axis=-1)
    x = np.arange(picture.width)
    in_gap = x % width < VIEW_GAP  # between two columns
    in_query = (x < width + VIEW_GAP) & ~in_gap
    opaque = np.ones_like(is_white)
    opaque[:, in_gap] = False
    opaque[is_white.all(axis=1)] = False  # between two rows
    query_border = in_query & (
        (x < VIEW_GAP + image_grids.BORDER) | (x >= width - image_grids.BORDER)
    )
    opaque[:, query_border] = False
    is_white_in_query = is_white[:, in_query].all(axis=1)
    opaque[np.ix_(is_white_in_query, in_query)] = False
    return Image.fromarray(np.dstack([pixels, 255 * opaque.astype(np.uint8)]))
