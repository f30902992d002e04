"""Views on a GPU equal those of a CPU and make no host wait. Data sets on the device and pinned memory work."""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from on_cuda import NEEDS_CUDA, cuda, never_waited_for  # noqa: F401

from ssl_pretrain.data.loader import Loader
from ssl_pretrain.data.sources import DataConfig, open_source
from ssl_pretrain.views import color, crops
from ssl_pretrain.views.recipe import Crop, ViewsConfig
from ssl_pretrain.views.upload import upload

pytestmark = NEEDS_CUDA

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
MEAN, STD = [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]
EVERYTHING = {
    "jitter": 0.8,
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.4,
    "hue": 0.1,
    "grayscale": 0.3,
    "blur": 0.5,
    "solarize": 0.3,
}
TENSORFLOW = {
    "contrast_mean": "channel",
    "saturation_mode": "hsv",
    "blur_border": "zero",
}  # of SimCLR's and BYOL's code
SIMCLR = ViewsConfig(crops={"global": Crop(count=2, size=32, **EVERYTHING)})
CIFAR10 = os.environ.get(
    "CIFAR10", "../shared/data/cifar10.zip"
)  # a zip or folder with train/CLASS and test/CLASS


@pytest.mark.parametrize("size", [32, 224])
@pytest.mark.parametrize("options", [{}, TENSORFLOW], ids=["torchvision", "tensorflow"])
def test_colours_are_those_of_a_cpu_and_nobody_waits(size, options, cuda, never_waited_for):
    crop = Crop(size=size, **EVERYTHING, **options)
    pixels = torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (32, 3, size, size), dtype=np.uint8)
    )
    parameters = color.draw(crop, 1, 2, np.arange(32), 0)
    expected = color.apply(pixels, parameters, crop, MEAN, STD)
    there = pixels.to(cuda)
    color.apply(there, parameters, crop, MEAN, STD)  # the first call uploads constants
    with never_waited_for():
        views = color.apply(there, parameters, crop, MEAN, STD)
    torch.testing.assert_close(views.cpu(), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [32, 96, 224])
@pytest.mark.parametrize(
    "options",
    [{}, TENSORFLOW, TENSORFLOW | {"brightness_mode": "add"}],
    ids=["torchvision", "simclr", "byol"],
)
def test_the_fused_colors_of_a_group_are_those_of_a_cpu_and_nobody_waits(
    size, dtype, options, cuda, never_waited_for
):
    crop = Crop(size=size, count=2, **EVERYTHING, **options)
    generator = np.random.default_rng(0)
    pixels = [
        torch.from_numpy(generator.integers(0, 256, (32, 3, size, size), dtype=np.uint8))
        for _ in range(2)
    ]
    drawn = [color.draw(crop, 1, 2, np.arange(32), view) for view in range(2)]
    expected = color.apply_to_group(pixels, drawn, crop, MEAN, STD)
    there = [view.to(cuda) for view in pixels]
    color.apply_to_group(there, drawn, crop, MEAN, STD, dtype)  # compiles
    with never_waited_for():
        views = color.apply_to_group(there, drawn, crop, MEAN, STD, dtype)
    for view, wanted in zip(views, expected):
        assert view.dtype == dtype and view.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(
            view.float().cpu(), wanted, rtol=0, atol=2e-5 if dtype == torch.float32 else 2**-8
        )


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    "options",
    [{}, {"antialias": False, "crop_sampler": "tensorflow"}],
    ids=["torchvision", "tensorflow"],
)
def test_crops_are_those_of_a_cpu_within_one_grey_level_and_nobody_waits(
    interpolation, options, cuda, never_waited_for
):
    crop = Crop(size=24, interpolation=interpolation, scale=[0.05, 1.0], **options)
    images = torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (40, 3, 32, 32), dtype=np.uint8)
    )
    boxes = crops.boxes(crop, 1, 2, np.arange(40), 0, np.full((40, 2), 32))
    expected, there = crops.apply_to_batch(images, boxes, crop), images.to(cuda)
    with never_waited_for():
        views = crops.apply_to_batch(there, boxes, crop)
    difference = (views.cpu().int() - expected.int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 0.001


def test_digits_from_the_device_come_without_waiting(cuda, never_waited_for):
    source = open_source(DataConfig("digits"), "val")
    with Loader(source, SIMCLR, seed=3, global_batch_size=64, how="device", device=cuda) as there:
        batches = there.starting_at(0)
        next(batches)
        with never_waited_for():
            ours = next(batches)
    with Loader(source, SIMCLR, seed=3, global_batch_size=64) as here:
        _, expected = itertools.islice(here.starting_at(0), 2)
    assert torch.equal(ours.indices.cpu(), expected.indices) and torch.equal(
        ours.labels.cpu(), expected.labels
    )
    for view, wanted in zip(
        ours.views, expected.views
    ):  # color magnifies the one gray level of the crop
        assert ((view.cpu() - wanted).abs() > 8 / 255).float().mean() < 0.001


@pytest.mark.skipif(
    not Path(CIFAR10).exists(),
    reason=f"no CIFAR-10 at {CIFAR10}; CIFAR10=/path/to/cifar10.zip names it",
)
def test_cifar10_is_wholly_on_the_device(cuda):
    before = torch.cuda.memory_allocated()
    source = open_source(DataConfig("cifar10", root=CIFAR10, cache="device"), "train")
    with Loader(
        source, SIMCLR, seed=0, global_batch_size=512, how="device", device=cuda
    ) as batches:
        taken = torch.cuda.memory_allocated() - before
        assert taken >= 50_000 * 3 * 32 * 32
        batch = next(batches.starting_at(0))
        assert all(
            view.device.type == "cuda" and view.shape == (512, 3, 32, 32) for view in batch.views
        )


def test_a_folders_batches_arrive_whole(cuda, tmp_path):
    from betons import opened, tree

    source = opened(tree(tmp_path / "data", n=50), loader="folder")
    with (
        Loader(source, SIMCLR, seed=3, global_batch_size=12, device=cuda, num_workers=2) as there,
        Loader(source, SIMCLR, seed=3, global_batch_size=12) as here,
    ):
        for _, sent, kept in zip(range(12), there.starting_at(0), here.starting_at(0)):
            assert torch.equal(sent.indices.cpu(), kept.indices)
            torch.testing.assert_close(
                [view.cpu() for view in sent.views], kept.views, rtol=0, atol=2e-4
            )


def test_the_pinned_ring_sends_the_same_views(cuda, tmp_path):
    pytest.importorskip("ffcv", reason="FFCV is not installed: make ffcv")
    from betons import written

    plain = ViewsConfig(crops={"global": Crop(count=2, size=24)})
    source = written(tmp_path / "data")
    options = {"seed": 3, "global_batch_size": 12, "num_workers": 2, "how": "ffcv"}
    with (
        Loader(source, plain, device=cuda, **options) as there,
        Loader(source, plain, **options) as here,
    ):
        for _, sent, kept in zip(range(12), there.starting_at(0), here.starting_at(0)):
            torch.testing.assert_close(
                [view.cpu() for view in sent.views], kept.views, rtol=0, atol=1e-6
            )
        assert all(slot.is_pinned() for slot in there._maker._slots)


def test_an_upload_is_whole_and_nobody_waits(cuda, never_waited_for):
    numbers = torch.arange(1_000_000)
    upload(numbers, cuda)
    with never_waited_for():
        there = upload(numbers, cuda)
    assert torch.equal(there.cpu(), numbers)
