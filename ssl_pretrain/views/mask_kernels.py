"""Draw the masks of many images, in compiled code.

Every function returns True for the patches of a mask, bool (images, masks per image, patches). The
random numbers of an image depend on its index and on the view, but not on the other images.
"""

import math

import numpy as np

from ssl_pretrain import rng
from ssl_pretrain.rng import Purpose
from ssl_pretrain.system.jit import njit

BLOCK_ATTEMPTS = 10  # attempts to place a block, as in the code of BEiT, iBOT and DINOv2
CONTEXT_ATTEMPTS = 20  # attempts before a target may overlap the context, as in I-JEPA's code
_PATCHES, _BLOCKS = int(Purpose.MASK_PATCHES), int(Purpose.MASK_BLOCKS)


@njit(nogil=True, cache=True)
def draw_patches(seed, epoch, indices, view, num_patches, count):
    """Draw `count` different patches per image. All sets of patches are equally likely."""
    masks = np.zeros((len(indices), 1, num_patches), np.bool_)
    allowed = np.ones(num_patches, np.bool_)
    for row in range(len(indices)):
        _add_patches(masks[row, 0], allowed, (seed, epoch, indices[row], view), count)
    return masks


@njit(nogil=True, cache=True)
def draw_blocks(seed, epoch, indices, view, grid, budgets, limits, aspect, is_topped_up):
    """Draw blocks until a budget is spent, or no block fits in what remains of it.

    Args:
        seed: Seed of the run.
        epoch: Number of passes over the data before this one.
        indices: Indices of the images, int64 (n,).
        view: Index of the view.
        grid: Rows and columns of patches of the view.
        budgets: Patches to mask in each image, float64 (n,). 0 for no mask.
        limits: Smallest area from which a block's size is drawn, and the largest area of a block.
        aspect: Smallest and largest height / width of a block.
        is_topped_up: True to add single patches until the budget is spent.
    """
    masks = np.zeros((len(indices), 1, grid[0] * grid[1]), np.bool_)
    for row in range(len(indices)):
        key, budget, mask = (seed, epoch, indices[row], view), budgets[row], masks[row, 0]
        num_masked, num_attempts, is_full = 0, 0, False
        while num_masked < budget and not is_full:
            max_area = min(budget - num_masked, limits[1])
            is_full = True
            for _ in range(BLOCK_ATTEMPTS):
                num_new = _add_block(mask, key, num_attempts, grid, limits[0], max_area, aspect)
                num_attempts += 1
                if num_new > 0:
                    num_masked += num_new
                    is_full = False
                    break
        if is_topped_up and num_masked < budget:
            _add_patches(mask, ~mask, key, int(budget) - num_masked)
    return masks


@njit(nogil=True, cache=True)
def draw_targets(seed, epoch, indices, view, grid, num_targets, height, width):
    """Draw the places of I-JEPA's targets.

    As in the authors' code, none covers the last row or the last column of the view.
    """
    masks = np.zeros((len(indices), num_targets, grid[0] * grid[1]), np.bool_)
    for row in range(len(indices)):
        key = (seed, epoch, indices[row], view)
        for target in range(num_targets):
            top, left = _place(key, target, grid[0] - height, grid[1] - width)
            _fill(masks[row, target], grid, top, left, height, width)
    return masks


@njit(nogil=True, cache=True)
def draw_contexts(seed, epoch, indices, view, grid, targets, height, width, limits, is_random):
    """Draw the places of I-JEPA's contexts, and take the targets out of them.

    If a context has too few patches after 20 attempts, the last target stays in it, then the last
    two targets, and so on.

    Args:
        seed: Seed of the run.
        epoch: Number of passes over the data before this one.
        indices: Indices of the images, int64 (n,).
        view: Index of the view.
        grid: Rows and columns of patches of the view.
        targets: Masks of the targets.
        height: Height of the context block.
        width: Width of the context block.
        limits: A context has more patches than the first number, and at most the second.
        is_random: True to trim a context to random patches, False to the first ones.
    """
    num_targets = targets.shape[1]
    masks = np.zeros((len(indices), 1, grid[0] * grid[1]), np.bool_)
    for row in range(len(indices)):
        key, mask = (seed, epoch, indices[row], view), masks[row, 0]
        for attempt in range(CONTEXT_ATTEMPTS * num_targets + 1):
            mask[:] = False
            top, left = _place(key, num_targets + attempt, grid[0] - height, grid[1] - width)
            _fill(mask, grid, top, left, height, width)
            for target in range(num_targets - attempt // CONTEXT_ATTEMPTS):
                mask &= ~targets[row, target]
            if mask.sum() > limits[0]:
                break
        if is_random and mask.sum() > limits[1]:
            allowed = mask.copy()
            mask[:] = False
            _add_patches(mask, allowed, key, limits[1])
    return masks


@njit(nogil=True, cache=True)
def draw_inverse_blocks(seed, epoch, indices, view, grid, count, aspect, is_rolled):
    """Draw blocks of exactly `count` visible patches, as CAPI does.

    If a rectangle has more patches, the end of its last row is left out. If `is_rolled`, the block
    may wrap around at the borders of the view.
    """
    rows, columns = grid
    low = math.log(max(aspect[0], count / columns**2))
    high = math.log(min(aspect[1], rows**2 / count))
    masks = np.zeros((len(indices), 1, grid[0] * grid[1]), np.bool_)
    for row in range(len(indices)):
        key = (seed, epoch, indices[row], view)
        u_ratio, u_top, u_left, u_down, u_right = _uniforms(key, 0, 5)
        ratio = math.exp(low + (high - low) * u_ratio)
        height = min(math.ceil(math.sqrt(count * ratio)), rows)
        width = min(math.ceil(math.sqrt(count / ratio)), columns)
        top = int(u_top * (rows - height + 1))
        left = int(u_left * (columns - width + 1))
        down, right = (int(u_down * rows), int(u_right * columns)) if is_rolled else (0, 0)
        for number in range(count):
            y = (top + number // width + down) % rows
            x = (left + number % width + right) % columns
            masks[row, 0, y * columns + x] = True
    return masks


@njit(nogil=True, cache=True)
def list_patches(masks, length):
    """Return the indices of the first `length` patches of each mask, and True for each of them.

    Shorter masks are padded with 0 and False. Both arrays are (images, masks, length).
    """
    num_images, num_masks, num_patches = masks.shape
    numbers = np.zeros((num_images, num_masks, length), np.int64)
    valid = np.zeros((num_images, num_masks, length), np.bool_)
    for row in range(num_images):
        for k in range(num_masks):
            count = 0
            for patch in range(num_patches):
                if masks[row, k, patch] and count < length:
                    numbers[row, k, count] = patch
                    valid[row, k, count] = True
                    count += 1
    return numbers, valid


@njit(nogil=True, cache=True)
def _add_patches(mask, allowed, key, count):
    """Mask `count` of the allowed patches, by the first steps of a Fisher-Yates shuffle."""
    patches = np.flatnonzero(allowed)
    seed, epoch, index, view = key
    for i in range(count):
        u = rng.uniform_at(seed, epoch, index, view, _PATCHES, i)
        j = i + int(u * (len(patches) - i))
        patches[i], patches[j] = patches[j], patches[i]
        mask[patches[i]] = True


@njit(nogil=True, cache=True)
def _add_block(mask, key, attempt, grid, min_area, max_area, aspect):
    """Mask a random block if it is smaller than the view and not too large.

    Return the number of patches that were not masked before.
    """
    u_area, u_ratio, u_top, u_left = _uniforms(key, attempt, 4)
    area = min_area + (max_area - min_area) * u_area
    low, high = math.log(aspect[0]), math.log(aspect[1])
    ratio = math.exp(low + (high - low) * u_ratio)
    height, width = int(np.rint(math.sqrt(area * ratio))), int(np.rint(math.sqrt(area / ratio)))
    rows, columns = grid
    if height >= rows or width >= columns:
        return 0
    top, left = int(u_top * (rows - height + 1)), int(u_left * (columns - width + 1))
    patches = mask.reshape(rows, columns)
    num_new = height * width - patches[top : top + height, left : left + width].sum()
    if num_new > max_area:
        return 0
    _fill(mask, grid, top, left, height, width)
    return num_new


@njit(nogil=True, cache=True)
def _place(key, number, num_tops, num_lefts):
    """Return the top row and the left column of block `number` of I-JEPA."""
    u_top, u_left = _uniforms(key, number, 2)
    return int(u_top * num_tops), int(u_left * num_lefts)


@njit(nogil=True, cache=True)
def _fill(mask, grid, top, left, height, width):
    mask.reshape(grid[0], grid[1])[top : top + height, left : left + width] = True


@njit(nogil=True, cache=True)
def _uniforms(key, number, count):
    """Return `count` random numbers in [0, 1) of block `number` of an image."""
    seed, epoch, index, view = key
    numbers = np.empty(count)
    for i in range(count):
        numbers[i] = rng.uniform_at(seed, epoch, index, view, _BLOCKS, count * number + i)
    return numbers
