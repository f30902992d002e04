"""Crop, resize and flip decoded images: the geometry of every view.

`draw_box` chooses a box, and `apply` cuts it out, resizes and flips it. By default both compute
what torchvision's RandomResizedCrop does, except for the source of random numbers. The method is
Inception's "distorted bounding box" (Szegedy et al., CVPR 2015, arXiv:1409.4842, section 6).
`crop_sampler` chooses the distribution of the boxes. Each choice follows official code:

- torchvision: The area is uniform and the ratio log-uniform. Both are drawn until the box fits,
  at most 10 times. After that the box is the largest central one whose ratio is in range.
- tensorflow, for SimCLR: The ratio is uniform. The height is uniform among the integers that the
  range of areas and the image allow, so small areas are more frequent. This is
  tf.image.sample_distorted_bounding_box with min_object_covered = 0.1, as SimCLR's code calls it.
  The function rejects areas below a tenth of the image, although the range of areas begins at 0.08.
- clipped, for BYOL: The area is uniform and the ratio log-uniform, drawn once. Width and height are
  clipped to those of the image.

`antialias: false` resizes as tf.image.resize does, without a low-pass filter before shrinking.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from ssl_pretrain import rng
from ssl_pretrain.rng import Purpose
from ssl_pretrain.schema import image_sizes
from ssl_pretrain.schema.image_sizes import ImageSize
from ssl_pretrain.system.jit import njit
from ssl_pretrain.views import resize
from ssl_pretrain.views.batch import upload
from ssl_pretrain.views.recipe import Crop, Interpolation

MAX_ASPECT = 16  # excess length beyond which `evaluation_view` only resizes an image's middle
MAX_ATTEMPTS = 10  # as in torchvision
TENSORFLOW_MAX_ATTEMPTS = 100  # as in SimCLR's code
TENSORFLOW_MIN_AREA_SHARE = 0.1  # smallest share of the image in a box, SimCLR's min_object_covered
TORCHVISION, TENSORFLOW, CLIPPED = 0.0, 1.0, 2.0  # numbers because compiled code takes no text
SAMPLERS = {"torchvision": TORCHVISION, "tensorflow": TENSORFLOW, "clipped": CLIPPED}
_CROP, _FLIP = int(Purpose.CROP), int(Purpose.FLIP)


class Box(NamedTuple):
    """The part of an image that becomes a view, in pixels of the image.

    If `flip` is true, the view is mirrored from left to right.
    """

    top: int
    left: int
    height: int
    width: int
    flip: bool


def draw_box(
    crop: Crop, seed: int, epoch: int, index: int, view: int, height: int, width: int
) -> Box:
    """Draw the box of one view of an image, with the recipe's sampler.

    Args:
        crop: Recipe of the view.
        seed: Seed of the run.
        epoch: Number of passes over the data before this one.
        index: Index of the image in the data set.
        view: Index of the view, in the order of `recipe.crop_per_view`.
        height: Height of the decoded image, in pixels.
        width: Width of the decoded image, in pixels.
    """
    return Box(*draw_box_fields(box_parameters(crop), (seed, epoch, index, view), height, width))


def box_parameters(crop: Crop) -> tuple[float, ...]:
    """Return the recipe's range of areas, range of ratios, probability of a flip and sampler."""
    sampler = SAMPLERS[crop.crop_sampler]
    return (*map(float, (*crop.scale, *crop.ratio, crop.flip)), sampler)


@njit(nogil=True, cache=True)
def draw_box_fields(parameters, key, height, width):
    """Draw a box as `draw_box` does, in compiled code. Return the fields of a `Box`.

    Args:
        parameters: The recipe's numbers, from `box_parameters`.
        key: Seed, epoch, index and view, integers.
        height: Height of the image.
        width: Width of the image.
    """
    low_area, high_area, low_ratio, high_ratio, flip_probability, sampler = parameters
    seed, epoch, index, view = key
    flip = rng.uniform_at(seed, epoch, index, view, _FLIP, 0) < flip_probability
    if sampler == TENSORFLOW:
        areas = (low_area * height * width, high_area * height * width)
        return (*_tensorflow_box(areas, (low_ratio, high_ratio), key, height, width), flip)
    low_log, high_log = math.log(low_ratio), math.log(high_ratio)
    for attempt in range(MAX_ATTEMPTS):
        u_area, u_ratio, u_top, u_left = _four_uniforms(key, attempt)
        area = height * width * (low_area + (high_area - low_area) * u_area)
        ratio = math.exp(low_log + (high_log - low_log) * u_ratio)
        box_width = int(np.rint(math.sqrt(area * ratio)))
        box_height = int(np.rint(math.sqrt(area / ratio)))
        if sampler == CLIPPED:
            box_height, box_width = max(1, min(box_height, height)), max(1, min(box_width, width))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(u_top * (height - box_height + 1))
            left = int(u_left * (width - box_width + 1))
            return top, left, box_height, box_width, flip
    box_height, box_width = height, width
    if width / height < low_ratio:
        box_height = int(np.rint(width / low_ratio))
    elif width / height > high_ratio:
        box_width = int(np.rint(height * high_ratio))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width, flip


@njit(nogil=True, cache=True)
def _four_uniforms(key, attempt):
    """Return the four random numbers in [0, 1) of an attempt to place a box."""
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

    After 100 attempts the box is the whole image. As in TensorFlow's kernel, a box that is smaller
    than the image never touches the bottom or right edge of the image.
    """
    (min_area, max_area), (low_ratio, high_ratio) = areas, ratios
    for attempt in range(TENSORFLOW_MAX_ATTEMPTS):
        u_ratio, u_height, u_top, u_left = _four_uniforms(key, attempt)
        ratio = low_ratio + (high_ratio - low_ratio) * u_ratio
        max_height = int(np.rint(math.sqrt(max_area / ratio)))
        if np.rint(max_height * ratio) > width:  # take the largest height whose width still fits
            max_height = int((width + 0.5) / ratio)
            max_height -= np.rint(max_height * ratio) > width
        max_height = min(max_height, height)
        min_height = min(int(np.rint(math.sqrt(min_area / ratio))), max_height)
        box_height = min_height + int(u_height * (max_height - min_height + 1))
        box_width = int(np.rint(box_height * ratio))
        if box_height * box_width < min_area:  # rounding can miss the range by one row
            box_height += 1
            box_width = int(np.rint(box_height * ratio))
        if box_height * box_width > max_area:
            box_height -= 1
            box_width = int(np.rint(box_height * ratio))
        area = box_height * box_width
        fits = 0 < box_height <= height and 0 < box_width <= width
        is_large = area >= TENSORFLOW_MIN_AREA_SHARE * height * width
        if fits and is_large and min_area <= area <= max_area:
            top = int(u_top * (height - box_height))
            left = int(u_left * (width - box_width))
            return top, left, box_height, box_width
    return 0, 0, height, width


def draw_boxes(
    crop: Crop, seed: int, epoch: int, indices: np.ndarray, view: int, sizes: np.ndarray
) -> np.ndarray:
    """Draw the boxes of many images as `draw_box` does.

    Args:
        crop: Recipe of the view.
        seed: Seed of the run.
        epoch: Number of passes over the data before this one.
        indices: Indices of the images in the data set, int64 (n,).
        view: Index of the view.
        sizes: Height and width of each image in pixels, int64 (n, 2).

    Returns:
        int64 array of shape (n, 5), one `Box` per row.
    """
    return _draw_box_rows(box_parameters(crop), seed, epoch, indices, view, sizes)


@njit(nogil=True, cache=True)
def _draw_box_rows(parameters, seed, epoch, indices, view, sizes):
    boxes = np.empty((len(indices), 5), np.int64)
    for row in range(len(indices)):
        key = (seed, epoch, indices[row], view)
        box = draw_box_fields(parameters, key, sizes[row, 0], sizes[row, 1])
        boxes[row, 0], boxes[row, 1], boxes[row, 2], boxes[row, 3], boxes[row, 4] = box
    return boxes


def apply(image: Tensor, box: Box, crop: Crop) -> Tensor:
    """Cut out a box of an image, resize and flip it.

    Args:
        image: Decoded image, uint8 (C, height, width), in any memory format.
        box: Box inside the image.
        crop: Recipe with the size, interpolation and antialiasing.

    Returns:
        The view, uint8 (C, crop.height, crop.width).
    """
    if not crop.antialias:
        return _apply_without_antialias(image, box, crop)
    size, mode = [crop.height, crop.width], F.InterpolationMode(crop.interpolation)
    view = F.resized_crop(image, *box[:4], size, mode, antialias=True)
    return view.flip(-1) if box.flip else view


def _apply_without_antialias(image: Tensor, box: Box, crop: Crop) -> Tensor:
    """Apply a crop without antialiasing, exactly as the compiled loader does.

    torch cannot do it, because its cubic filter then has another parameter (a = -0.75).
    """
    box_pixels = image[:, box.top : box.top + box.height, box.left : box.left + box.width]
    transposed = box_pixels.permute(2, 0, 1).contiguous().flatten().numpy()
    view = torch.empty(len(image), crop.height, crop.width, dtype=torch.uint8)
    bicubic = crop.interpolation == "bicubic"
    resize.resize_without_antialias(
        transposed,
        len(image),
        box.height,
        box.width,
        box.flip,
        (crop.height, crop.width),
        bicubic,
        view.flatten().numpy(),
    )
    return view


def apply_to_batch(images: Tensor, boxes: np.ndarray, crop: Crop) -> Tensor:
    """Crop a whole batch on its device, within one gray level of `apply`.

    A resize is a product with one matrix along x and one along y. Each image has its own matrices,
    because the boxes differ.

    Args:
        images: Decoded images, uint8 (n, C, height, width).
        boxes: Boxes from `draw_boxes`, int64 (n, 5).
        crop: Recipe with the size, interpolation and antialiasing.

    Returns:
        The views, uint8 (n, C, crop.height, crop.width).
    """
    top, left, height, width, flip = upload(torch.from_numpy(boxes), images.device).unbind(1)
    x_weights = _resize_matrices(left, width, images.shape[3], crop, crop.width)
    x_weights = torch.where(flip[:, None, None] == 1, x_weights.flip(1), x_weights)
    y_weights = _resize_matrices(top, height, images.shape[2], crop, crop.height)
    views = images.to(torch.float32) @ x_weights[:, None].transpose(2, 3)
    if crop.antialias:
        views = _to_levels(views)
    return _to_levels(y_weights[:, None] @ views).to(torch.uint8)


def _resize_matrices(
    box_starts: Tensor, box_lengths: Tensor, image_length: int, crop: Crop, view_length: int
) -> Tensor:
    """Return the weight of each pixel of an image in each pixel of a view along one axis.

    With antialiasing the weights are rounded as by `resize.compute_weights`. Without it they are
    those of `resize.write_view_without_antialias`, which are not rounded.

    Args:
        box_starts: First pixel of each box along the axis, int64 (n,).
        box_lengths: Pixels of each box along the axis, int64 (n,).
        image_length: Pixels of the image along the axis.
        crop: Recipe with the interpolation and antialiasing.
        view_length: Pixels of the view along the axis.

    Returns:
        The weights, float32 (n, view_length, image_length).
    """
    scale = (box_lengths.to(torch.float64) / view_length)[:, None, None]
    stretch = scale.clamp_min(1.0) if crop.antialias else torch.ones_like(scale)
    reach = (2.0 if crop.interpolation == "bicubic" else 1.0) * stretch
    center = scale * (torch.arange(view_length, device=box_starts.device)[:, None] + 0.5)
    pixel = torch.arange(image_length, device=box_starts.device) - box_starts[:, None, None]
    start = (center - reach + 0.5).trunc().clamp_min(0)
    box_end = box_lengths[:, None, None].to(torch.float64)
    end = torch.minimum((center + reach + 0.5).trunc(), box_end)
    x = ((pixel - center + 0.5) / stretch).abs()
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
    scaled = weights * 2**bits
    return ((scaled + 0.5 * scaled.sign()).trunc() / 2**bits).to(torch.float32)


def _to_levels(images: Tensor) -> Tensor:
    """Round to whole gray levels from 0 to 255, in place."""
    return images.add_(0.5).floor_().clamp_(0, 255)


def evaluation_view(
    image: Tensor,
    size: ImageSize,
    crop_ratio: float = 0.875,
    interpolation: Interpolation = "bilinear",
) -> Tensor:
    """Return the view for evaluations, uint8 (C, *size).

    The image is resized at the same aspect ratio until it just covers round(size / crop_ratio)
    pixels in both directions, and the center is cut out. For the usual ImageNet protocol, the
    shorter side gets 256 pixels, and the center is a square of 224 pixels. If an image is more than
    16 times as long as the view needs, only its middle is resized, to limit the memory.

    Args:
        image: Decoded image, uint8 (C, height, width).
        size: Side of a square view in pixels, or [height, width].
        crop_ratio: Side of the view as a share of the resized side that it covers.
        interpolation: Interpolation of the resize, which is always antialiased.

    Raises:
        ValueError: If crop_ratio is outside (0, 1].
    """
    if not 0 < crop_ratio <= 1:
        raise ValueError(f"crops.evaluation_view: crop_ratio must be in (0, 1], got {crop_ratio}")
    mode = F.InterpolationMode(interpolation)
    view = image_sizes.height_and_width(size)
    covered = tuple(round(length / crop_ratio) for length in view)
    # Along the tight axis the resized image has exactly the covered length, along the other more.
    tight = 0 if covered[0] * image.shape[-1] >= covered[1] * image.shape[-2] else 1
    image, resized = _cut_middle(image, covered, tight)
    return F.center_crop(F.resize(image, resized, mode, antialias=True), list(view))


def resized_shape(shape: Sequence[int], covered: Sequence[int], tight: int) -> list[int]:
    """Return the height and width of an image after it is resized to cover an area.

    Args:
        shape: Height and width of the image.
        covered: Height and width of the area.
        tight: Axis along which the result has the length of the area, 0 or 1.
    """
    other_length = covered[tight] * shape[1 - tight] // shape[tight]
    return [covered[0], other_length] if tight == 0 else [other_length, covered[1]]


def _cut_middle(image: Tensor, covered: Sequence[int], tight: int) -> tuple[Tensor, list[int]]:
    """Return the part of an image that is worth resizing, and its size after the resize.

    The image is cut along the loose axis if it is more than `MAX_ASPECT` times as long as needed.
    Equal numbers of pixels are cut off at both ends, and the resized lengths differ by a multiple
    of 4. Otherwise the center would fall on another fraction of a pixel, because torchvision rounds
    half a pixel to even.
    """
    shape, loose = list(image.shape[-2:]), 1 - tight
    resized = resized_shape(shape, covered, tight)
    longest = -(-MAX_ASPECT * shape[tight] * covered[loose] // covered[tight])  # rounded up
    if shape[loose] <= longest:
        return image, resized
    first = longest + (shape[loose] - longest) % 2
    cut_shapes = [
        [length, shape[1]] if loose == 0 else [shape[0], length]
        for length in range(first, min(shape[loose], first + 64) + 1, 2)
    ]
    cut_shape = next(
        (
            cut
            for cut in cut_shapes
            if (resized[loose] - resized_shape(cut, covered, tight)[loose]) % 4 == 0
        ),
        cut_shapes[0],
    )
    return F.center_crop(image, cut_shape), resized_shape(cut_shape, covered, tight)
