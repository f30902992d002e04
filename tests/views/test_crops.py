"""Boxes and crops equal torchvision's, in value or in distribution."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ssl_pretrain.views import crops
from ssl_pretrain.views.crops import Box
from ssl_pretrain.views.recipe import Crop

pytestmark = pytest.mark.promise

# Probability that a statistical test fails for a correct distribution. It is small, as there are
# many tests. The seeds are fixed, so a test that passes once always passes.
CHANCE = 1e-4


def draw_image(height: int, width: int) -> torch.Tensor:
    return torch.randint(
        0,
        256,
        (3, height, width),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(height * 1000 + width),
    )


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [16, 96])  # smaller and larger than the box
@pytest.mark.parametrize("flip", [False, True])
def test_a_view_is_torchvisions_resized_crop(interpolation, size, flip):
    pixels, box = draw_image(70, 90), Box(5, 11, 41, 53, flip)
    expected = F.resized_crop(
        pixels, 5, 11, 41, 53, [size, size], F.InterpolationMode(interpolation), antialias=True
    )
    view = crops.apply(pixels, box, Crop(size=size, interpolation=interpolation))
    assert view.dtype == torch.uint8
    assert torch.equal(view, F.horizontal_flip(expected) if flip else expected)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("size", [(24, 80), (96, 16)])
def test_a_rectangular_view_is_torchvisions_random_resized_crop(size, antialias):
    pixels, box = draw_image(70, 90), Box(5, 11, 41, 53, flip=True)
    transform = v2.RandomResizedCrop(size, antialias=antialias)
    expected = transform.transform(pixels, dict(zip(Box._fields[:4], box)))
    view = crops.apply(pixels, box, Crop(size=list(size), antialias=antialias))
    assert view.shape == (3, *size)
    difference = (view.int() - F.horizontal_flip(expected).int()).abs()
    assert difference.max() <= (0 if antialias else 1)  # torch rounds other sums than we do


def test_the_memory_format_changes_nothing():
    pixels, crop, box = draw_image(70, 90), Crop(size=32), Box(5, 11, 41, 53, True)
    channels_last = pixels.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert torch.equal(crops.apply(channels_last, box, crop), crops.apply(pixels, box, crop))


def draw_boxes(crop: Crop, height: int, width: int, n: int) -> np.ndarray:
    return np.array([crops.draw_box(crop, 0, 0, index, 0, height, width)[:4] for index in range(n)])


def draw_torchvision_boxes(crop: Crop, height: int, width: int, n: int) -> np.ndarray:
    transform = v2.RandomResizedCrop(crop.size, scale=tuple(crop.scale), ratio=tuple(crop.ratio))
    blank = torch.empty(3, height, width)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        results = [transform.make_params([blank]) for _ in range(n)]
    return np.array([[box["top"], box["left"], box["height"], box["width"]] for box in results])


@pytest.mark.parametrize(
    ("crop", "height", "width"),
    [
        (Crop(), 375, 500),
        (Crop(size=96, scale=[0.05, 0.14]), 375, 500),  # SwAV's local crops
        (Crop(ratio=[0.5, 3.0]), 300, 200),
        (Crop(), 400, 130),  # in a narrow image many attempts do not fit, and some boxes fall back
    ],
)
def test_boxes_are_distributed_as_in_torchvision(crop, height, width):
    n = 4000
    ours, theirs = (draw(crop, height, width, n) for draw in (draw_boxes, draw_torchvision_boxes))
    measures = {
        "area": lambda b: b[:, 2] * b[:, 3],
        "ratio": lambda b: b[:, 3] / b[:, 2],
        "top": lambda b: b[:, 0] / np.maximum(1, height - b[:, 2]),
        "left": lambda b: b[:, 1] / np.maximum(1, width - b[:, 3]),
    }
    for name, measure in measures.items():
        assert stats.ks_2samp(measure(ours), measure(theirs)).pvalue > CHANCE, name
    assert ours.min(axis=0)[:2].tolist() == [0, 0]  # both edges are reached
    assert (ours[:, 0] + ours[:, 2]).max() == height
    assert (ours[:, 1] + ours[:, 3]).max() == width


def test_area_and_ratio_are_uniform_and_log_uniform():
    boxes = draw_boxes(Crop(scale=[0.1, 0.5]), 2000, 2000, 4000)  # all attempts fit at these sizes
    area, ratio = boxes[:, 2] * boxes[:, 3] / 2000**2, boxes[:, 3] / boxes[:, 2]
    assert stats.kstest(area, stats.uniform(0.1, 0.4).cdf).pvalue > CHANCE
    log_uniform = stats.uniform(math.log(3 / 4), math.log(16 / 9))
    assert stats.kstest(np.log(ratio), log_uniform.cdf).pvalue > CHANCE
    assert abs(np.corrcoef(area, ratio)[0, 1]) < 0.05
    top, left = boxes[:, 0] / (2000 - boxes[:, 2]), boxes[:, 1] / (2000 - boxes[:, 3])
    assert abs(np.corrcoef(top, left)[0, 1]) < 0.05


@pytest.mark.parametrize(
    ("height", "width"), [(300, 60), (60, 300), (101, 7), (8, 100), (100, 8), (1, 1), (1, 9)]
)
def test_the_fallback_is_torchvisions(height, width):
    crop = Crop(scale=[1.0, 1.0]) if height != width else Crop(scale=[4.0, 4.0])  # no attempt fits
    assert np.array_equal(
        draw_boxes(crop, height, width, 3), draw_torchvision_boxes(crop, height, width, 3)
    )


def test_the_fallback_of_an_image_within_the_ratio_is_the_whole_image():
    assert crops.draw_box(Crop(scale=[4.0, 4.0]), 0, 0, 0, 0, 100, 120)[:4] == (0, 0, 100, 120)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (1, 1), (2, 50), (375, 500)])
def test_a_box_is_inside_the_image(height, width):
    top, left, box_height, box_width = draw_boxes(Crop(), height, width, 500).T
    assert min(top.min(), left.min()) >= 0
    assert min(box_height.min(), box_width.min()) >= 1
    assert (top + box_height).max() <= height
    assert (left + box_width).max() <= width


def test_a_flip_has_the_probability_of_the_recipe():
    def draw_flips(probability):
        return [
            crops.draw_box(Crop(flip=probability), 0, 0, index, 0, 40, 40).flip
            for index in range(4000)
        ]

    assert not any(draw_flips(0.0))
    assert all(draw_flips(1.0))
    assert np.mean(draw_flips(0.3)) == pytest.approx(0.3, abs=0.025)  # 3.5 standard deviations


def test_a_box_depends_on_seed_epoch_index_and_view_alone():
    box = crops.draw_box(Crop(), 1, 2, 3, 4, 300, 400)
    assert box == crops.draw_box(Crop(), 1, 2, 3, 4, 300, 400)
    for key in [(0, 2, 3, 4), (1, 0, 3, 4), (1, 2, 0, 4), (1, 2, 3, 0)]:
        assert crops.draw_box(Crop(), *key, 300, 400)[:4] != box[:4]


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
        ),
    ],
)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [8, 32, [8, 32], [40, 12]])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"antialias": False, "crop_sampler": "tensorflow"},
        {"antialias": False, "crop_sampler": "clipped"},
    ],
)
def test_a_batch_is_cropped_like_its_images_one_by_one(interpolation, size, device, options):
    crop = Crop(size=size, interpolation=interpolation, scale=[0.05, 1.0], **options)
    sizes = np.array([[32, 32], [20, 31], [32, 9], [1, 1], [13, 32]] * 8)
    images = torch.zeros(40, 3, 32, 32, dtype=torch.uint8)
    expected = []
    for row, (height, width) in enumerate(sizes.tolist()):
        images[row, :, :height, :width] = draw_image(height, width)
        box = crops.draw_box(crop, 1, 2, 10 + row, 3, height, width)
        expected.append(crops.apply(images[row, :, :height, :width], box, crop))
    boxes = crops.draw_boxes(crop, 1, 2, np.arange(10, 50), 3, sizes)
    assert boxes[:, 4].min() == 0 and boxes[:, 4].max() == 1
    views = crops.apply_to_batch(images.to(device), boxes, crop).cpu()
    difference = (views.int() - torch.stack(expected).int()).abs()
    # Halves may be rounded up or down.
    assert difference.max() <= 1 and (difference > 0).float().mean() < 0.002


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("height", "width"), [(300, 400), (401, 299), (20, 90), (224, 224)])
@pytest.mark.parametrize(
    ("size", "crop_ratio", "resized_side"), [(224, 0.875, 256), (32, 1.0, 32), (96, 0.875, 110)]
)
def test_evaluation_takes_the_resized_center(
    interpolation, height, width, size, crop_ratio, resized_side
):
    transform = v2.Compose(
        [
            v2.Resize(
                resized_side, interpolation=F.InterpolationMode(interpolation), antialias=True
            ),
            v2.CenterCrop(size),
        ]
    )
    view = crops.evaluation_view(draw_image(height, width), size, crop_ratio, interpolation)
    assert view.shape == (3, size, size)
    assert torch.equal(view, transform(draw_image(height, width)))


@pytest.mark.parametrize(
    ("height", "width", "size", "crop_ratio", "resized"),
    [
        (64, 256, [64, 256], 1.0, (64, 256)),
        (128, 500, [64, 256], 1.0, (65, 256)),
        (90, 700, [64, 256], 0.875, (73, 567)),
        (200, 100, [48, 16], 0.5, (96, 48)),
        (20, 90, [30, 10], 0.875, (34, 153)),
    ],
)
def test_a_rectangular_evaluation_view_is_the_center_of_the_image_that_covers_it(
    height, width, size, crop_ratio, resized
):
    transform = v2.Compose([v2.Resize(resized, antialias=True), v2.CenterCrop(size)])
    view = crops.evaluation_view(draw_image(height, width), size, crop_ratio)
    assert view.shape == (3, *size)
    assert torch.equal(view, transform(draw_image(height, width)))


@pytest.mark.parametrize(("height", "width"), [(5, 9_000), (9_000, 3)])
@pytest.mark.parametrize("size", [[8, 64], [64, 8]])
def test_a_rectangular_view_of_a_long_thin_image_needs_only_its_middle(height, width, size):
    smooth = F.resize(
        draw_image(max(2, height // 8), max(2, width // 8)), [height, width], antialias=True
    )
    scale = max(size[0] / height, size[1] / width)
    resized = [max(side, int(scale * length)) for side, length in zip(size, (height, width))]
    expected = F.center_crop(F.resize(smooth, resized, antialias=True), size)
    difference = (crops.evaluation_view(smooth, size, 1.0).int() - expected.int()).abs().float()
    assert difference.mean() < 1 and difference.max() <= 8


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("height", "width"), [(40, 901), (901, 37), (16, 1000), (3, 250)])
@pytest.mark.parametrize(("size", "crop_ratio", "resized_side"), [(32, 0.875, 37), (24, 1.0, 24)])
def test_evaluation_of_a_long_thin_image_takes_nearly_the_resized_center(
    interpolation, height, width, size, crop_ratio, resized_side
):
    smooth = F.resize(
        draw_image(max(2, height // 8), max(2, width // 8)), [height, width], antialias=True
    )
    transform = v2.Compose(
        [
            v2.Resize(
                resized_side, interpolation=F.InterpolationMode(interpolation), antialias=True
            ),
            v2.CenterCrop(size),
        ]
    )
    view = crops.evaluation_view(smooth, size, crop_ratio, interpolation)
    difference = (view.int() - transform(smooth).int()).abs().float()
    # In gray levels. The scale along the longer side is rounded.
    assert difference.mean() < 1 and difference.max() <= 8


@pytest.mark.parametrize(("height", "width"), [(1, 40_000), (30_000, 2), (5, 9_000)])
def test_memory_of_an_evaluation_view_is_bounded_by_the_view(height, width, monkeypatch):
    shapes, resize = [], F.resize

    def record_shape(*arguments, **options):
        view = resize(*arguments, **options)
        shapes.append(view.shape)
        return view

    monkeypatch.setattr(F, "resize", record_shape)
    black = torch.zeros(3, height, width, dtype=torch.uint8)
    assert crops.evaluation_view(black, 64).shape == (3, 64, 64)
    assert max(max(shape[-2:]) for shape in shapes) <= 24 * 73


@pytest.mark.parametrize("crop_ratio", [0.0, 1.5])
def test_an_impossible_crop_ratio_is_refused(crop_ratio):
    with pytest.raises(ValueError) as error:
        crops.evaluation_view(draw_image(40, 40), 32, crop_ratio)
    message = f"crops.evaluation_view: crop_ratio must be in (0, 1], got {crop_ratio}"
    assert str(error.value) == message
