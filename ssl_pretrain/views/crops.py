"""One decoded image -> its crops, on the CPU, in uint8: the geometry of every view.

`draw` chooses a box with torchvision's RandomResizedCrop (the algorithm of Inception's
"distorted bounding box", Szegedy et al., CVPR 2015, arXiv:1409.4842, section 6) and `apply`
cuts, resizes and flips. Both are torchvision's arithmetic; only the source of random
numbers differs.
"""

import math
from typing import NamedTuple

from torch import Tensor
from torchvision.transforms.v2 import functional as F

from ssl_pretrain import draws
from ssl_pretrain.draws import Purpose
from ssl_pretrain.views.recipe import Crop, Interpolation

TRIES = 10    # torchvision's


class Box(NamedTuple):
    """The part of an image that becomes a view, in its pixels; `flip` mirrors it left to right."""

    top: int
    left: int
    height: int
    width: int
    flip: bool


def draw(crop: Crop, seed: int, epoch: int, index: int, view: int, height: int, width: int) -> Box:
    """The box of one view of one image: a random area and aspect ratio at a random place.

    Up to 10 tries of an area uniform in `crop.scale` (of the image's) and a ratio
    log-uniform in `crop.ratio`; if none fits into the image, the largest central box whose
    ratio is in range.

    Args:
        crop: the view's recipe.
        seed: of the run.
        epoch: passes over the data before this one.
        index: of the image in the data set.
        view: number of the view, as `recipe.each` orders them.
        height: of the decoded image, in pixels.
        width: likewise.
    """
    flip = bool(draws.uniform(seed, epoch, index, view, Purpose.FLIP, 1)[0, 0] < crop.flip)
    log_ratio = math.log(crop.ratio[0]), math.log(crop.ratio[1])
    tries = draws.uniform(seed, epoch, index, view, Purpose.CROP, 4 * TRIES).reshape(TRIES, 4).tolist()
    for area_draw, ratio_draw, top_draw, left_draw in tries:
        area = height * width * (crop.scale[0] + (crop.scale[1] - crop.scale[0]) * area_draw)
        ratio = math.exp(log_ratio[0] + (log_ratio[1] - log_ratio[0]) * ratio_draw)
        box_width = round(math.sqrt(area * ratio))
        box_height = round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(top_draw * (height - box_height + 1))
            left = int(left_draw * (width - box_width + 1))
            return Box(top, left, box_height, box_width, flip)
    return _central(crop, height, width, flip)


def _central(crop: Crop, height: int, width: int, flip: bool) -> Box:
    box_height, box_width = height, width
    if width / height < min(crop.ratio):
        box_height = round(width / min(crop.ratio))
    elif width / height > max(crop.ratio):
        box_width = round(height * max(crop.ratio))
    return Box((height - box_height) // 2, (width - box_width) // 2, box_height, box_width, flip)


def apply(image: Tensor, box: Box, crop: Crop) -> Tensor:
    """The view inside `box`: uint8 (3, size, size), resized with antialiasing, flipped if the box says so.

    Args:
        image: decoded, uint8 (3, height, width), in any memory order.
        box: inside the image.
        crop: the recipe that gives size and interpolation.
    """
    view = F.resized_crop(image, box.top, box.left, box.height, box.width, [crop.size, crop.size], crop.interpolation, antialias=True)
    return view.flip(-1) if box.flip else view


def evaluate(image: Tensor, size: int, crop_ratio: float = 0.875, interpolation: Interpolation = "bilinear") -> Tensor:
    """The one view that evaluations see: uint8 (3, size, size).

    The shorter side is resized to round(size / crop_ratio) pixels, keeping the aspect
    ratio, and the central square is cut out: 256 and 224 for the usual ImageNet protocol.

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
    resized = F.resize(image, [round(size / crop_ratio)], interpolation, antialias=True)
    return F.center_crop(resized, [size, size])
