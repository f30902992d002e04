"""Measure JPEG decoding at a reduced size, and how far its views are from those of whole images.

    PYTHONPATH=. OMP_NUM_THREADS=1 python tests/bench/partial_decoding.py

libjpeg-turbo can decode an image at k / 8 of its size by a smaller inverse DCT (simplejpeg's
min_height and min_width). The bench takes the smallest of 1/8, 1/4 and 1/2 that leaves every box
of an image at least as large as its view, because other factors are slower than the whole image.
The boxes are drawn in pixels of the whole image, so they stay the same. Recipes:

    simclr 224    two views of configs/simclr_imagenet.yaml
    simclr 96     the same with views of 96 pixels

Two times are compared in interleaved rounds: decoding alone, and decoding with all views, made by
the compiled code of data/native. Gray levels are compared after Pillow's antialiased bicubic
resize, which accepts boxes between pixels. No wheel offers decoding of chosen rows. The bench
prints the share of an image's rows that lie above the end of its lowest box, which is the share
that such a decoder would have to read at least.
"""

import argparse
import statistics
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

sys.path[:0] = [str(Path(__file__).parent)]

from measure import DATA_FOLDER, versions

from ssl_pretrain.data.native import views
from ssl_pretrain.views import crops
from ssl_pretrain.views.recipe import Crop

EIGHTHS = (1, 2, 4)  # sizes in eighths, of which libjpeg-turbo has a fast inverse DCT
SIMCLR = Crop(
    count=2, size=224, scale=[0.08, 1.0], crop_sampler="tensorflow", interpolation="bicubic"
)
RECIPES = {"simclr 224": SIMCLR, "simclr 96": replace(SIMCLR, size=96)}


class Sample(NamedTuple):
    """A JPEG, its size, the boxes of its views, and the size to decode it at, in eighths."""

    content: bytes
    height: int
    width: int
    boxes: list[crops.Box]
    eighths: int


def read_samples(archive: Path, crop: Crop) -> list[Sample]:
    samples = []
    with zipfile.ZipFile(archive) as images:
        names = [name for name in images.namelist() if name.lower().endswith((".jpg", ".jpeg"))]
        for index, name in enumerate(names):
            content = images.read(name)
            height, width = simplejpeg.decode_jpeg_header(content)[:2]
            boxes = [
                crops.draw_box(crop, 0, 0, index, view, height, width) for view in range(crop.count)
            ]
            shortest = min(min(box.height, box.width) for box in boxes)
            sizes = [size for size in EIGHTHS if shortest * size >= 8 * crop.size]
            samples.append(Sample(content, height, width, boxes, min(sizes, default=8)))
    return samples


def decode(sample: Sample, eighths: int) -> np.ndarray:
    """Decode a JPEG at a number of eighths of its size, which libjpeg-turbo rounds up."""
    height, width = -(-sample.height * eighths // 8), -(-sample.width * eighths // 8)
    pixels: np.ndarray = simplejpeg.decode_jpeg(sample.content, min_height=height, min_width=width)
    assert pixels.shape[:2] == (height, width)
    return pixels


def cut(pixels: np.ndarray, box: crops.Box, scale: float, size: int) -> np.ndarray:
    """Cut out and resize a box, given in pixels of the whole image, from an image at a scale."""
    height, width = pixels.shape[:2]
    corners = (
        box.left * scale,
        box.top * scale,
        min((box.left + box.width) * scale, width),
        min((box.top + box.height) * scale, height),
    )
    image = Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC, box=corners)
    return np.array(image)


def measure_times(samples: list[Sample], crop: Crop, rounds: int) -> tuple[float, float]:
    """Return the speedup of decoding and of making the views, medians of interleaved rounds."""
    view_crops = [crop] * crop.count
    table = views.pack_views(view_crops, 3, 1)
    largest = np.array([max(max(sample.height, sample.width) for sample in samples)])
    buffers = views.allocate_buffers(3, largest, largest, view_crops)
    batch = np.empty(crop.count * 3 * crop.size**2, np.uint8)

    def run(is_reduced: bool) -> tuple[float, float]:
        """Return the seconds of decoding all images, and of decoding with all views."""
        decoding, start = 0.0, time.thread_time()
        for index, sample in enumerate(samples):
            before = time.thread_time()
            pixels = decode(sample, sample.eighths if is_reduced else 8)
            decoding += time.thread_time() - before
            rows = pixels.reshape(len(pixels), -1)
            views.write_views_of(rows, table, (0, 0, index), 0, buffers, batch)
        return decoding, time.thread_time() - start

    run(True)  # compiles
    ratios = []
    for _ in range(rounds):
        whole, reduced = run(False), run(True)
        ratios.append((whole[0] / reduced[0], whole[1] / reduced[1]))
    decoding, total = zip(*ratios)
    return statistics.median(decoding), statistics.median(total)


def measure_differences(samples: list[Sample], crop: Crop) -> tuple[int, float, float]:
    """Return the largest and mean difference of the views of images that are decoded smaller.

    The third number is the share of values within one gray level. Without such images, there is no
    difference.
    """
    counts = np.zeros(256, np.int64)
    for sample in samples:
        if sample.eighths == 8:
            continue
        whole, reduced = decode(sample, 8), decode(sample, sample.eighths)
        for box in sample.boxes:
            expected = cut(whole, box, 1.0, crop.size).astype(np.int16)
            view = cut(reduced, box, sample.eighths / 8, crop.size)
            counts += np.bincount(np.abs(expected - view).ravel(), minlength=256)
    if not counts.any():
        return 0, 0.0, 1.0
    mean = float(counts @ np.arange(256) / counts.sum())
    return int(np.flatnonzero(counts).max()), mean, float(counts[:2].sum() / counts.sum())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--archive", type=Path, default=DATA_FOLDER / "imagenet_sample.zip")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(versions("simplejpeg", "pillow"))
    texts = []
    for name, crop in RECIPES.items():
        samples = read_samples(args.archive, crop)
        share = statistics.mean(sample.eighths < 8 for sample in samples)
        rows = statistics.mean(
            max(box.top + box.height for box in sample.boxes) / sample.height for sample in samples
        )
        decoding, total = measure_times(samples, crop, args.rounds)
        largest, mean, within_one = measure_differences(samples, crop)
        print(
            f"{name}: {share:.1%} of {len(samples)} images are decoded at a reduced size; decoding "
            f"{decoding:.3f} times as fast, with views {total:.3f}; their views differ by at most "
            f"{largest} gray levels, {mean:.2f} on average, {within_one:.1%} within one; the boxes "
            f"end at {rows:.1%} of the rows",
            flush=True,
        )
        key = name.replace(" ", "_")
        texts.append(
            f"{key}_decoding={decoding:.3f} {key}_total={total:.3f} {key}_largest={largest} "
            f"{key}_within_one={within_one:.3f}"
        )
    print(f"ratios: {' '.join(texts)}")


if __name__ == "__main__":
    main()
