"""Images on the device: the loader's batches, without the loader's work."""

from __future__ import annotations

import itertools

import pytest
import torch
from betons import opened, tree

from ssl_pretrain.data import device_cache
from ssl_pretrain.data.loader import Loader, choose
from ssl_pretrain.data.sources import DataConfig, open_source
from ssl_pretrain.views.recipe import Crop, ViewsConfig

PLAIN = ViewsConfig(
    crops={
        "global": Crop(count=2, size=12),
        "local": Crop(count=1, size=6, scale=[0.1, 0.4], interpolation="bicubic"),
    }
)
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    ),
]


@pytest.mark.parametrize("device", DEVICES)
def test_batches_are_those_of_the_folder_loader_within_one_grey_level(device, tmp_path):
    source = opened(tree(tmp_path / "data", n=50), loader="folder")
    with (
        Loader(source, PLAIN, seed=3, global_batch_size=12, how="device", device=device) as cached,
        Loader(source, PLAIN, seed=3, global_batch_size=12) as read,
    ):
        for _, ours, theirs in zip(range(6), cached.starting_at(2), read.starting_at(2)):
            assert torch.equal(ours.indices.cpu(), theirs.indices) and torch.equal(
                ours.labels.cpu(), theirs.labels
            )
            for view, expected in zip(ours.views, theirs.views):
                assert view.device.type == device and view.shape == expected.shape
                difference = (view.cpu() - expected).abs() * 255
                assert difference.max() < 1.01 and (difference > 0.5).float().mean() < 0.001


def test_steps_resume_and_ranks_share_as_ever():
    source = open_source(DataConfig("digits"), "val")
    options = {"seed": 3, "global_batch_size": 60, "how": "device"}
    straight = [
        batch.views
        for batch in itertools.islice(Loader(source, PLAIN, **options).starting_at(0), 4)
    ]
    resumed = next(Loader(source, PLAIN, **options).starting_at(3)).views
    ranks = [
        next(Loader(source, PLAIN, rank=rank, world_size=2, **options).starting_at(3)).views
        for rank in range(2)
    ]
    for view, again, *parts in zip(straight[3], resumed, *ranks):
        assert torch.equal(view, again) and torch.equal(view, torch.cat(parts))


def test_an_unreadable_image_is_replaced_and_counted(tmp_path):
    root = tree(tmp_path / "data", n=12)
    source = opened(root, loader="folder")
    (root / "train" / "class_0" / "0003.jpg").write_bytes(b"")
    options = {"seed": 3, "global_batch_size": 6, "max_replaced": 1.0}
    with (
        Loader(source, PLAIN, **options, how="device") as cached,
        pytest.warns(UserWarning, match="the file is empty"),
    ):
        ours = list(itertools.islice(cached.starting_at(0), 2))
    assert cached.num_replaced == 1
    with Loader(source, PLAIN, **options) as read:
        for batch, theirs in zip(ours, read.starting_at(0)):
            assert torch.equal(batch.labels, theirs.labels)
            assert all(
                (view - other).abs().max() * 255 < 1.01
                for view, other in zip(batch.views, theirs.views)
            )


def test_more_than_the_device_holds_is_refused(monkeypatch):
    source = open_source(DataConfig("digits"), "val")
    monkeypatch.setattr(device_cache, "_room", lambda device: 50_000.0)
    with pytest.raises(ValueError) as caught:
        Loader(source, PLAIN, seed=0, global_batch_size=12, how="device")
    assert str(caught.value) == (
        "data.cache: device: the 500 images of scikit-learn's digits need at least 0.0 GiB, "
        "and half of what is free on cpu is 0.0 GiB; set data.cache=none"
    )


def test_the_config_asks_for_it():
    assert choose(
        DataConfig("digits", cache="device"), open_source(DataConfig("digits"), "val")
    ) == (
        "device",
        "data.cache asks for all images on the device",
    )
