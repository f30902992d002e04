"""Color operations equal torchvision's, and their parameters have the stated distributions."""

import os
import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ssl_pretrain.views import color, color_torch
from ssl_pretrain.views.color_parameters import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    SATURATION,
    ColorParameters,
    draw_colors,
)
from ssl_pretrain.views.recipe import Crop, blur_taps

pytestmark = pytest.mark.promise

# Probability that a statistical test fails for a correct distribution. It is small because there
# are many tests. The seeds are fixed, so a test that passes once always passes.
CHANCE = 1e-4
TOLERANCE = {"rtol": 0.0, "atol": 1e-5}  # about 100 times the rounding of pixels in [0, 1]
IDENTITY = ([0.0, 0.0, 0.0], [1.0, 1.0, 1.0])  # mean and std that change nothing
STRENGTHS = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2}
SIMCLR_JITTER = STRENGTHS | {"jitter": 0.8}
EVERYTHING = SIMCLR_JITTER | {"grayscale": 0.2, "blur": 0.5, "solarize": 0.2}
ADJUST = {
    BRIGHTNESS: F.adjust_brightness,
    CONTRAST: F.adjust_contrast,
    SATURATION: F.adjust_saturation,
    HUE: F.adjust_hue,
}


def make_images(n: int, size: int = 16) -> torch.Tensor:
    """Return noise, uint8 (n, 3, size, size).

    The first image begins with the corners of the color cube and two grays, where hue and
    saturation are singular. The second is gray, and the third is white.
    """
    noise = torch.randint(
        0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    corners = [[r, g, b] for r in (0, 255) for g in (0, 255) for b in (0, 255)] + [
        [1, 1, 1],
        [128, 128, 128],
    ]
    noise[0].view(3, -1)[:, :10] = torch.tensor(corners, dtype=torch.uint8).T
    noise[1] = noise[1, :1]
    noise[2] = 255
    return noise


def to_floats(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.to(torch.float32) / 255


def draw_parameters(
    crop: Crop, n: int, seed: int = 0, epoch: int = 0, view: int = 0
) -> ColorParameters:
    return draw_colors(crop, seed, epoch, np.arange(n), view)


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_one_adjustment_matches_torchvision(name):
    operation = ["brightness", "contrast", "saturation", "hue"].index(name)
    crop = Crop(size=16, jitter=1.0, **{name: 0.5 if name == "hue" else 0.9})
    pixels, parameters = make_images(24), draw_parameters(crop, 24)
    views = color.apply(pixels, parameters, crop, *IDENTITY)
    assert views.dtype == torch.float32
    for view, image, factors in zip(views, to_floats(pixels), parameters.jitter_factors):
        torch.testing.assert_close(
            view, ADJUST[operation](image, float(factors[operation])), **TOLERANCE
        )


@pytest.mark.parametrize("shift", [-0.5, -0.25, 0.0, 1 / 6, 0.5])
def test_hue_rotates_every_color_as_in_torchvision(shift):
    steps = torch.linspace(0, 1, 12)
    cube = torch.cartesian_prod(steps, steps, steps).T.reshape(1, 3, 12, 144)
    torch.testing.assert_close(
        color_torch._hue(cube.clone(), torch.full((1, 1, 1, 1), shift)),
        F.adjust_hue(cube, shift),
        **TOLERANCE,
    )


def test_added_brightness_shifts_and_clamps():
    crop = Crop(size=16, jitter=1.0, brightness=0.4, brightness_mode="add")
    pixels, parameters = make_images(24), draw_parameters(crop, 24)
    delta = torch.from_numpy(parameters.jitter_factors[:, BRIGHTNESS])
    assert delta.min() < 0 < delta.max()
    expected = (to_floats(pixels) + delta[:, None, None, None]).clamp(0, 1)
    torch.testing.assert_close(
        color.apply(pixels, parameters, crop, *IDENTITY), expected, **TOLERANCE
    )


def test_grayscale_matches_torchvision():
    crop, pixels = Crop(size=16, grayscale=1.0), make_images(8)
    views = color.apply(pixels, draw_parameters(crop, 8), crop, *IDENTITY)
    torch.testing.assert_close(
        views, F.rgb_to_grayscale(to_floats(pixels), num_output_channels=3), **TOLERANCE
    )


@pytest.mark.parametrize(("size", "kernel"), [(32, 0), (224, 0), (8, 15), (16, 5)])
def test_blur_matches_torchvision(size, kernel):
    crop = Crop(size=size, blur=1.0, blur_kernel=kernel)
    pixels, parameters = make_images(4, size), draw_parameters(crop, 4)
    taps = blur_taps(crop)
    for view, image, sigma in zip(
        color.apply(pixels, parameters, crop, *IDENTITY), to_floats(pixels), parameters.blur_sigma
    ):
        torch.testing.assert_close(
            view, F.gaussian_blur(image, [taps, taps], [float(sigma)] * 2), **TOLERANCE
        )


@pytest.mark.parametrize("threshold", [0.5, 0.25, 1.0])
def test_solarize_matches_torchvision(threshold):
    crop, pixels = Crop(size=16, solarize=1.0, solarize_threshold=threshold), make_images(8)
    views = color.apply(pixels, draw_parameters(crop, 8), crop, *IDENTITY)
    torch.testing.assert_close(views, F.solarize(to_floats(pixels), threshold), **TOLERANCE)


def test_a_solarize_threshold_of_half_is_128_in_pillow():
    crop, pixels = Crop(size=16, solarize=1.0), make_images(8)
    expected = to_floats(F.solarize(pixels, 128))
    torch.testing.assert_close(
        color.apply(pixels, draw_parameters(crop, 8), crop, *IDENTITY), expected, **TOLERANCE
    )


def apply_one_by_one(pixels: torch.Tensor, parameters: ColorParameters, crop: Crop) -> torch.Tensor:
    """Apply torchvision's functions to one image after another, in SimCLR's order."""
    views = []
    for row, image in enumerate(to_floats(pixels)):
        if parameters.is_jittered[row]:
            for operation in parameters.jitter_order[row]:
                factor = float(parameters.jitter_factors[row, operation])
                image = ADJUST[int(operation)](image, factor)
        if parameters.is_gray[row]:
            image = F.rgb_to_grayscale(image, num_output_channels=3)
        if parameters.is_blurred[row]:
            image = F.gaussian_blur(
                image, [blur_taps(crop)] * 2, [float(parameters.blur_sigma[row])] * 2
            )
        if parameters.is_solarized[row]:
            image = F.solarize(image, crop.solarize_threshold)
        views.append(image)
    return torch.stack(views)


def test_all_operations_match_torchvision_in_the_drawn_order():
    crop = Crop(size=32, **EVERYTHING)
    pixels, parameters = make_images(96, 32), draw_parameters(crop, 96)
    for mask in (
        parameters.is_jittered,
        parameters.is_gray,
        parameters.is_blurred,
        parameters.is_solarized,
    ):
        assert 0 < mask.sum() < 96
    assert len(np.unique(parameters.jitter_order, axis=0)) > 12
    torch.testing.assert_close(
        color.apply(pixels, parameters, crop, *IDENTITY),
        apply_one_by_one(pixels, parameters, crop),
        **TOLERANCE,
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"brightness_mode": "add", "blur_kernel": 5}, {"hue": 0.0, "solarize_threshold": 0.2}],
)
@pytest.mark.parametrize("size", [8, 33])
def test_the_operations_for_a_gpu_give_the_same_views(options, size):
    crop = Crop(size=size, **(EVERYTHING | options))
    pixels, parameters = make_images(96, size), draw_parameters(crop, 96)
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    views = color.apply(pixels, parameters, crop, mean, std)
    expected = color_torch.apply(pixels, parameters, crop, mean, std)
    torch.testing.assert_close(views, expected, rtol=0.0, atol=5e-5)  # 1e-5 / std


@pytest.mark.parametrize("num_threads", [2, 3, 200])
def test_the_number_of_threads_changes_no_bit(num_threads, monkeypatch):
    crop = Crop(size=32, **EVERYTHING)
    pixels, parameters = make_images(64, 32), draw_parameters(crop, 64)
    expected = color.apply(pixels, parameters, crop, *IDENTITY)
    monkeypatch.setattr(color.torch, "get_num_threads", lambda: num_threads)
    assert torch.equal(color.apply(pixels, parameters, crop, *IDENTITY), expected)


def test_an_operation_changes_only_the_images_it_was_drawn_for():
    # The smallest sigma is 1, because a blur with a sigma of 0.1 changes nothing.
    crop = Crop(size=16, jitter=0.5, hue=0.3, blur=0.3, blur_sigma=[1.0, 2.0])
    pixels, parameters = make_images(40), draw_parameters(crop, 40)
    views = color.apply(pixels, parameters, crop, *IDENTITY)
    untouched = ~(parameters.is_jittered | parameters.is_blurred)
    assert 0 < untouched.sum() < 40
    assert torch.equal(views[untouched], to_floats(pixels)[untouched])
    assert (
        not torch.isclose(views[3:], to_floats(pixels)[3:]).all(dim=(1, 2, 3))[~untouched[3:]].any()
    )


@pytest.mark.parametrize("size", [8, 30, 32])
def test_a_view_has_the_same_bits_in_any_batch(size):
    crop = Crop(size=size, **EVERYTHING)
    pixels, indices = make_images(64, size), np.arange(64)
    expected = color.apply(pixels, draw_colors(crop, 1, 2, indices, 3), crop, *IDENTITY)
    for subset in (indices[::-1].copy(), indices[10:13], indices[::5], indices[7:8], indices[:0]):
        views = color.apply(pixels[subset], draw_colors(crop, 1, 2, subset, 3), crop, *IDENTITY)
        assert torch.equal(views, expected[subset])


def test_the_memory_format_changes_nothing():
    crop = Crop(size=32, **EVERYTHING)
    pixels, parameters = make_images(16, 32), draw_parameters(crop, 16)
    channels_last = pixels.contiguous(memory_format=torch.channels_last)
    expected = color.apply(pixels, parameters, crop, *IDENTITY)
    torch.testing.assert_close(
        color.apply(channels_last, parameters, crop, *IDENTITY), expected, **TOLERANCE
    )


def test_the_input_is_not_changed():
    crop = Crop(size=16, **EVERYTHING)
    pixels = make_images(8)
    color.apply(pixels, draw_parameters(crop, 8), crop, *IDENTITY)
    assert torch.equal(pixels, make_images(8))


def test_views_are_normalized_as_in_torchvision():
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    crop, pixels = Crop(size=16, **EVERYTHING), make_images(8)
    expected = v2.Normalize(mean, std)(to_floats(pixels))
    torch.testing.assert_close(color.normalize(pixels, mean, std), expected, **TOLERANCE)
    unnormalized = color.apply(pixels, draw_parameters(crop, 8), crop, *IDENTITY)
    torch.testing.assert_close(
        color.apply(pixels, draw_parameters(crop, 8), crop, mean, std),
        v2.Normalize(mean, std)(unnormalized),
        **TOLERANCE,
    )


N = 20000


def test_factors_have_the_distribution_of_torchvisions_color_jitter():
    # The range of a strength above 1 is clipped at 0.
    strengths = {"brightness": 1.2, "contrast": 0.4, "saturation": 0.8, "hue": 0.1}
    parameters = draw_parameters(Crop(jitter=1.0, **strengths), N)
    transform = v2.ColorJitter(**strengths)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = [transform.make_params([]) for _ in range(4000)]
    for column, name in enumerate(strengths):
        low, high = getattr(transform, name)
        ours = parameters.jitter_factors[:, column]
        assert low <= ours.min()
        assert ours.max() <= high
        assert stats.kstest(ours, stats.uniform(low, high - low).cdf).pvalue > CHANCE
        assert stats.ks_2samp(ours, [params[f"{name}_factor"] for params in theirs]).pvalue > CHANCE


def test_every_order_of_the_jitter_is_equally_frequent():
    orders, counts = np.unique(draw_parameters(Crop(), N).jitter_order, axis=0, return_counts=True)
    assert len(orders) == 24
    assert stats.chisquare(counts).pvalue > CHANCE


def test_added_brightness_and_sigma_are_uniform_in_their_ranges():
    parameters = draw_parameters(
        Crop(brightness=0.4, brightness_mode="add", blur_sigma=[0.1, 2.0]), N
    )
    assert (
        stats.kstest(parameters.jitter_factors[:, BRIGHTNESS], stats.uniform(-0.4, 0.8).cdf).pvalue
        > CHANCE
    )
    assert stats.kstest(parameters.blur_sigma, stats.uniform(0.1, 1.9).cdf).pvalue > CHANCE


@pytest.mark.parametrize(
    ("key", "mask_name"),
    [
        ("jitter", "is_jittered"),
        ("grayscale", "is_gray"),
        ("blur", "is_blurred"),
        ("solarize", "is_solarized"),
    ],
)
def test_an_operation_has_the_probability_of_the_recipe(key, mask_name):
    def mask(probability):
        return getattr(draw_parameters(Crop(**{key: probability}), N), mask_name)

    assert not mask(0.0).any()
    assert mask(1.0).all()
    assert mask(0.2).mean() == pytest.approx(0.2, abs=0.011)  # 3.9 standard deviations


def test_random_numbers_are_independent_of_each_other():
    p = draw_parameters(Crop(**EVERYTHING), N)
    masks = [p.is_jittered, p.is_gray, p.is_blurred, p.is_solarized]
    columns = [*masks, p.blur_sigma, *p.jitter_factors.T, *p.jitter_order[:, :2].T]
    correlations = np.corrcoef(np.array(columns, dtype=float))
    allowed = np.eye(len(columns), dtype=bool)
    allowed[-1, -2] = allowed[-2, -1] = True  # two stages never share an operation
    assert np.abs(correlations[~allowed]).max() < 0.03  # 4.2 standard deviations


@pytest.mark.parametrize("other", [{"seed": 1}, {"epoch": 1}, {"view": 1}])
def test_parameters_differ_by_seed_epoch_and_view(other):
    a, b = (
        draw_parameters(Crop(**EVERYTHING), 500),
        draw_parameters(Crop(**EVERYTHING), 500, **other),
    )
    for field in fields(ColorParameters):
        assert not np.array_equal(getattr(a, field.name), getattr(b, field.name)), field.name


def test_an_image_gets_the_same_parameters_in_any_batch():
    crop, subset = Crop(**EVERYTHING), np.array([40, 3, 17])
    expected, parameters = draw_parameters(crop, 100), draw_colors(crop, 0, 0, subset, 0)
    for field in fields(ColorParameters):
        assert np.array_equal(
            getattr(parameters, field.name), getattr(expected, field.name)[subset]
        ), field.name


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (
            torch.zeros(4, 3, 8, 8),
            "color: pixels must be uint8 (4, 3, height, width), got torch.float32 (4, 3, 8, 8)",
        ),
        (
            torch.zeros(5, 3, 8, 8, dtype=torch.uint8),
            "color: pixels must be uint8 (4, 3, height, width), got torch.uint8 (5, 3, 8, 8)",
        ),
        (
            torch.zeros(3, 8, 8, dtype=torch.uint8),
            "color: pixels must be uint8 (4, 3, height, width), got torch.uint8 (3, 8, 8)",
        ),
    ],
)
def test_pixels_of_another_type_or_shape_are_refused(pixels, message):
    with pytest.raises(ValueError) as error:
        color.apply(pixels, draw_parameters(Crop(size=8), 4), Crop(size=8), *IDENTITY)
    assert str(error.value) == message


PRINT_DIGEST = """
import hashlib
import numpy as np
import torch
from ssl_pretrain.views import color
from ssl_pretrain.views.color_parameters import draw_colors
from ssl_pretrain.views.recipe import Crop
torch.manual_seed(0)
strengths = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2}
crop = Crop(size=24, jitter=0.8, grayscale=0.2, blur=0.5, solarize=0.2, **strengths)
pixels = torch.randint(0, 256, (64, 3, 24, 24), dtype=torch.uint8)
parameters = draw_colors(crop, 0, 0, np.arange(64), 0)
views = color.apply(pixels, parameters, crop, [0.5] * 3, [0.2] * 3)
print(hashlib.sha256(views.numpy().tobytes()).hexdigest())
"""


def test_cached_code_gives_the_same_bits_as_in_the_process_that_compiled_it(tmp_path):
    """A resumed run loads the code that its first process compiled."""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    digests = [
        subprocess.run(
            [sys.executable, "-c", PRINT_DIGEST],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for _ in ("compiles", "loads")
    ]
    assert list(tmp_path.rglob("color_cpu._apply-*.nbc"))
    assert digests[0] == digests[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("size", [32, 224])
def test_a_gpu_gives_the_same_views_without_blocking_the_host(size):
    crop = Crop(size=size, **EVERYTHING)
    pixels, parameters = make_images(32, size), draw_parameters(crop, 32)
    expected = color.apply(pixels, parameters, crop, *IDENTITY)
    gpu_pixels = pixels.cuda()
    color.apply(gpu_pixels, parameters, crop, *IDENTITY)  # the first call uploads constants
    torch.cuda.set_sync_debug_mode("error")
    try:
        views = color.apply(gpu_pixels, parameters, crop, *IDENTITY)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(views.cpu(), expected, **TOLERANCE)


def test_kornia_gives_the_same_views():
    pytest.importorskip("kornia", reason="kornia is not installed: uv pip install kornia")
    import importlib.util
    from pathlib import Path

    spec = importlib.util.spec_from_file_location(
        "color_bench", Path(__file__).parents[1] / "bench" / "color.py"
    )
    assert spec is not None and spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    parameters = bench.draw_parameters(24)
    assert 0 < parameters.is_gray.sum() < 24 and 0 < parameters.is_blurred.sum() < 24
    pixels = bench.smooth_images(24)
    difference = bench.apply_ours(pixels, parameters) - bench.apply_kornia(pixels, parameters)
    assert difference.abs().max() < 0.25 / 255  # a quarter of a gray level
