"""The corruptions: pure functions whose distance from the clean image grows with the severity, and known values of some."""

from __future__ import annotations

import numpy as np
import pytest

from ssl_pretrain import rng
from ssl_pretrain.eval import corruptions
from ssl_pretrain.eval.corruptions import NAMES, SEVERITIES, Draws, apply
from ssl_pretrain.rng import Purpose

# the authors' own order is not by distance: constants of three kinds, and pixels whose number divides the image's side or does not
NOT_BY_DISTANCE = {"glass_blur", "elastic_transform", "pixelate"}


def picture(side: int, index: int = 0) -> np.ndarray:
    """Smooth shapes with an edge, uint8 (side, side, 3)."""
    rows, columns = np.meshgrid(np.arange(side) / side, np.arange(side) / side, indexing="ij")
    waves = np.stack(
        [np.sin(7 * rows + 3 * columns + channel + index) for channel in range(3)], axis=-1
    )
    waves[side // 4 : side // 2, side // 3 : 2 * side // 3] *= -1
    return (127 + 90 * waves).astype(np.uint8)


def distance(name: str, severity: int, side: int) -> float:
    images = [picture(side, index) for index in range(4)]
    return float(
        np.mean(
            [
                np.square(apply(name, i, severity, n).astype(float) - i).mean() ** 0.5
                for n, i in enumerate(images)
            ]
        )
    )


@pytest.mark.parametrize("side", [32, 96])
@pytest.mark.parametrize("name", NAMES)
def test_the_distance_from_the_clean_image_grows_with_the_severity(name, side):
    away = [distance(name, severity, side) for severity in SEVERITIES]
    assert min(away) > 0.1 or (name, side) == (
        "glass_blur",
        32,
    )  # exchanges neighbours alone, which are alike here
    if name in NOT_BY_DISTANCE:
        assert len(set(away)) == 5
    else:
        assert away == sorted(away) and away[4] > 1.2 * away[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_corruption_is_a_function_of_the_images_number_and_the_seed(name):
    image = picture(32)
    first = apply(name, image, 3, index=5)
    assert first.dtype == np.uint8 and first.shape == image.shape
    np.testing.assert_array_equal(apply(name, image.copy(), 3, index=5), first)
    drawn = name in {
        "gaussian_noise",
        "shot_noise",
        "impulse_noise",
        "glass_blur",
        "fog",
        "elastic_transform",
    }
    assert np.array_equal(apply(name, image, 3, index=6), first) != drawn
    assert np.array_equal(apply(name, image, 3, index=5, seed=1), first) != drawn


def test_noise_is_of_its_draws():
    image = np.full((32, 32, 3), 128, dtype=np.uint8)
    uniform = rng.uniform(
        7, 0, 9, NAMES.index("impulse_noise"), Purpose.CORRUPTION, 2 * image.size
    )[0]
    hit, white = (
        uniform[: image.size].reshape(image.shape) < 0.07,
        uniform[image.size :].reshape(image.shape) < 0.5,
    )
    np.testing.assert_array_equal(
        apply("impulse_noise", image, 5, index=9, seed=7),
        np.where(hit, np.where(white, 255, 0), image),
    )
    flat = (
        np.concatenate([apply("gaussian_noise", image, 5, index).ravel() for index in range(30)])
        / 255
        - 128 / 255
    )
    assert flat.std() == pytest.approx(0.10, rel=0.02) and flat.mean() == pytest.approx(
        -0.5 / 255, abs=5e-4
    )  # cut off, not rounded
    photons = (
        np.concatenate([apply("shot_noise", image, 5, index).ravel() for index in range(30)]) / 255
    )
    assert photons.std() == pytest.approx((128 / 255 / 50) ** 0.5, rel=0.03)  # a Poisson variance


def test_brightness_is_the_value_of_hsv():
    import colorsys

    image = np.array([[[10, 200, 60], [0, 0, 0], [250, 250, 250]]], dtype=np.uint8)
    bright = apply("brightness", image, 4, 0)[0] / 255
    for pixel, ours in zip(image[0] / 255, bright):
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
        np.testing.assert_allclose(
            ours, colorsys.hsv_to_rgb(hue, saturation, min(1, value + 0.2)), atol=1 / 255
        )


def test_a_disk_weighs_one_and_is_round():
    for radius, alias in ((0.3, 0.4), (1.5, 0.1), (3, 0.1), (10, 0.5)):
        kernel = corruptions.disk(radius, alias)
        assert (
            kernel.sum() == pytest.approx(1, abs=0.02)
            and np.allclose(kernel, kernel.T)
            and np.allclose(kernel, kernel[::-1])
        )
    assert (corruptions.disk(3, 0.1) > 1e-6).sum() == 29  # lattice points with x^2 + y^2 <= 9


def test_clouds_fill_zero_to_one_and_keep_their_large_shape_as_the_noise_falls_faster():
    rough, smooth = (
        [corruptions.plasma(32, decay, Draws(0, index, 0)) for index in range(8)]
        for decay in (1.5, 3.0)
    )
    for clouds in (*rough, *smooth):
        assert clouds.min() == 0 and clouds.max() == 1
    finest = [
        np.mean([np.abs(np.diff(clouds, 2, axis=0)).mean() for clouds in each])
        for each in (rough, smooth)
    ]
    assert finest[0] > 4 * finest[1]


def test_no_move_leaves_an_image_as_it_is():
    image = picture(32) / 255
    rows, columns = np.meshgrid(np.arange(32), np.arange(32), indexing="ij")
    np.testing.assert_allclose(corruptions.sampled(image, rows, columns, "mirror"), image)
    np.testing.assert_allclose(corruptions.zoomed(image, 1.0), image)


def test_mistakes():
    with pytest.raises(ValueError) as error:
        apply("frost", picture(32), 1, 0)
    assert str(error.value).startswith(
        "corruption: 'frost' is none; choose among: gaussian_noise, shot_noise"
    )
    with pytest.raises(ValueError, match="severity: 6 is not one of 1 to 5"):
        apply("fog", picture(32), 6, 0)
