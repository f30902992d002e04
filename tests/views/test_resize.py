"""The compiled resize equals torch's antialiased one within one gray level."""

import numpy as np
import pytest
import torch
from sharp_pictures import picture
from torchvision.transforms.v2 import functional as F

from ssl_pretrain.views import resize

pytestmark = pytest.mark.promise


def ours(
    image: np.ndarray, box: tuple[int, int, int, int, bool], size: int, bicubic: bool
) -> np.ndarray:
    height, width, _ = image.shape
    tall, wide = (-(-side // resize.TILE) * resize.TILE for side in (height, 3 * width))
    stored, turned = np.zeros((tall, wide), np.uint8), np.zeros(wide * tall, np.uint8)
    stored[:height, : 3 * width] = image.reshape(height, -1)
    resize.turn(stored.reshape(-1), wide, height, 3 * width, turned, tall)
    out = np.full(3 * size * size, 77, np.uint8)
    resize.write_view(
        turned, tall, box, size, bicubic, resize.room_for(max(height, width), [size], bicubic), out
    )
    return out.reshape(3, size, size)


# height and width of an image: (top, left, height, width) of a box, size of the view
BOXES = {
    (70, 90): [((5, 11, 41, 53), 16), ((5, 11, 41, 53), 96)],
    (375, 500): [((10, 20, 300, 400), 224), ((0, 0, 375, 500), 224)],
    (300, 400): [((100, 200, 60, 45), 224)],
    (33, 21): [((0, 0, 33, 21), 7)],
    (1, 1): [((0, 0, 1, 1), 16)],
    (17, 640): [((3, 100, 2, 500), 20)],
    (640, 17): [((100, 3, 500, 2), 20)],
    (1200, 1600): [((0, 0, 1200, 1600), 96)],
    (48, 48): [((8, 8, 32, 32), 32)],
}
CASES = [(shape, *case) for shape, cases in BOXES.items() for case in cases]


@pytest.mark.parametrize("kind", ["noise", "black and white"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("shape", "box", "size"), CASES)
def test_a_view_is_torchs_within_one_gray_level(shape, box, size, flip, interpolation, kind):
    image = picture(*shape, kind)
    mode = F.InterpolationMode(interpolation)
    expected = F.resized_crop(
        torch.from_numpy(image).permute(2, 0, 1), *box, [size, size], mode, antialias=True
    ).numpy()
    view = ours(image, (*box, flip), size, interpolation == "bicubic").astype(int)
    difference = np.abs(view - (expected[..., ::-1] if flip else expected))
    assert difference.max() <= 1
    assert difference.mean() < 0.01  # 0 where torch uses its integer arithmetic, with AVX2


def test_turn_transposes():
    source = np.arange(48 * 64, dtype=np.uint16).astype(np.uint8)
    target = np.zeros(64 * 48, np.uint8)
    resize.turn(source, 64, 40, 50, target, 48)
    np.testing.assert_array_equal(
        target.reshape(64, 48)[:50, :40], source.reshape(48, 64)[:40, :50].T
    )


@pytest.mark.parametrize("bicubic", [False, True])
@pytest.mark.parametrize(("length", "size"), [(500, 224), (100, 224), (7, 7), (1, 5), (2400, 96)])
def test_weights_add_up_and_fit_their_buffers(bicubic, length, size):
    taps = resize.most_taps(length, size, bicubic)
    starts, counts = np.zeros(size, np.int64), np.zeros(size, np.int64)
    weights, exact = np.zeros((size, taps), np.int16), np.zeros((size, taps))
    bits = resize.axis(length, size, bicubic, False, starts, counts, weights, exact)
    assert counts.max() <= taps and counts.min() >= 1 and (starts + counts).max() <= length
    np.testing.assert_allclose(weights.sum(axis=1) / 2.0**bits, 1.0, atol=taps * 2.0**-bits)
