"""Draw the masks of a batch, as pure functions of the seed and the position in the run.

The patches of a mask depend on (seed, epoch, image, view). The sizes of I-JEPA's blocks and the
masked shares of DINOv2 belong to a whole step. They depend on (seed, epoch, step) and on the
position in the global batch. The numbers of ranks, workers and micro-batches do not change a mask.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ssl_pretrain import rng
from ssl_pretrain.rng import Purpose
from ssl_pretrain.views import mask_kernels, mask_recipe
from ssl_pretrain.views.batch import MaskSet
from ssl_pretrain.views.mask_recipe import Grid, Mask
from ssl_pretrain.views.recipe import Crop, ViewsConfig


@dataclass(frozen=True)
class Position:
    """Consecutive images of a global batch, and the step of the run in which they are used.

    Attributes:
        seed: Seed of the run.
        epoch: Number of passes over the data before this one.
        step: Number of steps of the run before this one.
        indices: Indices of the images in the data set, int64 (n,).
        first_slot: Position of the first image in the global batch of the step.
        global_batch_size: Images of the step, over all ranks.
    """

    seed: int
    epoch: int
    step: int
    indices: np.ndarray
    first_slot: int
    global_batch_size: int


def draw(views: ViewsConfig, position: Position) -> tuple[MaskSet, ...]:
    """Draw the masks of images, on the CPU.

    Args:
        views: Recipe of the views and of their masks.
        position: The images and their step.

    Returns:
        The masks of every view that has any, in the order of the views.
    """
    return tuple(
        _build_set(shape, view, grids)
        for view, first_view, crop in _masked_views(views)
        for shape, grids in zip(
            mask_recipe.shapes(crop.mask, crop.size),
            _draw_grids(crop, view, first_view, position),
            strict=True,
        )
    )


def blank(views: ViewsConfig, num_images: int, device: torch.device | str) -> tuple[MaskSet, ...]:
    """Return masks of the first patches, in the shapes and formats of the run's masks."""
    return tuple(
        MaskSet(
            shape.name,
            view,
            torch.arange(shape.max_patches, device=device).repeat(
                num_images, shape.masks_per_image, 1
            ),
            torch.ones(
                (num_images, shape.masks_per_image, shape.max_patches),
                dtype=torch.bool,
                device=device,
            ),
        )
        for view, _, crop in _masked_views(views)
        for shape in mask_recipe.shapes(crop.mask, crop.size)
    )


def describe(mask_sets: Sequence[MaskSet], view: int, row: int, crop: Crop) -> list[str]:
    """Describe the masks of a view of one image. Return an empty list if the view has none.

    Args:
        mask_sets: Masks of all views.
        view: Index of the view.
        row: Row of the image in the masks.
        crop: Recipe of the view.
    """
    counts = [
        f"{masks.name} {', '.join(map(str, masks.valid[row].sum(1).tolist()))}"
        for masks in mask_sets
        if masks.view == view
    ]
    if not counts:
        return []
    num_patches = mask_recipe.grid_shape(crop.mask, crop.size).num_patches
    return [f"masks of view {view + 1}: {', '.join(counts)} of {num_patches} patches"]


def _masked_views(views: ViewsConfig) -> Iterator[tuple[int, int, Crop]]:
    """Yield the index of each view with masks, the first index of its crop, and the crop."""
    first_view = 0
    for crop in views.crops.values():
        if crop.mask.kind != "none":
            for view in range(first_view, first_view + crop.count):
                yield view, first_view, crop
        first_view += crop.count


def _build_set(shape: mask_recipe.MaskShape, view: int, grids: np.ndarray) -> MaskSet:
    numbers, valid = mask_kernels.list_patches(grids, shape.max_patches)
    return MaskSet(shape.name, view, torch.from_numpy(numbers), torch.from_numpy(valid))


def _draw_grids(
    crop: Crop, view: int, first_view: int, position: Position
) -> tuple[np.ndarray, ...]:
    """Draw the sets of masks of a view, each as bool (images, masks per image, patches)."""
    mask, grid = crop.mask, mask_recipe.grid_shape(crop.mask, crop.size)
    key = (position.seed, position.epoch, position.indices, view)
    if mask.kind == "random":
        count = mask_recipe.num_visible(mask, grid)
        return (mask_kernels.draw_patches(*key, grid.num_patches, count),)
    if mask.kind == "inverse_block":
        count, aspect = mask_recipe.num_visible(mask, grid), _pair(mask_recipe.aspect_range(mask))
        return (mask_kernels.draw_inverse_blocks(*key, grid, count, aspect, mask.roll),)
    if mask.kind == "multiblock":
        return _draw_multiblock(mask, grid, view, position)
    if mask.block_sampler == "ibot":
        budgets = _independent_budgets(mask, grid, view, position)
    else:
        budgets = _spread_budgets(crop, grid, view, first_view, position)
    limits = (
        float(mask_recipe.min_block_area(mask, grid)),
        float(mask_recipe.max_block_area(mask, grid)),
    )
    aspect, is_exact = _pair(mask_recipe.aspect_range(mask)), mask.block_sampler == "dinov3"
    return (mask_kernels.draw_blocks(*key, grid, budgets, limits, aspect, is_exact),)


def _draw_multiblock(
    mask: Mask, grid: Grid, view: int, position: Position
) -> tuple[np.ndarray, np.ndarray]:
    """Draw I-JEPA's contexts and targets. All images of the step have blocks of the same sizes."""
    uniforms = rng.uniform(
        position.seed, position.epoch, position.step, view, Purpose.MASK_SIZES, 2
    )
    target = mask_recipe.target_sizes(mask, grid, uniforms[:, 0])
    context = mask_recipe.context_sizes(mask, grid, uniforms[:, 1])
    key = (position.seed, position.epoch, position.indices, view, grid)
    targets = mask_kernels.draw_targets(*key, mask.num_targets, target.heights[0], target.widths[0])
    max_patches = mask_recipe.context_length(mask, grid)
    contexts = mask_kernels.draw_contexts(
        *key,
        targets,
        context.heights[0],
        context.widths[0],
        (mask.min_keep, max_patches),
        mask.context_trim == "random",
    )
    return contexts, targets


def _independent_budgets(mask: Mask, grid: Grid, view: int, position: Position) -> np.ndarray:
    """Return the number of patches to mask in each image, drawn independently as in iBOT."""
    uniforms = rng.uniform(
        position.seed, position.epoch, position.indices, view, Purpose.MASK_SIZES, 2
    )
    low, high = mask.ratio_range
    budgets = grid.num_patches * (low + (high - low) * uniforms[:, 1])
    return np.where(uniforms[:, 0] < mask.probability, budgets, 0.0)


def _spread_budgets(
    crop: Crop, grid: Grid, view: int, first_view: int, position: Position
) -> np.ndarray:
    """Return the number of patches to mask in each image, spread over the batch as in DINOv2.

    A share of all views of the global batch is masked. The range of ratios is divided into equal
    intervals, one per masked view. Each masked view draws its ratio from its own interval. Which
    view gets which interval is random.
    """
    mask, num_views = crop.mask, crop.count * position.global_batch_size
    num_masked = mask_recipe.num_masked_views(mask, num_views)
    key = (position.seed, position.epoch, position.step, first_view)
    interval_of_view = np.empty(num_views, np.int64)
    order = rng.uniform(*key, Purpose.MASK_ORDER, num_views)[0].argsort(kind="stable")
    interval_of_view[order] = np.arange(num_views)
    start = (view - first_view) * position.global_batch_size + position.first_slot
    intervals = interval_of_view[start : start + len(position.indices)]
    if mask.block_sampler == "dinov3":
        offsets: np.ndarray | float = 1.0  # the upper end of the interval
    else:
        offsets = rng.uniform(*key, Purpose.MASK_SIZES, num_masked + 1)[0][
            np.minimum(intervals, num_masked)
        ]
    low, high = mask.ratio_range
    ratios = low + (high - low) * (intervals + offsets) / max(num_masked, 1)
    budgets = np.floor(grid.num_patches * np.minimum(ratios, high))
    return np.where(intervals < num_masked, budgets, 0.0)


def _pair(values: list[float]) -> tuple[float, float]:
    return float(values[0]), float(values[1])
