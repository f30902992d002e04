"""The compiled resize equals torch's antialiased resize to within one gray level."""

import numpy as np
import pytest
import torch
from sharp_pictures import draw_picture
from torchvision.transforms.v2 import functional as F

from ssl_pretrain.views import resize

pytestmark = pytest.mark.promise


def resize_crop(
    image: np.ndarray, box: tuple[int, int, int, int, bool], size: tuple[int, int], bicubic: bool
) -> np.ndarray:
    """Return the view (channels, *size) of a box in an image (height, width, channels)."""
    height, width, channels = image.shape
    row_bytes = channels * width
    num_rows, num_columns = resize.pad_to_tiles(height), resize.pad_to_tiles(row_bytes)
    padded = np.zeros((num_rows, num_columns), np.uint8)
    padded[:height, :row_bytes] = image.reshape(height, -1)
    transposed = np.zeros(num_columns * num_rows, np.uint8)
    resize.transpose(padded.reshape(-1), num_columns, height, row_bytes, transposed, num_rows)
    view = np.full(channels * size[0] * size[1], 77, np.uint8)
    buffers = resize.allocate_buffers(channels, max(height, width), [size], bicubic)
    resize.write_view(transposed, channels, num_rows, box, size, bicubic, buffers, view)
    return view.reshape(channels, *size)


# Maps (height, width) of an image to boxes (top, left, height, width) and sizes of views.
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
RECTANGLES = {
    (70, 90): [((5, 11, 41, 53), (16, 96)), ((5, 11, 41, 53), (100, 24))],
    (375, 500): [((10, 20, 300, 400), (64, 256))],
    (1200, 160): [((0, 0, 1200, 160), (96, 33))],
    (17, 640): [((3, 100, 2, 500), (20, 7))],
}
SQUARES = {shape: [(box, (size, size)) for box, size in cases] for shape, cases in BOXES.items()}
CASES = [
    (shape, *case)
    for views in (SQUARES, RECTANGLES)
    for shape, cases in views.items()
    for case in cases
]


@pytest.mark.parametrize("kind", ["noise", "black and white"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("shape", "box", "size"), CASES)
def test_a_view_equals_torchs_to_within_one_gray_level(shape, box, size, flip, interpolation, kind):
    image = draw_picture(*shape, kind)
    mode = F.InterpolationMode(interpolation)
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    expected = F.resized_crop(tensor, *box, list(size), mode, antialias=True).numpy()
    view = resize_crop(image, (*box, flip), size, interpolation == "bicubic").astype(int)
    difference = np.abs(view - (expected[..., ::-1] if flip else expected))
    assert difference.max() <= 1
    assert difference.mean() < 0.01  # exactly 0 with AVX2, where torch uses integer arithmetic


@pytest.mark.parametrize("channels", [1, 2, 4, 13])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_any_number_of_channels_equals_torch(channels, interpolation):
    pictures = [np.roll(draw_picture(70, 90, "noise"), shift, axis=0) for shift in range(5)]
    image = np.concatenate(pictures, axis=2)[..., :channels]
    mode = F.InterpolationMode(interpolation)
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    expected = F.resized_crop(tensor, 5, 11, 41, 53, [16, 16], mode, antialias=True).numpy()
    view = resize_crop(image, (5, 11, 41, 53, False), (16, 16), interpolation == "bicubic").astype(
        int
    )
    difference = np.abs(view - expected)
    assert difference.max() <= 1
    assert difference.mean() < 0.01


def test_transpose_handles_partial_tiles():
    source = np.arange(48 * 64, dtype=np.uint16).astype(np.uint8)
    target = np.zeros(64 * 48, np.uint8)
    resize.transpose(source, 64, 40, 50, target, 48)
    expected = source.reshape(48, 64)[:40, :50].T
    np.testing.assert_array_equal(target.reshape(64, 48)[:50, :40], expected)


@pytest.mark.parametrize("bicubic", [False, True])
@pytest.mark.parametrize(("length", "size"), [(500, 224), (100, 224), (7, 7), (1, 5), (2400, 96)])
def test_weights_add_up_and_fit_their_buffers(bicubic, length, size):
    taps = resize.max_taps(length, size, bicubic)
    starts, counts = np.zeros(size, np.int64), np.zeros(size, np.int64)
    weights, exact = np.zeros((size, taps), np.int16), np.zeros((size, taps))
    bits = resize.compute_weights(length, size, bicubic, False, starts, counts, weights, exact)
    assert counts.min() >= 1
    assert counts.max() <= taps
    assert (starts + counts).max() <= length
    np.testing.assert_allclose(weights.sum(axis=1) / 2.0**bits, 1.0, atol=taps * 2.0**-bits)
