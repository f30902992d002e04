"""Images cropped on the device give the same batches as worker processes."""

import itertools

import pytest
import torch
from betons import open_train, write_images
from loaders import build_loader

from ssl_pretrain.data import device_cache
from ssl_pretrain.data.readers import ReaderKind, choose_reader_kind
from ssl_pretrain.data.sources import DataConfig, open_source
from ssl_pretrain.views.recipe import Crop, ViewsConfig

VIEWS = ViewsConfig(
    crops={
        "global": Crop(count=2, size=12),
        "local": Crop(count=1, size=6, scale=[0.1, 0.4], interpolation="bicubic"),
    }
)
RECTANGLES = ViewsConfig(
    crops={
        "global": Crop(count=2, size=[8, 24]),
        "local": Crop(count=1, size=[14, 5], scale=[0.1, 0.4], interpolation="bicubic"),
    }
)
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)]


@pytest.mark.parametrize("views", [VIEWS, RECTANGLES], ids=["squares", "rectangles"])
@pytest.mark.parametrize("device", DEVICES)
def test_batches_equal_those_of_worker_processes_within_one_gray_level(device, views, tmp_path):
    source = open_train(write_images(tmp_path / "data", n=50), loader="folder")
    with (
        build_loader(source, views, "device", device=device) as loader,
        build_loader(source, views) as reference,
    ):
        for _, batch, expected in zip(range(6), loader.iterate_from(2), reference.iterate_from(2)):
            assert torch.equal(batch.indices.cpu(), expected.indices)
            assert torch.equal(batch.labels.cpu(), expected.labels)
            for view, expected_view in zip(batch.views, expected.views):
                assert view.device.type == device
                assert view.shape == expected_view.shape
                difference = (view.cpu() - expected_view).abs() * 255
                assert difference.max() < 1.01
                assert (difference > 0.5).float().mean() < 0.001


def test_resumed_steps_and_ranks_give_the_same_batches():
    source = open_source(DataConfig("digits"), "val")

    def iterate_batches(first: int, **options):
        loader = build_loader(source, VIEWS, "device", global_batch_size=60, **options)
        return loader.iterate_from(first)

    expected = [batch.views for batch in itertools.islice(iterate_batches(0), 4)][3]
    resumed = next(iterate_batches(3)).views
    ranks = [next(iterate_batches(3, rank=rank, world_size=2)).views for rank in range(2)]
    for view, view_after_resume, *slices in zip(expected, resumed, *ranks):
        assert torch.equal(view, view_after_resume) and torch.equal(view, torch.cat(slices))


def test_an_unreadable_image_is_replaced_and_counted(tmp_path):
    root = write_images(tmp_path / "data", n=12)
    source = open_train(root, loader="folder")
    (root / "train" / "class_0" / "0003.jpg").write_bytes(b"")
    options = {"global_batch_size": 6, "max_replaced": 1.0}
    with (
        build_loader(source, VIEWS, "device", **options) as loader,
        pytest.warns(UserWarning, match="the file is empty"),
    ):
        batches = list(itertools.islice(loader.iterate_from(0), 2))
    assert loader.num_replaced == 1
    with build_loader(source, VIEWS, **options) as reference:
        for batch, expected in zip(batches, reference.iterate_from(0)):
            assert torch.equal(batch.labels, expected.labels)
            for view, expected_view in zip(batch.views, expected.views):
                assert (view - expected_view).abs().max() * 255 < 1.01


def test_a_data_set_larger_than_the_device_is_refused(monkeypatch):
    source = open_source(DataConfig("digits"), "val")
    monkeypatch.setattr(device_cache, "_usable_bytes", lambda device: 50_000.0)
    with pytest.raises(ValueError) as error:
        build_loader(source, VIEWS, "device")
    assert str(error.value) == (
        "data.cache: device: the 500 images of scikit-learn's digits need at least 0.0 GiB, "
        "but half of the free memory of cpu is 0.0 GiB; set data.cache=none"
    )


def test_a_config_key_selects_the_device_cache():
    source = open_source(DataConfig("digits"), "val")
    kind, reason = choose_reader_kind(DataConfig("digits", cache="device"), source)
    assert kind == ReaderKind.DEVICE_CACHE
    assert reason == "data.cache asks for all images on the device"
