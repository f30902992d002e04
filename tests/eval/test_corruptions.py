"""Corruptions are pure functions, and higher severities change an image more."""

import colorsys

import numpy as np
import pytest

from ssl_pretrain import rng
from ssl_pretrain.eval import corruptions
from ssl_pretrain.eval.corruptions import NAMES, SEVERITIES, ImageRng, apply
from ssl_pretrain.rng import Purpose

# Higher severities of these do not always change an image more. The authors vary several constants,
# or a number of pixels that may or may not divide the image's side.
NOT_ORDERED_BY_DISTANCE = {"glass_blur", "elastic_transform", "pixelate"}
RANDOM = {
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "glass_blur",
    "fog",
    "elastic_transform",
}


def draw_picture(side: int, index: int = 0) -> np.ndarray:
    """Draw smooth shapes with an edge, uint8 (side, side, 3)."""
    rows, columns = np.meshgrid(np.arange(side) / side, np.arange(side) / side, indexing="ij")
    waves = np.sin((7 * rows + 3 * columns + index)[..., None] + np.arange(3))
    waves[side // 4 : side // 2, side // 3 : 2 * side // 3] *= -1
    return (127 + 90 * waves).astype(np.uint8)


def measure_distance(name: str, severity: int, side: int) -> float:
    """Return the root mean square change of a pixel, averaged over four pictures."""
    changes = []
    for index in range(4):
        clean = draw_picture(side, index)
        corrupted = apply(name, clean, severity, index).astype(float)
        changes.append(np.square(corrupted - clean).mean() ** 0.5)
    return float(np.mean(changes))


@pytest.mark.parametrize("side", [32, 96])
@pytest.mark.parametrize("name", NAMES)
def test_the_distance_from_the_clean_image_grows_with_the_severity(name, side):
    distances = [measure_distance(name, severity, side) for severity in SEVERITIES]
    if (name, side) != ("glass_blur", 32):  # swaps neighboring pixels, which are alike
        assert min(distances) > 0.1
    if name in NOT_ORDERED_BY_DISTANCE:
        assert len(set(distances)) == 5
    else:
        assert distances == sorted(distances)
        assert distances[4] > 1.2 * distances[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_corruption_is_a_function_of_the_image_its_index_and_the_seed(name):
    image = draw_picture(32)
    first = apply(name, image, 3, index=5)
    assert (first.dtype, first.shape) == (np.uint8, image.shape)
    np.testing.assert_array_equal(apply(name, image.copy(), 3, index=5), first)
    for other in (apply(name, image, 3, index=6), apply(name, image, 3, index=5, seed=1)):
        assert np.array_equal(other, first) == (name not in RANDOM)


def test_noise_comes_from_the_counter_based_generator():
    image = np.full((32, 32, 3), 128, dtype=np.uint8)
    lane = NAMES.index("impulse_noise")
    values = rng.uniform(7, 0, 9, lane, Purpose.CORRUPTION, 2 * image.size)[0]
    hit, white = values.reshape(2, *image.shape) < np.array([0.07, 0.5])[:, None, None, None]
    expected = np.where(hit, np.where(white, 255, 0), image)
    corrupted = apply("impulse_noise", image, 5, index=9, seed=7)
    np.testing.assert_array_equal(corrupted, expected)


def test_noise_has_the_published_strength():
    image = np.full((32, 32, 3), 128, dtype=np.uint8)
    gaussian, shot = (
        np.concatenate([apply(name, image, 5, index).ravel() for index in range(30)]) / 255
        for name in ("gaussian_noise", "shot_noise")
    )
    assert gaussian.std() == pytest.approx(0.10, rel=0.02)
    # The result is truncated, not rounded.
    assert gaussian.mean() - 128 / 255 == pytest.approx(-0.5 / 255, abs=5e-4)
    assert shot.std() == pytest.approx((128 / 255 / 50) ** 0.5, rel=0.03)  # Poisson


def test_brightness_raises_the_value_of_hsv():
    image = np.array([[[10, 200, 60], [0, 0, 0], [250, 250, 250]]], dtype=np.uint8)
    bright = apply("brightness", image, 4, 0)[0] / 255
    for pixel, ours in zip(image[0] / 255, bright):
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
        expected = colorsys.hsv_to_rgb(hue, saturation, min(1, value + 0.2))
        np.testing.assert_allclose(ours, expected, atol=1 / 255)


def test_a_disk_has_weight_one_and_is_round():
    for radius, alias in ((0.3, 0.4), (1.5, 0.1), (3, 0.1), (10, 0.5)):
        kernel = corruptions.disk(radius, alias)
        assert kernel.sum() == pytest.approx(1, abs=0.02)
        np.testing.assert_allclose(kernel, kernel.T)
        np.testing.assert_allclose(kernel, kernel[::-1])
    # 29 lattice points have x^2 + y^2 <= 9.
    assert (corruptions.disk(3, 0.1) > 1e-6).sum() == 29


def test_clouds_become_smoother_as_the_noise_decays_faster():
    roughness = []
    for decay in (1.5, 3.0):
        clouds = [
            corruptions.plasma_fractal(32, decay, ImageRng(0, index, 0)) for index in range(8)
        ]
        assert all(cloud.min() == 0 and cloud.max() == 1 for cloud in clouds)
        roughness.append(np.abs(np.diff(clouds, 2, axis=1)).mean())
    assert roughness[0] > 4 * roughness[1]


def test_resampling_without_movement_leaves_an_image_unchanged():
    image = draw_picture(32) / 255
    rows, columns = np.meshgrid(np.arange(32), np.arange(32), indexing="ij")
    np.testing.assert_allclose(corruptions.interpolate(image, rows, columns, "mirror"), image)
    np.testing.assert_allclose(corruptions.enlarge(image, 1.0), image)


def test_a_rectangle_is_enlarged_around_its_center():
    image = np.zeros((16, 40, 3))
    image[7:9, 18:22] = 1  # 2 x 4 pixels in the middle
    enlarged = corruptions.enlarge(image, 2.0)
    assert enlarged.shape == (16, 40, 3)
    np.testing.assert_allclose(enlarged, enlarged[::-1, ::-1])  # still in the middle
    np.testing.assert_allclose(enlarged.sum(), 4 * image.sum(), rtol=0.1)


def test_an_unknown_corruption_and_severity_are_refused():
    message = "corruption: 'frost' is unknown; choose among: gaussian_noise, shot_noise"
    with pytest.raises(ValueError, match=message):
        apply("frost", draw_picture(32), 1, 0)
    with pytest.raises(ValueError, match="severity: 6 is out of range; choose 1 to 5"):
        apply("fog", draw_picture(32), 6, 0)


@pytest.mark.parametrize("channels", [1, 2, 4, 13])
@pytest.mark.parametrize("name", NAMES)
def test_an_image_of_any_number_of_channels_is_corrupted(name, channels):
    image = np.repeat(draw_picture(32), 5, axis=2)[..., :channels]
    image[..., -1] //= 2  # as an alpha channel, it would change the others
    corrupted = apply(name, image, 3, index=5)
    assert corrupted.shape == image.shape and corrupted.dtype == np.uint8
    assert (corrupted != image).any(axis=(0, 1)).all()
    if name in {"defocus_blur", "zoom_blur", "contrast", "pixelate", "jpeg_compression"}:
        for channel in range(channels):
            alone = apply(name, image[..., channel : channel + 1], 3, index=5)
            np.testing.assert_array_equal(corrupted[..., channel : channel + 1], alone)
