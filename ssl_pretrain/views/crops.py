"""Crop a decoded image, on the CPU and in uint8: the geometry of every view.

`draw` chooses a box and `apply` cuts, resizes and flips. By default both are the arithmetic of
torchvision's RandomResizedCrop (after Inception's "distorted bounding box", Szegedy et al., CVPR
2015, arXiv:1409.4842, section 6). Only the source of random numbers differs. `crop_sampler` chooses
the distribution of the boxes, by the official code that it follows:

- torchvision: The area is uniform and the ratio log-uniform. Both are drawn again until the box
  fits, 10 times at most.
- tensorflow, for SimCLR: The ratio is uniform. Then the height is uniform among the integers that
  the range of areas and the image allow, so that small areas are more frequent. This is
  tf.image.sample_distorted_bounding_box with min_object_covered = 0.1, as SimCLR's code calls it.
  It refuses areas below a tenth of the image, although the range of areas begins at 0.08.
- clipped, for BYOL: The area is uniform and the ratio log-uniform, drawn once. Width and height are
  clipped to those of the image.

`antialias: false` resizes as tf.image.resize does, without a low-pass filter before shrinking.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from ssl_pretrain import rng
from ssl_pretrain.rng import Purpose
from ssl_pretrain.system.jit import njit
from ssl_pretrain.views import resize
from ssl_pretrain.views.recipe import Crop, Interpolation
from ssl_pretrain.views.upload import upload

MAX_ASPECT = 16  # an evaluation resizes only the middle of an image that is longer than this
TRIES = 10  # attempts of torchvision
TENSORFLOW_TRIES = 100  # SimCLR's max_attempts
TENSORFLOW_COVERED = 0.1  # SimCLR's min_object_covered: smallest share of the image in a box
# Compiled code takes neither strings nor enumerations.
TORCHVISION, TENSORFLOW, CLIPPED = 0.0, 1.0, 2.0
SAMPLERS = {"torchvision": TORCHVISION, "tensorflow": TENSORFLOW, "clipped": CLIPPED}
_CROP, _FLIP = int(Purpose.CROP), int(Purpose.FLIP)


class Box(NamedTuple):
    """The part of an image that becomes a view, in its pixels; `flip` mirrors it left to right."""

    top: int
    left: int
    height: int
    width: int
    flip: bool


def draw_box(
    crop: Crop, seed: int, epoch: int, index: int, view: int, height: int, width: int
) -> Box:
    """Draw the box of one view of one image, with a random area and aspect ratio at a random place.

    torchvision's sampler makes up to 10 attempts with an area uniform in `crop.scale` (as a share
    of the image's) and a ratio log-uniform in `crop.ratio`. If no box fits into the image, it
    takes the largest central box whose ratio is in range. The module's docstring describes the
    other samplers.

    Args:
        crop: Recipe of the view.
        seed: Seed of the run.
        epoch: Number of passes over the data before this one.
        index: Number of the image in the data set.
        view: Number of the view, in the order of `recipe.expand_counts`.
        height: Height of the decoded image, in pixels.
        width: Width of the decoded image, in pixels.
    """
    return Box(*box_at(chances(crop), (seed, epoch, index, view), height, width))


def chances(crop: Crop) -> tuple[float, ...]:
    """Return the numbers that `box_at` needs of a recipe.

    They are the range of areas, the range of ratios, the probability of a flip and the sampler.
    """
    sampler = SAMPLERS[crop.crop_sampler]
    return (*map(float, (*crop.scale, *crop.ratio, crop.flip)), sampler)


@njit(nogil=True, cache=True)
def box_at(chances, key, height, width):
    """Draw a box as `draw` does, in compiled code.

    Args:
        chances: The recipe's numbers, from `chances`.
        key: Seed, epoch, index and view, integers.
        height: Height of the image.
        width: Width of the image.

    Returns:
        The fields of a `Box`.
    """
    low_area, high_area, low_ratio, high_ratio, flip, sampler = chances
    seed, epoch, index, view = key
    flipped = rng.uniform_at(seed, epoch, index, view, _FLIP, 0) < flip
    if sampler == TENSORFLOW:
        areas = (low_area * height * width, high_area * height * width)
        box = _tensorflow_box(areas, (low_ratio, high_ratio), key, height, width)
        return box[0], box[1], box[2], box[3], flipped
    low_log, high_log = math.log(low_ratio), math.log(high_ratio)
    for attempt in range(TRIES):
        spread_area, spread_ratio, spread_top, spread_left = _attempt(key, attempt)
        area = height * width * (low_area + (high_area - low_area) * spread_area)
        ratio = math.exp(low_log + (high_log - low_log) * spread_ratio)
        box_width = int(np.rint(math.sqrt(area * ratio)))
        box_height = int(np.rint(math.sqrt(area / ratio)))
        if sampler == CLIPPED:
            box_height, box_width = max(1, min(box_height, height)), max(1, min(box_width, width))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(spread_top * (height - box_height + 1))
            left = int(spread_left * (width - box_width + 1))
            return top, left, box_height, box_width, flipped
    box_height, box_width = height, width
    if width / height < low_ratio:
        box_height = int(np.rint(width / low_ratio))
    elif width / height > high_ratio:
        box_width = int(np.rint(height * high_ratio))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width, flipped


@njit(nogil=True, cache=True)
def _attempt(key, attempt):
    """Return the four random numbers of an attempt to place a box."""
    seed, epoch, index, view = key
    lane = 4 * attempt
    return (
        rng.uniform_at(seed, epoch, index, view, _CROP, lane),
        rng.uniform_at(seed, epoch, index, view, _CROP, lane + 1),
        rng.uniform_at(seed, epoch, index, view, _CROP, lane + 2),
        rng.uniform_at(seed, epoch, index, view, _CROP, lane + 3),
    )


@njit(nogil=True, cache=True)
def _tensorflow_box(areas, ratios, key, height, width):
    """Draw (top, left, height, width) as tf.image.sample_distorted_bounding_box does.

    After 100 attempts it is the whole image. As in TensorFlow's kernel, a box that is smaller than
    the image never touches its bottom or right edge.
    """
    (least, most), (low_ratio, high_ratio) = areas, ratios
    for attempt in range(TENSORFLOW_TRIES):
        spread_ratio, spread_height, spread_top, spread_left = _attempt(key, attempt)
        ratio = low_ratio + (high_ratio - low_ratio) * spread_ratio
        tallest = int(np.rint(math.sqrt(most / ratio)))
        if np.rint(tallest * ratio) > width:  # the largest height whose width still fits
            tallest = int((width + 0.5) / ratio)
            tallest -= np.rint(tallest * ratio) > width
        tallest = min(tallest, height)
        shortest = min(int(np.rint(math.sqrt(least / ratio))), tallest)
        box_height = shortest + int(spread_height * (tallest - shortest + 1))
        box_width = int(np.rint(box_height * ratio))
        if box_height * box_width < least:  # rounding can leave the range of areas by one row
            box_height += 1
            box_width = int(np.rint(box_height * ratio))
        if box_height * box_width > most:
            box_height -= 1
            box_width = int(np.rint(box_height * ratio))
        area = box_height * box_width
        fits = 0 < box_height <= height and 0 < box_width <= width
        if fits and least <= area <= most and area >= TENSORFLOW_COVERED * height * width:
            top = int(spread_top * (height - box_height))
            left = int(spread_left * (width - box_width))
            return top, left, box_height, box_width
    return 0, 0, height, width


def draw_boxes(
    crop: Crop, seed: int, epoch: int, indices: np.ndarray, view: int, sizes: np.ndarray
) -> np.ndarray:
    """Draw the boxes of many images as `draw` does.

    Args:
        crop: Recipe of the view.
        seed: Seed of the run.
        epoch: Number of passes over the data before this one.
        indices: Numbers of the images in the data set, int64 (n,).
        view: Number of the view.
        sizes: Height and width of each image in pixels, int64 (n, 2).

    Returns:
        int64 array of shape (n, 5), one `Box` per row.
    """
    filled = np.empty((len(indices), 5), np.int64)
    _fill_boxes(chances(crop), seed, epoch, indices, view, sizes, filled)
    return filled


@njit(nogil=True, cache=True)
def _fill_boxes(chances, seed, epoch, indices, view, sizes, boxes):
    for row in range(len(indices)):
        key = (seed, epoch, indices[row], view)
        box = box_at(chances, key, sizes[row, 0], sizes[row, 1])
        boxes[row, 0], boxes[row, 1], boxes[row, 2], boxes[row, 3], boxes[row, 4] = box


def apply(image: Tensor, box: Box, crop: Crop) -> Tensor:
    """Cut a box out of an image, resize and flip it, and return it as uint8 (3, size, size).

    Args:
        image: Decoded image, uint8 (3, height, width), in any memory format.
        box: Box inside the image.
        crop: Recipe, which gives size, interpolation and antialiasing.
    """
    if not crop.antialias:
        return _without_antialias(image, box, crop)
    mode = F.InterpolationMode(crop.interpolation)
    view = F.resized_crop(
        image,
        box.top,
        box.left,
        box.height,
        box.width,
        [crop.size, crop.size],
        mode,
        antialias=True,
    )
    return view.flip(-1) if box.flip else view


def _without_antialias(image: Tensor, box: Box, crop: Crop) -> Tensor:
    """Do what `apply` does without antialiasing, in the arithmetic of the compiled loader.

    torch's cubic without antialiasing is another one (a = -0.75).
    """
    cut = image[:, box.top : box.top + box.height, box.left : box.left + box.width]
    turned = cut.permute(2, 0, 1).contiguous().flatten().numpy()
    view = torch.empty(3, crop.size, crop.size, dtype=torch.uint8)
    bicubic = crop.interpolation == "bicubic"
    resize.write_plain_cut(
        turned, box.height, box.width, box.flip, crop.size, bicubic, view.flatten().numpy()
    )
    return view


def apply_to_batch(images: Tensor, boxes: np.ndarray, crop: Crop) -> Tensor:
    """Crop a whole batch on its device, within one gray level of `apply`: uint8 (n, 3, size, size).

    A resize is a product with one matrix along x and one along y. Each image has its own, as its
    box differs.

    Args:
        images: Decoded images, uint8 (n, 3, height, width).
        boxes: Boxes as the function `boxes` returns them, int64 (n, 5).
        crop: Recipe, which gives size, interpolation and antialiasing.
    """
    at = upload(torch.from_numpy(boxes), images.device)
    along_x = _matrices(at[:, 1], at[:, 3], images.shape[3], crop)
    along_x = torch.where(at[:, 4, None, None] == 1, along_x.flip(1), along_x)
    along_y = _matrices(at[:, 0], at[:, 2], images.shape[2], crop)
    views = images.to(torch.float32) @ along_x[:, None].transpose(2, 3)
    if crop.antialias:
        views = _to_levels(views)
    return _to_levels(along_y[:, None] @ views).to(torch.uint8)


def _matrices(first: Tensor, length: Tensor, total: int, crop: Crop) -> Tensor:
    """Return how much each pixel of a view takes of each pixel of an image along one axis.

    The weights are float32 (n, size, total).

    They are the weights of `resize.axis`, rounded as there. Without antialiasing they are those of
    `resize.write_plain_view`, which are not rounded.

    Args:
        first: First pixel of each box along the axis, int64 (n,).
        length: Pixels of each box along the axis, int64 (n,).
        total: Pixels of the image along the axis.
        crop: Recipe, which gives size, interpolation and antialiasing.
    """
    widest = 2.0 if crop.interpolation == "bicubic" else 1.0
    scale = (length.to(torch.float64) / crop.size)[:, None, None]
    widened = scale.clamp_min(1.0) if crop.antialias else torch.ones_like(scale)
    center = scale * (torch.arange(crop.size, device=first.device)[:, None] + 0.5)
    pixel = torch.arange(total, device=first.device) - first[:, None, None]
    start = (center - widest * widened + 0.5).trunc().clamp_min(0)
    end = torch.minimum(
        (center + widest * widened + 0.5).trunc(), length[:, None, None].to(torch.float64)
    )
    x = ((pixel - center + 0.5) / widened).abs()
    if crop.interpolation == "bicubic":
        weights = torch.where(
            x < 1,
            (1.5 * x - 2.5) * x * x + 1,
            torch.where(x < 2, ((-0.5 * x + 2.5) * x - 4) * x + 2, 0.0),
        )
    else:
        weights = (1 - x).clamp_min(0)
    weights = weights * ((pixel >= start) & (pixel < end))
    weights = weights / weights.sum(2, keepdim=True)
    if not crop.antialias:
        return weights.to(torch.float32)
    bits = torch.log2(32767.49 / weights.amax((1, 2), keepdim=True)).floor().clamp_max(22)
    steps = weights * 2**bits
    return ((steps + 0.5 * steps.sign()).trunc() / 2**bits).to(torch.float32)


def _to_levels(images: Tensor) -> Tensor:
    """Round to whole gray levels from 0 to 255, in place."""
    return images.add_(0.5).floor_().clamp_(0, 255)


def evaluate(
    image: Tensor, size: int, crop_ratio: float = 0.875, interpolation: Interpolation = "bilinear"
) -> Tensor:
    """Return the view that evaluations use, uint8 (3, size, size).

    The shorter side is resized to round(size / crop_ratio) pixels at the same aspect ratio, and
    the central square is cut out. For the usual ImageNet protocol that is 256 and 224 pixels. Of
    an image more than 16 times as long as wide only the middle is resized, so that memory depends
    on the view and not on the file.

    Args:
        image: Decoded image, uint8 (3, height, width).
        size: Side of the view, in pixels.
        crop_ratio: Share of the resized shorter side that is kept, 1.0 for all of it.
        interpolation: Kind of resize, always antialiased.

    Raises:
        ValueError: If crop_ratio is outside (0, 1].
    """
    if not 0 < crop_ratio <= 1:
        raise ValueError(f"crops.evaluate: crop_ratio must be in (0, 1], got {crop_ratio}")
    mode = F.InterpolationMode(interpolation)
    resized_side = round(size / crop_ratio)
    height, width = image.shape[-2:]
    if max(height, width) > MAX_ASPECT * min(height, width):
        length = _middle(max(height, width), min(height, width), resized_side)
        image = F.center_crop(image, [min(height, length), min(width, length)])
    resized = F.resize(image, [resized_side], mode, antialias=True)
    return F.center_crop(resized, [size, size])


def _middle(longer: int, shorter: int, resized_side: int) -> int:
    """Return how many pixels of the longer side to resize without changing the central crop.

    As much is cut off at either end, and the resized lengths differ by a multiple of 4. Otherwise
    the center would fall on another fraction of a pixel, as torchvision rounds half a pixel to
    even.
    """
    whole = resized_side * longer // shorter
    first = MAX_ASPECT * shorter + (longer - MAX_ASPECT * shorter) % 2
    candidates = range(first, min(longer, first + 64) + 1, 2)
    return next(
        (length for length in candidates if (whole - resized_side * length // shorter) % 4 == 0),
        first,
    )
