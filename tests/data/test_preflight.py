"""The line that says which of the two a run waits for."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from betons import needs_ffcv, opened, tree, written

from ssl_pretrain.data import preflight
from ssl_pretrain.data.loader import Loader
from ssl_pretrain.distributed import process_group
from ssl_pretrain.views.recipe import Crop, ViewsConfig

VIEWS = ViewsConfig(crops={"global": Crop(count=2, size=8)})
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path):
    return Loader(
        opened(tree(tmp_path / "data", n=12), loader="folder"), VIEWS, seed=0, global_batch_size=6
    )


@pytest.fixture
def cores(monkeypatch):
    monkeypatch.setattr(process_group, "available_cores", lambda: 4)


def test_a_slow_model_is_named(folder, cores):
    # 600 images in 10 s, of which 2 s to make them: the model's 8 s
    assert preflight.describe(folder, 600, total=10.0, waited=2.0, num_made=600, seconds=2.0) == (
        "preflight: loader 300 images/s, model 75 images/s, waiting for data 20 % of the time: the model is the bottleneck; the loader keeps up"
    )


def test_a_slow_loader_is_named_with_the_remedy(folder, cores):
    assert preflight.describe(folder, 600, total=10.0, waited=8.0, num_made=600, seconds=8.0) == (
        "preflight: loader 75 images/s, model 300 images/s, waiting for data 80 % of the time: the loader is the bottleneck; "
        "raise data.num_workers from 0 to 4, the cores of each rank"
    )
    folder.num_workers = 4
    assert preflight.remedy(folder) == (
        "write a .beton (python -m ssl_pretrain.data.beton write), which is decoded once for all views, or give the rank more cores"
    )
    folder.how = "ffcv"
    assert preflight.remedy(folder) == (
        "write the .beton with a smaller --max-side (docs/data.md has what that costs), or give the rank more cores"
    )


def test_workers_count_each(folder, cores):
    folder.num_workers = 4  # each took 8 s for 600 images: together 300 images/s
    line = preflight.describe(folder, 600, total=10.0, waited=1.0, num_made=600, seconds=8.0)
    assert line.startswith(
        "preflight: loader 300 images/s, model 67 images/s, waiting for data 10 % of the time: the model"
    )


def test_images_on_the_device_wait_for_nothing(folder):
    folder.how = "device"
    line = preflight.describe(folder, 600, total=10.0, waited=1.0, num_made=600, seconds=0.0)
    assert line == "preflight: loader on the device, model 67 images/s: nothing to wait for"


@needs_ffcv
def test_it_comes_once_and_changes_no_batch(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(preflight, "_STEPS", 3)
    monkeypatch.setattr(preflight, "_SECONDS", 0.0)
    stored = written(tmp_path / "data", n=12)
    with Loader(stored, VIEWS, seed=0, global_batch_size=6, how="ffcv", num_workers=1) as loader:
        watched = [batch.views for batch in itertools.islice(preflight.watched(loader, 1, CPU), 8)]
        plain = [batch.views for batch in itertools.islice(loader.starting_at(1), 8)]
    assert all(torch.equal(a, b) for one, other in zip(watched, plain) for a, b in zip(one, other))
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        r"preflight: loader [\d,]+ images/s, model [\d,]+ images/s, waiting for data \d+ % of the time: the .*",
        line,
    )
