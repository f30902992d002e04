"""Recipe of the masks of a view, as set in `views.crops.NAME.mask`, and the shapes that follow.

A view is a grid of patches, numbered row by row. The kinds of masks follow official code:

- random, for MAE (arXiv:2111.06377): single patches at random.
- blocks, for iBOT (arXiv:2111.07832) and DINOv2 (arXiv:2304.07193): rectangles that may overlap,
  until a share of the patches is masked. The rectangles were introduced by BEiT (arXiv:2106.08254).
- multiblock, for I-JEPA (arXiv:2301.08243): several target blocks, and a context block without
  the patches of the targets.
- inverse_block, for CAPI (arXiv:2502.08769): all patches outside of one rectangle.

The authors train on squares. In a view of another shape, blocks keep the aspect ratios of `aspect`,
counted in patches, as in the authors' code. A block of I-JEPA's that is too tall or too wide is cut
to one patch less than the view, also as in their code. The context is the exception: it has the
shape of the view. A square one could not cover the share of the area that `context_scale` states.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np

from ssl_pretrain.schema import DIMENSIONLESS, image_sizes, setting
from ssl_pretrain.schema.image_sizes import ImageSize

BLOCKS_ASPECT = [0.3, 1 / 0.3]  # iBOT and DINOv2
MULTIBLOCK_ASPECT = [0.75, 1.5]  # targets of I-JEPA
INVERSE_BLOCK_ASPECT = [0.5, 2.0]  # CAPI
# For each name of a mask set, the kinds of masks that have it.
KINDS_BY_SET = {
    "visible": ("random", "inverse_block"),
    "masked": ("blocks",),
    "context": ("multiblock",),
    "targets": ("multiblock",),
}
SCANNED_SIZES = 2**16  # random numbers that are tried to find the range of block areas


@dataclass
class Mask:
    """Masks of the patches of each view of a kind."""

    kind: Literal["none", "random", "blocks", "multiblock", "inverse_block"] = setting(
        "none",
        "How the masks are drawn. random: single patches (MAE). "
        "blocks: rectangles that cover a share of the patches (iBOT, DINOv2). "
        "multiblock: a context and several targets (I-JEPA). "
        "inverse_block: all patches outside of one rectangle (CAPI).",
    )
    patch_size: int = setting(
        16, "Side of a patch, as in the backbone.", minimum=1, maximum=10_000, unit="pixels"
    )
    ratio: float = setting(
        0.75,
        "random and inverse_block: share of the patches that are masked.",
        above=0,
        below=1,
        unit=DIMENSIONLESS,
    )
    ratio_range: list[float] = setting(
        [0.1, 0.5],
        "blocks: [low, high] of the share of the patches that are masked.",
        unit=DIMENSIONLESS,
    )
    probability: float = setting(
        0.5, "blocks: share of the views that have a mask.", above=0, maximum=1, unit=DIMENSIONLESS
    )
    block_sampler: Literal["dinov2", "dinov3", "ibot"] = setting(
        "dinov2",
        "blocks: how the masked shares are drawn. dinov2: they are spread evenly over the global "
        "batch. dinov3: likewise, and single patches are added until the share is exact. "
        "ibot: independently for each view.",
    )
    min_patches: int = setting(
        4,
        "blocks: smallest area from which the size of a block is drawn. "
        "0 means (rows // 3) * (columns // 3), as in iBOT.",
        unit="patches",
    )
    aspect: list[float] = setting(
        [],
        "Every kind but random: [low, high] of the height / width of a block, or of a target. "
        "Empty means the authors' range: [0.3, 3.33] for blocks, [0.75, 1.5] for multiblock, "
        "[0.5, 2] for inverse_block.",
        unit=DIMENSIONLESS,
    )
    num_targets: int = setting(
        4, "multiblock: targets per view.", minimum=1, maximum=100, unit="targets"
    )
    target_scale: list[float] = setting(
        [0.15, 0.2], "multiblock: [low, high] of a target's share of the area.", unit=DIMENSIONLESS
    )
    context_scale: list[float] = setting(
        [0.85, 1.0],
        "multiblock: [low, high] of the context's share of the area, before the targets are "
        "taken out.",
        unit=DIMENSIONLESS,
    )
    min_keep: int = setting(
        10, "multiblock: targets and contexts have more patches than this.", unit="patches"
    )
    context_patches: int = setting(
        0,
        "multiblock: patches of a context that the student sees. A larger context is trimmed, and "
        "a smaller one is padded. 0 means a quarter of the view's patches, rounded down.",
        unit="patches",
    )
    context_trim: Literal["first", "random"] = setting(
        "first",
        "multiblock: which patches of a larger context remain. "
        "first: the first ones, row by row, as in I-JEPA. random: any.",
    )
    roll: bool = setting(
        True, "inverse_block: shift the mask by a random offset, wrapping around at the borders."
    )


class MaskShape(NamedTuple):
    """Name and shape of one of the sets of masks of a view."""

    name: str
    masks_per_image: int
    max_patches: int  # largest number of patches of a mask


class Grid(NamedTuple):
    """Numbers of rows and columns of the patches of a view."""

    rows: int
    columns: int

    @property
    def num_patches(self) -> int:
        """Number of patches of the view."""
        return self.rows * self.columns

    def __str__(self) -> str:
        return f"{self.rows} x {self.columns} patches"


class BlockSizes(NamedTuple):
    """Heights and widths of blocks in patches, int64 arrays of the same shape."""

    heights: np.ndarray
    widths: np.ndarray


def grid_shape(mask: Mask, size: ImageSize) -> Grid:
    """Return the grid of patches of a view of `size` pixels."""
    height, width = image_sizes.height_and_width(size)
    return Grid(height // mask.patch_size, width // mask.patch_size)


def shapes(mask: Mask, size: ImageSize) -> tuple[MaskShape, ...]:
    """Return the sets of masks of a view of `size` pixels."""
    grid = grid_shape(mask, size)
    if mask.kind in ("random", "inverse_block"):
        return (MaskShape("visible", 1, num_visible(mask, grid)),)
    if mask.kind == "blocks":
        return (MaskShape("masked", 1, int(grid.num_patches * mask.ratio_range[1])),)
    if mask.kind == "multiblock":
        _, max_target = target_areas(mask, grid)
        return (
            MaskShape("context", 1, context_length(mask, grid)),
            MaskShape("targets", mask.num_targets, max_target),
        )
    return ()


def context_length(mask: Mask, grid: Grid) -> int:
    """Return the largest number of patches of a context that the student sees."""
    return mask.context_patches or max(1, grid.num_patches // 4)


def num_visible(mask: Mask, grid: Grid) -> int:
    """Return the number of patches that stay visible, rounded as in the authors' code."""
    if mask.kind == "random":
        return int(grid.num_patches * (1 - mask.ratio))
    return grid.num_patches - int(grid.num_patches * mask.ratio)


def aspect_range(mask: Mask) -> list[float]:
    """Return `mask.aspect`, or the authors' range if it is empty."""
    if mask.aspect:
        return mask.aspect
    ranges = {"blocks": BLOCKS_ASPECT, "multiblock": MULTIBLOCK_ASPECT}
    return ranges.get(mask.kind, INVERSE_BLOCK_ASPECT)


def min_block_area(mask: Mask, grid: Grid) -> int:
    """Return the smallest area from which the size of a block is drawn."""
    return mask.min_patches or (grid.rows // 3) * (grid.columns // 3)


def max_block_area(mask: Mask, grid: Grid) -> int:
    """Return the largest area of a block of the kind "blocks".

    For DINOv2 and DINOv3 it is half of the view, rounded as in the authors' code.
    """
    return grid.num_patches if mask.block_sampler == "ibot" else grid.rows // 2 * grid.columns


def num_masked_views(mask: Mask, num_views: int) -> int:
    """Return how many of a step's views DINOv2 and DINOv3 mask."""
    return int(num_views * mask.probability)


def target_sizes(mask: Mask, grid: Grid, uniforms: np.ndarray) -> BlockSizes:
    """Return the sizes of I-JEPA's targets, one for each random number in [0, 1)."""
    return _block_sizes(grid, tuple(mask.target_scale), tuple(aspect_range(mask)), uniforms)


def context_sizes(mask: Mask, grid: Grid, uniforms: np.ndarray) -> BlockSizes:
    """Return the sizes of I-JEPA's context blocks, one for each random number in [0, 1)."""
    return _block_sizes(grid, tuple(mask.context_scale), _context_aspect(grid), uniforms)


def target_areas(mask: Mask, grid: Grid) -> tuple[int, int]:
    """Return the areas of I-JEPA's smallest and largest target, in patches."""
    return _range_of_areas(grid, tuple(mask.target_scale), tuple(aspect_range(mask)))


def context_areas(mask: Mask, grid: Grid) -> tuple[int, int]:
    """Return the areas of I-JEPA's smallest and largest context block, in patches."""
    return _range_of_areas(grid, tuple(mask.context_scale), _context_aspect(grid))


def _context_aspect(grid: Grid) -> tuple[float, float]:
    """Return the range of the height / width of I-JEPA's contexts, which have the view's shape."""
    aspect = grid.rows / grid.columns
    return aspect, aspect


def _block_sizes(
    grid: Grid, scale: tuple[float, ...], aspect: tuple[float, ...], uniforms: np.ndarray
) -> BlockSizes:
    """Return sizes of blocks. One random number determines area and aspect ratio, as in I-JEPA.

    A block is at least one patch smaller than the view, in both directions.
    """
    areas = np.floor(grid.num_patches * (scale[0] + uniforms * (scale[1] - scale[0])))
    ratios = aspect[0] + uniforms * (aspect[1] - aspect[0])
    heights = np.rint(np.sqrt(areas * ratios)).astype(np.int64)
    widths = np.rint(np.sqrt(areas / ratios)).astype(np.int64)
    return BlockSizes(np.minimum(heights, grid.rows - 1), np.minimum(widths, grid.columns - 1))


@lru_cache(maxsize=64)
def _range_of_areas(
    grid: Grid, scale: tuple[float, ...], aspect: tuple[float, ...]
) -> tuple[int, int]:
    heights, widths = _block_sizes(grid, scale, aspect, np.linspace(0, 1, SCANNED_SIZES + 1))
    areas = heights * widths
    return int(areas.min()), int(areas.max())
