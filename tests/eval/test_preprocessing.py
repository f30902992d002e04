"""The transform that is exported as a file computes exactly the view of the evaluations."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_pretrain.data.pixels import PixelFormat
from ssl_pretrain.eval.exporting import preprocessing
from ssl_pretrain.eval.image_transform import ImageTransform

SHAPES = [(300, 400), (37, 41), (256, 256), (5, 700), (900, 8), (1, 1), (257, 333), (17, 16)]
RECIPES = [
    (224, 0.875, "bilinear", 3, ()),
    (224, 1.0, "bicubic", 3, ()),
    ([96, 64], 0.9, "bilinear", 3, ()),
    (32, 0.875, "bicubic", 1, ()),
    (33, 0.77, "bilinear", 4, (0.0, 100.0)),
]
MODES = ["RGB", "L", "P", "RGBA", "LA", "1", "CMYK"]


def write_settings(folder, size, crop_ratio, interpolation, channels, value_range):
    """Write the settings of an export and return the transform of its evaluations."""
    mean, std = [0.1 * (channel + 1) for channel in range(channels)], [0.2] * channels
    settings = {"size": size, "crop_ratio": crop_ratio, "interpolation": interpolation}
    settings |= {"channels": channels, "range": list(value_range), "mean": mean, "std": std}
    (folder / "timm.json").write_text(json.dumps({"input": settings}))
    pixel_format = PixelFormat(channels, value_range or None)
    return ImageTransform(size, crop_ratio, interpolation, tuple(mean), tuple(std), pixel_format)


@pytest.mark.parametrize("recipe", RECIPES)
def test_arrays_and_tensors_of_any_shape_give_equal_bits(recipe, tmp_path):
    transform, rng = write_settings(tmp_path, *recipe), np.random.default_rng(0)
    for shape in SHAPES:
        pixels = rng.integers(0, 256, (*shape, recipe[3]), dtype=np.uint8)
        tensor = torch.from_numpy(pixels).permute(2, 0, 1)
        for image in (pixels, tensor):
            assert torch.equal(preprocessing.transform(image, tmp_path), transform(image)), shape


@pytest.mark.parametrize("recipe", [RECIPES[0], RECIPES[3]])
def test_every_mode_of_pillow_gives_equal_bits(recipe, tmp_path):
    transform, rng = write_settings(tmp_path, *recipe), np.random.default_rng(0)
    levels = rng.integers(1, 256, (61, 47), dtype=np.uint8)
    images = [Image.fromarray(levels).convert(mode) for mode in MODES]
    images += [Image.fromarray(levels.astype(np.uint16) * 200)]
    images += [levels > 100, torch.from_numpy(levels > 100)]
    for image in images:
        exported = preprocessing.transform(image, tmp_path)
        assert torch.equal(exported, transform(image)), image


def test_a_file_is_turned_upright(tmp_path):
    transform, rng = write_settings(tmp_path, *RECIPES[0]), np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(tmp_path / "turned.png", exif=exif)
    path = tmp_path / "turned.png"
    assert torch.equal(preprocessing.transform(path, tmp_path), transform(path))


def test_values_that_are_not_finite_are_refused_as_by_the_evaluations(tmp_path):
    transform = write_settings(tmp_path, 32, 0.875, "bilinear", 1, (0.0, 1.0))
    values = np.ones((8, 8), np.float32)
    values[3, 3] = np.nan
    for image in (values, Image.fromarray(values)):
        with pytest.raises(ValueError, match="values that are not finite"):
            transform(image)
        with pytest.raises(ValueError) as error:
            preprocessing.transform(image, tmp_path)
        assert str(error.value) == "the image has values that are not finite; replace them"


def test_another_number_of_channels_is_named(tmp_path):
    write_settings(tmp_path, *RECIPES[4])
    with pytest.raises(ValueError) as error:
        preprocessing.transform(np.zeros((8, 8, 3), np.uint8), tmp_path)
    assert str(error.value) == "the image has 3 channels, but the backbone takes 4"
