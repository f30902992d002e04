"""Views on a GPU equal those on a CPU and never block the host.

The images come from the CPU, from pinned memory, or from a data set on the device.
"""

import itertools
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from on_cuda import NEEDS_CUDA, cuda, forbid_synchronization  # noqa: F401

from ssl_pretrain.data.sources import DataConfig, open_source
from ssl_pretrain.views import color, crops
from ssl_pretrain.views.batch import upload
from ssl_pretrain.views.color_parameters import draw_colors
from ssl_pretrain.views.recipe import Crop, ViewsConfig

pytestmark = NEEDS_CUDA

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))


def build_loader(*arguments, **options):
    """Build a loader with tests/data/loaders.py."""
    import loaders

    return loaders.build_loader(*arguments, **options)


MEAN, STD = [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]
COLOR_OPERATIONS = {
    "jitter": 0.8,
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.4,
    "hue": 0.1,
    "grayscale": 0.3,
    "blur": 0.5,
    "solarize": 0.3,
}
# Options that reproduce the code of SimCLR and BYOL.
TENSORFLOW = {"contrast_mean": "channel", "saturation_mode": "hsv", "blur_border": "zero"}
SIMCLR = ViewsConfig(crops={"global": Crop(count=2, size=32, **COLOR_OPERATIONS)})
# A zip or folder with train/CLASS and test/CLASS.
REPOSITORY = Path(__file__).resolve().parents[2]
DATA_FOLDER = Path(os.environ.get("SSL_PRETRAIN_DATA", REPOSITORY.parent / "shared" / "data"))
CIFAR10 = os.environ.get("CIFAR10", str(DATA_FOLDER / "cifar10.zip"))


@pytest.mark.parametrize("size", [32, 224])
@pytest.mark.parametrize("options", [{}, TENSORFLOW], ids=["torchvision", "tensorflow"])
def test_colors_equal_those_of_a_cpu_without_blocking(size, options, cuda, forbid_synchronization):
    crop = Crop(size=size, **COLOR_OPERATIONS, **options)
    pixels = torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (32, 3, size, size), dtype=np.uint8)
    )
    parameters = draw_colors(crop, 1, 2, np.arange(32), 0)
    expected = color.apply(pixels, parameters, crop, MEAN, STD)
    gpu_pixels = pixels.to(cuda)
    color.apply(gpu_pixels, parameters, crop, MEAN, STD)  # the first call uploads constants
    with forbid_synchronization():
        views = color.apply(gpu_pixels, parameters, crop, MEAN, STD)
    torch.testing.assert_close(views.cpu(), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [32, 96, 224])
@pytest.mark.parametrize(
    "options",
    [{}, TENSORFLOW, TENSORFLOW | {"brightness_mode": "add"}],
    ids=["torchvision", "simclr", "byol"],
)
def test_fused_colors_of_a_group_equal_those_of_a_cpu_without_blocking(
    size, dtype, options, cuda, forbid_synchronization
):
    crop = Crop(size=size, count=2, **COLOR_OPERATIONS, **options)
    generator = np.random.default_rng(0)
    pixels = [
        torch.from_numpy(generator.integers(0, 256, (32, 3, size, size), dtype=np.uint8))
        for _ in range(2)
    ]
    parameters = [draw_colors(crop, 1, 2, np.arange(32), view) for view in range(2)]
    expected = color.apply_to_group(pixels, parameters, crop, MEAN, STD)
    gpu_pixels = [view.to(cuda) for view in pixels]
    color.apply_to_group(gpu_pixels, parameters, crop, MEAN, STD, dtype)  # compiles
    with forbid_synchronization():
        views = color.apply_to_group(gpu_pixels, parameters, crop, MEAN, STD, dtype)
    for view, expected_view in zip(views, expected):
        assert view.dtype == dtype and view.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(
            view.float().cpu(),
            expected_view,
            rtol=0,
            atol=2e-5 if dtype == torch.float32 else 2**-8,
        )


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    "options",
    [{}, {"antialias": False, "crop_sampler": "tensorflow"}],
    ids=["torchvision", "tensorflow"],
)
def test_crops_are_within_one_gray_level_of_a_cpus_without_blocking(
    interpolation, options, cuda, forbid_synchronization
):
    crop = Crop(size=24, interpolation=interpolation, scale=[0.05, 1.0], **options)
    images = torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (40, 3, 32, 32), dtype=np.uint8)
    )
    boxes = crops.draw_boxes(crop, 1, 2, np.arange(40), 0, np.full((40, 2), 32))
    expected, gpu_images = crops.apply_to_batch(images, boxes, crop), images.to(cuda)
    with forbid_synchronization():
        views = crops.apply_to_batch(gpu_images, boxes, crop)
    difference = (views.cpu().int() - expected.int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 0.001


def test_digits_from_the_device_arrive_without_blocking(cuda, forbid_synchronization):
    source = open_source(DataConfig("digits"), "val")
    with build_loader(source, SIMCLR, "device", global_batch_size=64, device=cuda) as gpu_loader:
        batches = gpu_loader.iterate_from(0)
        next(batches)
        with forbid_synchronization():
            batch = next(batches)
    with build_loader(source, SIMCLR, global_batch_size=64) as cpu_loader:
        _, expected = itertools.islice(cpu_loader.iterate_from(0), 2)
    assert torch.equal(batch.indices.cpu(), expected.indices) and torch.equal(
        batch.labels.cpu(), expected.labels
    )
    for view, expected_view in zip(batch.views, expected.views):
        # Color operations magnify the crop's differences of one gray level.
        assert ((view.cpu() - expected_view).abs() > 8 / 255).float().mean() < 0.001


@pytest.mark.skipif(
    not Path(CIFAR10).exists(),
    reason=f"no CIFAR-10 at {CIFAR10}; set CIFAR10=/path/to/cifar10.zip",
)
def test_all_of_cifar10_is_on_the_device(cuda):
    bytes_before = torch.cuda.memory_allocated()
    source = open_source(DataConfig("cifar10", root=CIFAR10, cache="device"), "train")
    with build_loader(
        source, SIMCLR, "device", seed=0, global_batch_size=512, device=cuda
    ) as batches:
        num_bytes = torch.cuda.memory_allocated() - bytes_before
        assert num_bytes >= 50_000 * 3 * 32 * 32
        batch = next(batches.iterate_from(0))
        assert all(
            view.device.type == "cuda" and view.shape == (512, 3, 32, 32) for view in batch.views
        )


def test_a_folders_batches_arrive_intact(cuda, tmp_path):
    from betons import open_train, write_images

    source = open_train(write_images(tmp_path / "data", n=50), loader="folder")
    with (
        build_loader(source, SIMCLR, device=cuda, num_workers=2) as gpu_loader,
        build_loader(source, SIMCLR) as cpu_loader,
    ):
        for _, batch, expected in zip(
            range(12), gpu_loader.iterate_from(0), cpu_loader.iterate_from(0)
        ):
            assert torch.equal(batch.indices.cpu(), expected.indices)
            torch.testing.assert_close(
                [view.cpu() for view in batch.views], expected.views, rtol=0, atol=2e-4
            )


def test_the_pinned_ring_sends_the_same_views(cuda, tmp_path):
    pytest.importorskip("ffcv", reason="FFCV is not installed: make ffcv")
    from betons import write_beton

    views_config = ViewsConfig(crops={"global": Crop(count=2, size=24)})
    source = write_beton(tmp_path / "data")
    with (
        build_loader(source, views_config, "ffcv", num_workers=2, device=cuda) as gpu_loader,
        build_loader(source, views_config, "ffcv", num_workers=2) as cpu_loader,
    ):
        for _, batch, expected in zip(
            range(12), gpu_loader.iterate_from(0), cpu_loader.iterate_from(0)
        ):
            torch.testing.assert_close(
                [view.cpu() for view in batch.views], expected.views, rtol=0, atol=1e-6
            )
        assert all(buffer.is_pinned() for buffer in gpu_loader.reader.pool.buffers)


def test_an_upload_is_intact_and_does_not_block(cuda, forbid_synchronization):
    numbers = torch.arange(1_000_000)
    upload(numbers, cuda)
    with forbid_synchronization():
        uploaded_numbers = upload(numbers, cuda)
    assert torch.equal(uploaded_numbers.cpu(), numbers)
