"""The options of SimCLR's and BYOL's recipes equal the authors' functions in authors.py."""

from pathlib import Path

import authors
import numpy as np
import pytest
import torch
from scipy import stats
from sharp_pictures import draw_picture

from ssl_pretrain.config import load
from ssl_pretrain.views import color, color_torch, crops, recipe, resize
from ssl_pretrain.views.color_parameters import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    SATURATION,
    ColorParameters,
    describe_view,
    draw_colors,
)
from ssl_pretrain.views.crops import Box
from ssl_pretrain.views.recipe import Crop, blur_taps

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
NO_NORMALIZATION = ([0.0, 0.0, 0.0], [1.0, 1.0, 1.0])  # mean 0, standard deviation 1
LEVEL = 1 / 255  # one gray level
ROUNDING = 0.01 * LEVEL  # tolerance for float32 against float64
TENSORFLOW = {
    "contrast_mean": "channel",
    "saturation_mode": "hsv",
    "blur_border": "zero",
    "antialias": False,
}
SIMCLR = TENSORFLOW | {
    "crop_sampler": "tensorflow",
    "interpolation": "bicubic",
    "jitter": 0.8,
    "brightness": 0.8,
    "contrast": 0.8,
    "saturation": 0.8,
    "hue": 0.2,
    "grayscale": 0.2,
    "blur": 0.5,
}
BYOL = SIMCLR | {
    "crop_sampler": "clipped",
    "brightness": 0.4,
    "brightness_mode": "add",
    "contrast": 0.4,
    "saturation": 0.2,
    "hue": 0.1,
    "blur": 1.0,
    "solarize": 0.2,
}
FOR_BOTH_FUNCTIONS = pytest.mark.parametrize(
    "apply", [color.apply, color_torch.apply], ids=["compiled", "batches"]
)


def draw_images(n: int, size: int) -> torch.Tensor:
    """Return noise, uint8 (n, 3, size, size).

    Image 0 has the corners of the color cube, image 1 is gray and image 2 is black.
    """
    noise = torch.randint(
        0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(size)
    )
    corners = [[r, g, b] for r in (0, 255) for g in (0, 255) for b in (0, 255)] + [
        [1, 0, 0],
        [255, 254, 254],
    ]
    noise[0].view(3, -1)[:, :10] = torch.tensor(corners, dtype=torch.uint8).T
    noise[1] = noise[1, :1]
    noise[2] = 0
    return noise


def to_floats(pixels: torch.Tensor) -> np.ndarray:
    """Return uint8 pixels (3, height, width) as float64 (height, width, 3) in [0, 1]."""
    return pixels.movedim(0, -1).numpy().astype(np.float64) / 255


def measure_difference(view: torch.Tensor, expected: np.ndarray) -> float:
    """Return the largest difference of a view (3, h, w) from an array (h, w, 3)."""
    return float(np.abs(view.movedim(0, -1).numpy() - expected).max())


@FOR_BOTH_FUNCTIONS
@pytest.mark.parametrize(
    ("options", "operation", "authors_function"),
    [
        ({"contrast": 0.8, "contrast_mean": "channel"}, CONTRAST, authors.adjust_contrast),
        ({"saturation": 0.8, "saturation_mode": "hsv"}, SATURATION, authors.adjust_saturation),
        ({"saturation": 3.0, "saturation_mode": "hsv"}, SATURATION, authors.adjust_saturation),
    ],
)
def test_an_adjustment_is_the_authors(apply, options, operation, authors_function):
    crop = Crop(size=40, jitter=1.0, **options)
    pixels, parameters = draw_images(24, 40), draw_colors(crop, 0, 0, np.arange(24), 0)
    for view, image, factors in zip(
        apply(pixels, parameters, crop, *NO_NORMALIZATION), pixels, parameters.jitter_factors
    ):
        expected = np.clip(authors_function(to_floats(image), float(factors[operation])), 0, 1)
        assert measure_difference(view, expected) < ROUNDING


@FOR_BOTH_FUNCTIONS
@pytest.mark.parametrize(("size", "kernel"), [(224, 23), (32, 0), (9, 23), (1, 3)])
def test_the_zero_border_of_a_blur_is_the_authors(apply, size, kernel):
    crop = Crop(size=size, blur=1.0, blur_kernel=kernel, blur_border="zero")
    recipe.check(recipe.ViewsConfig({"global": crop}))
    pixels = torch.randint(
        0, 256, (3, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(7)
    )
    parameters = draw_colors(crop, 0, 0, np.arange(3), 0)
    views = apply(pixels, parameters, crop, *NO_NORMALIZATION)
    for view, image, sigma in zip(views, pixels, parameters.blur_sigma):
        expected = authors.gaussian_blur(to_floats(image), float(sigma), blur_taps(crop))
        assert measure_difference(view, expected) < ROUNDING


@FOR_BOTH_FUNCTIONS
@pytest.mark.parametrize("options", [SIMCLR, BYOL], ids=["simclr", "byol"])
def test_all_color_operations_are_the_authors_in_the_drawn_order(apply, options):
    crop = Crop(size=32, **options)
    pixels, parameters = draw_images(64, 32), draw_colors(crop, 0, 0, np.arange(64), 0)
    for row, view in enumerate(apply(pixels, parameters, crop, *NO_NORMALIZATION)):
        expected = apply_authors_colors(to_floats(pixels[row]), parameters, row, crop)
        assert measure_difference(view, expected) < 0.1 * LEVEL


def apply_authors_colors(
    image: np.ndarray, parameters: ColorParameters, row: int, crop: Crop
) -> np.ndarray:
    """Apply the authors' functions in the order and with the parameters of a row."""
    for operation in parameters.jitter_order[row] if parameters.is_jittered[row] else ():
        factor = float(parameters.jitter_factors[row, operation])
        if operation == BRIGHTNESS:
            image = image + factor if crop.brightness_mode == "add" else image * factor
        elif operation == CONTRAST:
            image = authors.adjust_contrast(image, factor)
        elif operation == SATURATION:
            image = authors.adjust_saturation(image, factor)
        elif operation == HUE:
            hue, saturation, value = authors.rgb_to_hsv(image)
            image = authors.hsv_to_rgb((hue + factor) % 1, saturation, value)
        image = np.clip(image, 0, 1)
    if parameters.is_gray[row]:
        image = np.repeat(image @ np.array([[0.2989], [0.587], [0.114]]), 3, axis=2)
    if parameters.is_blurred[row]:
        image = authors.gaussian_blur(image, float(parameters.blur_sigma[row]), blur_taps(crop))
    if parameters.is_solarized[row]:
        image = np.where(image < 0.5, image, 1 - image)
    return image


# Boxes as (top, left, height, width) and sizes of views, per height and width of an image.
BOXES = {
    (70, 90): [((5, 11, 41, 53), 16), ((5, 11, 41, 53), 96)],
    (375, 500): [((10, 20, 300, 400), 224)],
    (33, 21): [((0, 0, 33, 21), 7)],
    (1, 1): [((0, 0, 1, 1), 16)],
    (3, 2): [((0, 0, 3, 2), 5)],
    (17, 640): [((3, 100, 2, 500), 20)],
    (640, 17): [((100, 3, 500, 2), 20)],
}
CASES = [(shape, *case) for shape, cases in BOXES.items() for case in cases]


@pytest.mark.parametrize("kind", ["noise", "black and white"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("shape", "box", "size"), CASES)
def test_a_resize_without_antialias_is_the_authors_within_one_level(
    shape, box, size, flip, interpolation, kind
):
    image, (top, left, height, width) = draw_picture(*shape, kind), box
    expected = authors.resize(
        image[top : top + height, left : left + width].astype(float), size, interpolation
    ).clip(0, 255)
    expected = np.moveaxis(expected[:, ::-1] if flip else expected, -1, 0)
    crop = Crop(size=size, interpolation=interpolation, antialias=False)
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    view = crops.apply(pixels, Box(*box, flip), crop).numpy()
    boxes = np.array([[*box, flip]])
    batch_view = crops.apply_to_batch(pixels[None].contiguous(), boxes, crop)[0].numpy()
    assert np.abs(view - expected).max() < 0.51
    assert np.abs(batch_view - expected).max() < 0.51
    compiled_view = write_view_without_antialias(
        image, (*box, flip), size, interpolation == "bicubic"
    )
    assert np.array_equal(compiled_view, view)


def write_view_without_antialias(
    image: np.ndarray, box: tuple[int, int, int, int, bool], size: int, is_bicubic: bool
) -> np.ndarray:
    """Transpose a whole image and resize a box of it, as `native.views` does."""
    height, width, _ = image.shape
    padded_height, padded_width = resize.pad_to_tiles(height), resize.pad_to_tiles(3 * width)
    padded, transposed = (
        np.zeros((padded_height, padded_width), np.uint8),
        np.zeros(padded_width * padded_height, np.uint8),
    )
    padded[:height, : 3 * width] = image.reshape(height, -1)
    resize.transpose(padded.reshape(-1), padded_width, height, 3 * width, transposed, padded_height)
    out = np.full(3 * size * size, 77, np.uint8)
    resize.write_view_without_antialias(
        transposed, 3, padded_height, box, (size, size), is_bicubic, out
    )
    return out.reshape(3, size, size)


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (224, 224)])
@pytest.mark.parametrize(
    ("sampler", "draw_expected"),
    [("tensorflow", authors.simclr_boxes), ("clipped", authors.byol_boxes)],
)
def test_boxes_are_distributed_as_the_authors(sampler, draw_expected, height, width):
    n = 100_000
    sizes = np.full((n, 2), [height, width])
    ours = crops.draw_boxes(Crop(crop_sampler=sampler), 0, 0, np.arange(n), 0, sizes)
    expected = draw_expected(n, height, width, seed=1)
    measures = {
        "area": lambda b: b[:, 2] * b[:, 3],
        "ratio": lambda b: b[:, 3] / b[:, 2],
        "top": lambda b: b[:, 0],
        "left": lambda b: b[:, 1],
    }
    for name, measure in measures.items():
        assert stats.ks_2samp(measure(ours), measure(expected)).statistic < 0.01, name
    torchvision_boxes = crops.draw_boxes(Crop(), 0, 0, np.arange(n), 0, sizes)
    assert (
        stats.ks_2samp(measures["area"](ours), measures["area"](torchvision_boxes)).statistic > 0.09
    )


@pytest.mark.parametrize("sampler", ["tensorflow", "clipped"])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (1, 1), (2, 50), (50, 3), (375, 500)])
@pytest.mark.parametrize(
    "options", [{}, {"scale": [0.05, 0.3]}, {"scale": [1.0, 1.0]}, {"ratio": [0.5, 3.0]}]
)
def test_a_box_is_inside_the_image(sampler, height, width, options):
    n = 500
    crop, sizes = Crop(crop_sampler=sampler, **options), np.full((n, 2), [height, width])
    top, left, box_height, box_width, _ = crops.draw_boxes(crop, 0, 0, np.arange(n), 0, sizes).T
    assert min(top.min(), left.min()) >= 0
    assert min(box_height.min(), box_width.min()) >= 1
    assert (top + box_height).max() <= height
    assert (left + box_width).max() <= width


def test_a_smaller_box_of_tensorflow_never_touches_the_bottom_or_right_edge():
    """TensorFlow draws the top below height - box height. The others include that value."""
    sizes = np.full((4000, 2), [24, 30])
    for sampler, reaches_edge in (("tensorflow", False), ("clipped", True), ("torchvision", True)):
        top, left, box_height, box_width, _ = crops.draw_boxes(
            Crop(crop_sampler=sampler), 0, 0, np.arange(4000), 0, sizes
        ).T
        assert ((box_height < 24) & (top + box_height == 24)).any() == reaches_edge, sampler
        assert ((box_width < 30) & (left + box_width == 30)).any() == reaches_edge, sampler


def test_tensorflow_takes_the_whole_image_if_no_box_fits():
    box = crops.draw_box(Crop(crop_sampler="tensorflow"), 0, 0, 0, 0, 10, 1000)
    assert box[:4] == (0, 0, 10, 1000)


@pytest.mark.parametrize("sampler", ["tensorflow", "clipped"])
def test_boxes_of_a_batch_equal_boxes_drawn_one_by_one(sampler):
    crop = Crop(crop_sampler=sampler)
    batch_boxes = crops.draw_boxes(crop, 1, 2, np.arange(20), 3, np.full((20, 2), [90, 130]))
    assert [tuple(row) for row in batch_boxes.tolist()] == [
        crops.draw_box(crop, 1, 2, index, 3, 90, 130) for index in range(20)
    ]


def test_a_description_names_the_authors_functions():
    crop = Crop(size=8, **(SIMCLR | {"jitter": 1.0, "blur": 1.0, "grayscale": 0.0}))
    text = describe_view(crop, Box(0, 0, 8, 8, False), draw_colors(crop, 0, 0, np.arange(1), 0), 0)
    assert " by channel" in text
    assert " in HSV" in text
    assert text.endswith(", black outside")
    default_crop = Crop(size=8, jitter=1.0, contrast=0.8, saturation=0.8, blur=1.0)
    text = describe_view(
        default_crop, Box(0, 0, 8, 8, False), draw_colors(default_crop, 0, 0, np.arange(1), 0), 0
    )
    assert not any(word in text for word in ("channel", "HSV", "outside"))


SIMCLR_METHODS = [
    "simclr",
    "decoupled",
    "temperature_free",
    "debiased",
    "hard_negative",
    "supcon",
    "pairwise",
    "triplet",
    "n_pair",
]


@pytest.mark.parametrize(
    ("name", "sampler"), [*((name, "tensorflow") for name in SIMCLR_METHODS), ("byol", "clipped")]
)
def test_recipes_written_for_tensorflow_take_its_functions(name, sampler):
    for crop in load(CONFIGS / f"{name}_imagenet.yaml", ["data.root=/data"]).views.crops.values():
        assert {key: getattr(crop, key) for key in TENSORFLOW} == TENSORFLOW
        assert crop.crop_sampler == sampler
