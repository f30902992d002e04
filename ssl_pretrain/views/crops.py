"""One decoded image -> its crops, on the CPU, in uint8: the geometry of every view.

`draw` chooses a box and `apply` cuts, resizes and flips. By default both are the arithmetic of
torchvision's RandomResizedCrop (after Inception's "distorted bounding box", Szegedy et al., CVPR
2015, arXiv:1409.4842, section 6); only the source of random numbers differs. `crop_sampler` chooses
the box as other official code does, and the boxes are then distributed differently:

- torchvision: area uniform, ratio log-uniform, both drawn again until the box fits, 10 times at most.
- tensorflow: ratio uniform, then the height uniform among the whole numbers for which area and image
  allow it, so that small areas are more frequent. SimCLR's code calls
  tf.image.sample_distorted_bounding_box so, with min_object_covered = 0.1, which refuses areas below
  a tenth of the image although its area range begins at 0.08.
- clipped: area uniform, ratio log-uniform, drawn once; width and height are cut to the image's. BYOL.

`antialias: false` resizes as tf.image.resize does, without a low-pass filter before shrinking.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from ssl_pretrain import draws
from ssl_pretrain.draws import Purpose
from ssl_pretrain.jit import njit
from ssl_pretrain.views import resize
from ssl_pretrain.views.recipe import Crop, Interpolation
from ssl_pretrain.views.upload import upload

LONGEST = 16  # times the shorter side: what of a long thin image an evaluation resizes
TRIES = 10    # torchvision's
TENSORFLOW_TRIES = 100    # SimCLR's max_attempts
TENSORFLOW_COVERED = 0.1    # SimCLR's min_object_covered: the least share of the image inside a box
SAMPLERS = {"torchvision": 0.0, "tensorflow": 1.0, "clipped": 2.0}    # numbers, for jitted code
_CROP, _FLIP = int(Purpose.CROP), int(Purpose.FLIP)    # jitted code takes no enumeration


class Box(NamedTuple):
    """The part of an image that becomes a view, in its pixels; `flip` mirrors it left to right."""

    top: int
    left: int
    height: int
    width: int
    flip: bool


def draw(crop: Crop, seed: int, epoch: int, index: int, view: int, height: int, width: int) -> Box:
    """The box of one view of one image: a random area and aspect ratio at a random place.

    With torchvision's sampler, up to 10 tries of an area uniform in `crop.scale` (of the image's)
    and a ratio log-uniform in `crop.ratio`; if none fits into the image, the largest central box
    whose ratio is in range. The module's docstring describes the other samplers.

    Args:
        crop: the view's recipe.
        seed: of the run.
        epoch: passes over the data before this one.
        index: of the image in the data set.
        view: number of the view, as `recipe.each` orders them.
        height: of the decoded image, in pixels.
        width: likewise.
    """
    return Box(*box_at(*chances(crop), seed, epoch, index, view, height, width))


def chances(crop: Crop) -> tuple[float, float, float, float, float, float]:
    """The numbers of a recipe that `box_at` takes: range of areas, range of ratios, probability of a flip, number of the sampler."""
    return (*map(float, crop.scale), *map(float, crop.ratio), float(crop.flip), SAMPLERS[crop.crop_sampler])  # type: ignore[return-value]


@njit(nogil=True, cache=True)
def box_at(low_area, high_area, low_ratio, high_ratio, flip, sampler, seed, epoch, index, view, height, width):
    """`draw` inside other jitted functions: (top, left, height, width, flip)."""
    flipped = draws.uniform_at(seed, epoch, index, view, _FLIP, 0) < flip
    if sampler == 1.0:
        top, left, box_height, box_width = _tensorflow_box(
            low_area, high_area, low_ratio, high_ratio, seed, epoch, index, view, height, width
        )
        return top, left, box_height, box_width, flipped
    low_log, high_log = math.log(low_ratio), math.log(high_ratio)
    for number in range(TRIES):
        lane = 4 * number
        area = height * width * (low_area + (high_area - low_area) * draws.uniform_at(seed, epoch, index, view, _CROP, lane))
        ratio = math.exp(low_log + (high_log - low_log) * draws.uniform_at(seed, epoch, index, view, _CROP, lane + 1))
        box_width = int(np.rint(math.sqrt(area * ratio)))
        box_height = int(np.rint(math.sqrt(area / ratio)))
        if sampler == 2.0:
            box_height, box_width = max(1, min(box_height, height)), max(1, min(box_width, width))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(draws.uniform_at(seed, epoch, index, view, _CROP, lane + 2) * (height - box_height + 1))
            left = int(draws.uniform_at(seed, epoch, index, view, _CROP, lane + 3) * (width - box_width + 1))
            return top, left, box_height, box_width, flipped
    box_height, box_width = height, width
    if width / height < low_ratio:
        box_height = int(np.rint(width / low_ratio))
    elif width / height > high_ratio:
        box_width = int(np.rint(height * high_ratio))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width, flipped


@njit(nogil=True, cache=True)
def _tensorflow_box(low_area, high_area, low_ratio, high_ratio, seed, epoch, index, view, height, width):
    """(top, left, height, width) as tf.image.sample_distorted_bounding_box draws it; the whole image after 100 tries.

    Like TensorFlow's kernel, a box that is smaller than the image never touches its bottom or right edge.
    """
    least, most = low_area * height * width, high_area * height * width
    for number in range(TENSORFLOW_TRIES):
        lane = 4 * number
        ratio = low_ratio + (high_ratio - low_ratio) * draws.uniform_at(seed, epoch, index, view, _CROP, lane)
        tallest = int(np.rint(math.sqrt(most / ratio)))
        if np.rint(tallest * ratio) > width:  # the largest height whose width still fits
            tallest = int((width + 0.5) / ratio)
            tallest -= np.rint(tallest * ratio) > width
        tallest = min(tallest, height)
        shortest = min(int(np.rint(math.sqrt(least / ratio))), tallest)
        spread = draws.uniform_at(seed, epoch, index, view, _CROP, lane + 1)
        box_height = shortest + int(spread * (tallest - shortest + 1))
        box_width = int(np.rint(box_height * ratio))
        if box_height * box_width < least:  # rounding may miss the range of areas by one row
            box_height += 1
            box_width = int(np.rint(box_height * ratio))
        if box_height * box_width > most:
            box_height -= 1
            box_width = int(np.rint(box_height * ratio))
        area = box_height * box_width
        fits = 0 < box_height <= height and 0 < box_width <= width
        if fits and least <= area <= most and area >= TENSORFLOW_COVERED * height * width:
            top = int(draws.uniform_at(seed, epoch, index, view, _CROP, lane + 2) * (height - box_height))
            left = int(draws.uniform_at(seed, epoch, index, view, _CROP, lane + 3) * (width - box_width))
            return top, left, box_height, box_width
    return 0, 0, height, width


def boxes(crop: Crop, seed: int, epoch: int, indices: np.ndarray, view: int, sizes: np.ndarray) -> np.ndarray:
    """`draw` for many images: int64 (n, 5), a `Box` a row. sizes: int64 (n, 2), height and width of each."""
    drawn = np.empty((len(indices), 5), np.int64)
    _fill_boxes(chances(crop), seed, epoch, indices, view, sizes, drawn)
    return drawn


@njit(nogil=True, cache=True)
def _fill_boxes(chances, seed, epoch, indices, view, sizes, drawn):
    low, high, low_ratio, high_ratio, flip, sampler = chances
    for row in range(len(indices)):
        box = box_at(low, high, low_ratio, high_ratio, flip, sampler, seed, epoch, indices[row], view, sizes[row, 0], sizes[row, 1])
        drawn[row, 0], drawn[row, 1], drawn[row, 2], drawn[row, 3], drawn[row, 4] = box


def apply(image: Tensor, box: Box, crop: Crop) -> Tensor:
    """The view inside `box`: uint8 (3, size, size), resized and flipped if the box says so.

    Args:
        image: decoded, uint8 (3, height, width), in any memory order.
        box: inside the image.
        crop: the recipe that gives size, interpolation and antialiasing.
    """
    if not crop.antialias:
        return _without_antialias(image, box, crop)
    mode = F.InterpolationMode(crop.interpolation)
    view = F.resized_crop(image, box.top, box.left, box.height, box.width, [crop.size, crop.size], mode, antialias=True)
    return view.flip(-1) if box.flip else view


def _without_antialias(image: Tensor, box: Box, crop: Crop) -> Tensor:
    """`apply` in the arithmetic of the compiled loader; torch's own cubic is another one (a = -0.75) without antialiasing."""
    cut = image[:, box.top : box.top + box.height, box.left : box.left + box.width]
    turned = cut.permute(2, 0, 1).contiguous().flatten().numpy()
    view = torch.empty(3, crop.size, crop.size, dtype=torch.uint8)
    bicubic = crop.interpolation == "bicubic"
    resize.write_plain_cut(turned, box.height, box.width, box.flip, crop.size, bicubic, view.flatten().numpy())
    return view


def apply_to_batch(images: Tensor, boxes: np.ndarray, crop: Crop) -> Tensor:
    """`apply` for a whole batch on its own device, within one grey level of it: uint8 (n, 3, size, size).

    A resize is a product with one matrix along x and one along y, which differ from image to image with their boxes.

    Args:
        images: uint8 (n, 3, height, width).
        boxes: int64 (n, 5), of `boxes`.
        crop: the recipe that gives size, interpolation and antialiasing.
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
    """float32 (n, size, total): the weights of `resize.axis`, rounded as there, at the box's place in the image.

    Without antialiasing, those of `resize.write_plain_view`, which are not rounded.
    """
    widest = 2.0 if crop.interpolation == "bicubic" else 1.0
    scale = (length.to(torch.float64) / crop.size)[:, None, None]
    widened = scale.clamp_min(1.0) if crop.antialias else torch.ones_like(scale)
    centre = scale * (torch.arange(crop.size, device=first.device)[:, None] + 0.5)
    pixel = torch.arange(total, device=first.device) - first[:, None, None]
    start = (centre - widest * widened + 0.5).trunc().clamp_min(0)
    end = torch.minimum((centre + widest * widened + 0.5).trunc(), length[:, None, None].to(torch.float64))
    x = ((pixel - centre + 0.5) / widened).abs()
    if crop.interpolation == "bicubic":
        weights = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, torch.where(x < 2, ((-0.5 * x + 2.5) * x - 4) * x + 2, 0.0))
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
    return images.add_(0.5).floor_().clamp_(0, 255)


def evaluate(image: Tensor, size: int, crop_ratio: float = 0.875, interpolation: Interpolation = "bilinear") -> Tensor:
    """The one view that evaluations see: uint8 (3, size, size).

    The shorter side is resized to round(size / crop_ratio) pixels, keeping the aspect
    ratio, and the central square is cut out: 256 and 224 for the usual ImageNet protocol.
    Of an image more than 16 times as long as wide, only the middle is resized, so that memory
    depends on the view and not on the file.

    Args:
        image: decoded, uint8 (3, height, width).
        size: of the view, in pixels.
        crop_ratio: share of the resized shorter side that is kept; 1.0 keeps all of it.
        interpolation: antialiased always.

    Raises:
        ValueError: crop_ratio is outside (0, 1].
    """
    if not 0 < crop_ratio <= 1:
        raise ValueError(f"crops.evaluate: crop_ratio must be in (0, 1], got {crop_ratio}")
    mode = F.InterpolationMode(interpolation)
    resized_side = round(size / crop_ratio)
    height, width = image.shape[-2:]
    if max(height, width) > LONGEST * min(height, width):
        length = _middle(max(height, width), min(height, width), resized_side)
        image = F.center_crop(image, [min(height, length), min(width, length)])
    resized = F.resize(image, [round(size / crop_ratio)], mode, antialias=True)
    return F.center_crop(resized, [size, size])


def _middle(longer: int, shorter: int, resized_side: int) -> int:
    """How much of the longer side to resize so that its center falls on the same fraction of a pixel as the whole image's.

    As much is cut off at either end, and the resized lengths differ by a multiple of 4: torchvision rounds half a pixel to even.
    """
    whole = resized_side * longer // shorter
    first = LONGEST * shorter + (longer - LONGEST * shorter) % 2
    candidates = range(first, min(longer, first + 64) + 1, 2)
    return next((length for length in candidates if (whole - resized_side * length // shorter) % 4 == 0), first)
