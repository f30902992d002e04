"""Recipes for views are checked, and errors name the key, the value and the remedy."""

import math
from dataclasses import replace

import pytest

from ssl_pretrain.views import recipe
from ssl_pretrain.views.recipe import Crop, ViewsConfig

SIMCLR = Crop(
    jitter=0.8,
    brightness=0.8,
    contrast=0.8,
    saturation=0.8,
    hue=0.2,
    grayscale=0.2,
    blur=0.5,
)


def build_views(**crop) -> ViewsConfig:
    return ViewsConfig(crops={"global": Crop(**crop)})


def test_counts_expand_in_the_order_of_the_file():
    config = ViewsConfig(
        crops={
            "first": Crop(count=1, blur=1.0),
            "second": Crop(count=1, blur=0.1),
            "local": Crop(count=6, size=96),
        }
    )
    recipe.check(config)
    crops = recipe.crop_per_view(config)
    assert [crop.size for crop in crops] == [224] * 2 + [96] * 6
    assert [crop.blur for crop in crops[:3]] == [1.0, 0.1, 0.0]


@pytest.mark.parametrize(("size", "taps"), [(224, 23), (96, 9), (32, 3), (8, 3), (210, 21)])
def test_the_blur_kernel_follows_the_size_as_in_simclr(size, taps):
    assert recipe.blur_taps(Crop(size=size)) == taps
    assert recipe.blur_taps(Crop(size=size, blur_kernel=7)) == 7


@pytest.mark.parametrize(
    "crop",
    [
        SIMCLR,
        replace(SIMCLR, brightness_mode="add", hue=0.5, solarize=0.2, interpolation="bicubic"),
        Crop(size=4, blur=1.0, blur_kernel=7),  # the widest kernel that 4 pixels can reflect
        Crop(size=4, blur=1.0, blur_kernel=23, blur_border="zero"),  # the zero border has no limit
        Crop(size=1),
        Crop(scale=[1.0, 1.0], ratio=[1.0, 1.0], flip=0.0),
    ],
)
def test_good_recipes_are_accepted(crop):
    recipe.check(
        ViewsConfig(crops={"global": crop}, mean=[0.485, 0.456, 0.406], std=[0.228, 0.224, 0.225])
    )


@pytest.mark.parametrize(
    ("crop", "message"),
    [
        (
            Crop(count=0),
            "count: 0 is out of range; give a whole number >= 1 and <= 1000",
        ),
        (
            Crop(size=-3),
            "size: -3 is out of range; give a whole number >= 1 and <= 10000",
        ),
        (
            Crop(scale=[0.5, 0.2]),
            "scale: [0.5, 0.2] is not a range; give [low, high] with 0 < low <= high <= 1",
        ),
        (
            Crop(scale=[0.5, 1.5]),
            "scale: [0.5, 1.5] is not a range; give [low, high] with 0 < low <= high <= 1",
        ),
        (
            Crop(scale=[0.5]),
            "scale: [0.5] is not a range; give [low, high] with 0 < low <= high <= 1",
        ),
        (
            Crop(ratio=[0.0, 1.0]),
            "ratio: [0.0, 1.0] is not a range; give [low, high] with 0 < low <= high",
        ),
        (
            Crop(blur_sigma=[0, 2]),
            "blur_sigma: [0, 2] is not a range; give [low, high] with 0 < low <= high",
        ),
        (
            Crop(interpolation="nearest"),
            "interpolation: 'nearest' is not known; choose one of: bilinear, bicubic",
        ),
        (
            Crop(brightness_mode="sub"),
            "brightness_mode: 'sub' is not known; choose one of: multiply, add",
        ),
        (
            Crop(saturation_mode="hsl"),
            "saturation_mode: 'hsl' is not known; choose one of: blend, hsv",
        ),
        (
            Crop(contrast_mean="grey"),
            "contrast_mean: 'grey' is not known; choose one of: gray, channel",
        ),
        (
            Crop(blur_border="black"),
            "blur_border: 'black' is not known; choose one of: reflect, zero",
        ),
        (
            Crop(crop_sampler="byol"),
            "crop_sampler: 'byol' is not known; choose one of: torchvision, tensorflow, clipped",
        ),
        (
            Crop(flip=1.5),
            "flip: 1.5 is out of range; give a finite number >= 0 and <= 1",
        ),
        (
            Crop(jitter=math.nan, hue=0.1),
            "jitter: nan is out of range; give a finite number >= 0 and <= 1",
        ),
        (
            Crop(grayscale=-0.2),
            "grayscale: -0.2 is out of range; give a finite number >= 0 and <= 1",
        ),
        (
            Crop(blur=2),
            "blur: 2 is out of range; give a whole number >= 0 and <= 1",
        ),
        (
            Crop(solarize=-1),
            "solarize: -1 is out of range; give a whole number >= 0 and <= 1",
        ),
        (
            Crop(hue=0.6),
            "hue: 0.6 is out of range; give a finite number >= 0 and <= 0.5",
        ),
        (
            Crop(contrast=-0.1),
            "contrast: -0.1 is out of range; give a finite number >= 0",
        ),
        (
            Crop(jitter=0.8),
            (
                "jitter: 0.8 changes nothing, as brightness, contrast, saturation and hue are all"
                " 0; set one of them, or jitter to 0"
            ),
        ),
        (
            Crop(solarize_threshold=128),
            "solarize_threshold: 128 is out of range; give a whole number >= 0 and <= 1",
        ),
        (
            Crop(blur_kernel=4),
            "blur_kernel: 4 has no middle pixel; give an odd number >= 3, or 0 for size // 10",
        ),
        (
            Crop(size=8, blur=0.5, blur_kernel=23),
            "blur_kernel: 23 is too wide to reflect an image of size 8; give at most 15",
        ),
        (
            Crop(size=[200, 8], blur=0.5, blur_kernel=23),
            "blur_kernel: 23 is too wide to reflect an image of size 200x8; give at most 15",
        ),
        (
            Crop(size=[64]),
            "size: [64] is not a size; give one number for a square, or [height, width] in pixels",
        ),
        (
            Crop(size=[64, 0]),
            "size[1]: 0 is out of range; give a whole number >= 1 and <= 10000",
        ),
        (
            Crop(size=1, blur=0.5),
            "blur_kernel: 3 is too wide to reflect an image of size 1; set blur to 0",
        ),
    ],
)
def test_a_bad_crop_is_refused_with_key_value_and_remedy(crop, message):
    with pytest.raises(ValueError) as error:
        recipe.check(ViewsConfig(crops={"global": crop}))
    assert str(error.value) == f"views.crops.global.{message}"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            ViewsConfig(),
            ("views.crops: no crop is named; name at least one, as in views.crops.global.size=224"),
        ),
        (
            ViewsConfig(crops={"local": Crop(size=96), "global": Crop(size=224)}),
            (
                "views.crops.global.size: 224 comes after local of size 96; name the crops from "
                "the largest to the smallest, as methods take the first ones for the global views"
            ),
        ),
        (
            ViewsConfig(crops={"local": Crop(size=96), "global": Crop(size=[64, 256])}),
            (
                "views.crops.global.size: [64, 256] comes after local of size 96; name the crops "
                "from the largest to the smallest, as methods take the first ones for the global "
                "views"
            ),
        ),
        (
            replace(build_views(), mean=[0.5]),
            "views.std: [1.0, 1.0, 1.0] must be 1 numbers, as views.mean is, one per channel of "
            "the images",
        ),
        (
            replace(build_views(), std=[1.0, 1.0]),
            "views.std: [1.0, 1.0] must be 3 numbers, as views.mean is, one per channel of the "
            "images",
        ),
        (
            replace(build_views(), std=[1.0, 0.0, 1.0]),
            "views.std[1]: 0.0 is out of range; give a finite number > 0",
        ),
    ],
)
def test_bad_views_are_refused_with_key_value_and_remedy(config, message):
    with pytest.raises(ValueError) as error:
        recipe.check(config)
    assert str(error.value) == message


def test_a_rectangle_has_a_height_a_width_and_the_kernel_of_its_shorter_side():
    crop = Crop(size=[64, 256])
    assert (crop.height, crop.width, crop.num_pixels) == (64, 256, 64 * 256)
    assert recipe.blur_taps(crop) == recipe.blur_taps(Crop(size=64)) == 7


def test_two_equal_numbers_are_the_same_recipe_as_one():
    assert Crop(size=[96, 96]) == Crop(size=96)
    assert Crop(size=[96, 96]).size == 96
