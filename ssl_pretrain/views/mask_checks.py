"""Check that the masks of a view can be drawn, and that they hide some patches but not all."""

import math
from itertools import count

import numpy as np

from ssl_pretrain import schema
from ssl_pretrain.schema import image_sizes
from ssl_pretrain.schema.image_sizes import ImageSize
from ssl_pretrain.views import mask_recipe
from ssl_pretrain.views.mask_recipe import Grid, Mask

NUM_SCANNED = 256  # areas and aspect ratios that are tried to find a block that fits


def check(key: str, mask: Mask, size: ImageSize) -> None:
    """Raise ValueError unless the masks can be drawn for a view of `size` pixels.

    Args:
        key: Dotted key of the mask, such as views.crops.global.mask.
        mask: The recipe.
        size: Side of the view in pixels, or its height and width.
    """
    schema.check_choices(mask, key)
    if mask.kind == "none":
        return
    if any(side % mask.patch_size for side in image_sizes.height_and_width(size)):
        raise ValueError(
            f"{key}.patch_size: {mask.patch_size} does not divide the view's "
            f"{image_sizes.describe(size)} pixels; give the backbone's patch size, and "
            "views.crops.*.size as a multiple of it"
        )
    if mask.aspect:
        schema.check_range(f"{key}.aspect", mask.aspect)
    grid = mask_recipe.grid_shape(mask, size)
    if mask.kind in ("random", "inverse_block"):
        _check_ratio(key, mask, grid)
    if mask.kind == "blocks":
        _check_blocks(key, mask, grid)
    if mask.kind == "multiblock":
        _check_multiblock(key, mask, grid)


def check_batch(key: str, mask: Mask, views_per_image: int, global_batch_size: int) -> None:
    """Raise ValueError if no view of a step would be masked.

    Args:
        key: Dotted key of the mask.
        mask: A recipe that has passed `check`.
        views_per_image: Views of an image with such masks.
        global_batch_size: Images of a step, over all ranks.
    """
    if mask.kind != "blocks" or mask.block_sampler == "ibot":
        return
    num_views = views_per_image * global_batch_size
    if mask_recipe.num_masked_views(mask, num_views):
        return
    smallest_batch = next(
        size
        for size in count(global_batch_size + 1)
        if mask_recipe.num_masked_views(mask, views_per_image * size)
    )
    raise ValueError(
        f"global_batch_size: {global_batch_size} with {key}.probability {mask.probability:g} masks "
        f"{num_views * mask.probability:.3g} of a step's {num_views} views, which is rounded down "
        f"to none; give {smallest_batch} or more, or a higher probability"
    )


def _check_ratio(key: str, mask: Mask, grid: Grid) -> None:
    count = mask_recipe.num_visible(mask, grid)
    if not 0 < count < grid.num_patches:
        raise ValueError(
            f"{key}.ratio: {mask.ratio:g} leaves {count} of the view's {grid.num_patches} patches "
            "visible; give a ratio that masks some patches and leaves others, or smaller patches"
        )
    low, high = mask_recipe.aspect_range(mask)
    # A longer block of this area would not fit.
    min_aspect, max_aspect = count / grid.columns**2, grid.rows**2 / count
    if mask.kind == "inverse_block" and (low > max_aspect or high < min_aspect):
        raise ValueError(
            f"{key}.aspect: {mask.aspect} has no block of {count} patches that fits in a view of "
            f"{grid}; give a range that contains {grid.rows / grid.columns:.3g}"
        )


def _check_blocks(key: str, mask: Mask, grid: Grid) -> None:
    schema.check_range(f"{key}.ratio_range", mask.ratio_range, highest=1.0)
    most = _max_masked(mask, grid)
    if most < 1:
        raise ValueError(
            f"{key}.ratio_range: {mask.ratio_range} masks none of the view's {grid.num_patches} "
            "patches; give a higher range, or smaller patches"
        )
    smallest = mask_recipe.min_block_area(mask, grid)
    largest = min(most, mask_recipe.max_block_area(mask, grid))
    view = f"a view of {grid}"
    if not largest:
        raise ValueError(
            f"{key}.patch_size: {mask.patch_size} makes {view}, in which no block fits; give "
            "smaller patches"
        )
    if smallest > largest:
        meaning = "" if mask.min_patches else f" stands for {smallest}, which"
        remedy = f"1 to {largest}" if largest > 1 else "1"
        raise ValueError(
            f"{key}.min_patches: {mask.min_patches}{meaning} is more than {largest}, the area of "
            f"the largest block in {view}; give {remedy}, or a higher {key}.ratio_range"
        )
    low, high = mask_recipe.aspect_range(mask)
    if not _some_block_fits(grid, (smallest, largest), (low, high)):
        raise ValueError(
            f"{key}.aspect: [{low:g}, {high:g}] has no block of {smallest} to {largest} patches "
            f"that fits in {view}; give a range that contains {grid.rows / grid.columns:.3g}, "
            "or smaller patches"
        )


def _max_masked(mask: Mask, grid: Grid) -> int:
    """Return the largest number of patches that blocks can mask in a view."""
    low, high = mask.ratio_range
    num_patches = grid.num_patches
    # DINOv2 and iBOT draw shares below the upper end, DINOv3 takes the upper end itself.
    is_reached = mask.block_sampler == "dinov3" or low == high
    return int(num_patches * high) if is_reached else math.ceil(num_patches * high) - 1


def _some_block_fits(grid: Grid, areas: tuple[int, int], aspect: tuple[float, float]) -> bool:
    """Return True if blocks of such areas, rounded as when they are drawn, fit in the view."""
    area = np.linspace(*areas, NUM_SCANNED)[:, None]
    ratio = np.geomspace(aspect[0], aspect[1], NUM_SCANNED)
    heights, widths = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (heights < grid.rows) & (widths < grid.columns) & (heights * widths <= areas[1])
    return bool((fits & (heights * widths > 0)).any())


def _check_multiblock(key: str, mask: Mask, grid: Grid) -> None:
    schema.check_range(f"{key}.target_scale", mask.target_scale, highest=1.0)
    schema.check_range(f"{key}.context_scale", mask.context_scale, highest=1.0)
    targets, contexts = mask_recipe.target_areas(mask, grid), mask_recipe.context_areas(mask, grid)
    for name, (smallest, _) in (("target", targets), ("context", contexts)):
        if smallest <= mask.min_keep:
            remedy = f"give at most {smallest - 1}, or " if smallest else "give "
            raise ValueError(
                f"{key}.min_keep: {mask.min_keep} patches are not less than a {name} of {smallest} "
                f"patches, the smallest in a view of {grid}; {remedy}"
                f"a larger {key}.{name}_scale"
            )
    if mask.context_patches > contexts[1]:
        raise ValueError(
            f"{key}.context_patches: {mask.context_patches} is more than the {contexts[1]} patches "
            f"of the largest context; give at most {contexts[1]}, or 0 for a quarter of the view"
        )
