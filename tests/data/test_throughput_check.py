"""The line that reports whether the loader or the model limits the speed of training."""

import itertools
import re
from dataclasses import replace

import pytest
import torch
from betons import needs_ffcv, open_train, write_beton, write_images
from loaders import build_loader

from ssl_pretrain.data import throughput_check
from ssl_pretrain.data.readers import ReaderKind
from ssl_pretrain.data.throughput_check import Throughput
from ssl_pretrain.distributed import process_group
from ssl_pretrain.views.recipe import Crop, ViewsConfig

VIEWS = ViewsConfig(crops={"global": Crop(count=2, size=8)})
CPU = torch.device("cpu")


@pytest.fixture
def loader(tmp_path):
    source = open_train(write_images(tmp_path / "data", n=12), loader="folder")
    return build_loader(source, VIEWS, global_batch_size=6)


@pytest.fixture
def four_cores(monkeypatch):
    monkeypatch.setattr(process_group, "available_cores", lambda: 4)


def describe(loader, waiting_seconds: float, reading_seconds: float) -> str:
    """Return the line for 600 images that were trained on in 10 seconds."""
    throughput = Throughput(600, 10.0, waiting_seconds, 600, reading_seconds)
    return throughput_check.describe_throughput(loader, throughput)


def test_a_slow_model_is_named(loader, four_cores):
    # The trainer reads the images in 2 of the 10 seconds, so the model takes 8.
    assert describe(loader, waiting_seconds=2.0, reading_seconds=2.0) == (
        "throughput: loader 300 images/s, model 75 images/s, waiting for data 20 % of the time: "
        "the model is the bottleneck; the loader keeps up"
    )


def test_a_slow_loader_is_named_with_the_remedy(loader, four_cores):
    assert describe(loader, waiting_seconds=8.0, reading_seconds=8.0) == (
        "throughput: loader 75 images/s, model 300 images/s, waiting for data 80 % of the time: "
        "the loader is the bottleneck; "
        "raise data.num_workers from 0 to 4, the number of cores per rank"
    )
    loader.reader = replace(loader.reader, num_workers=4)
    assert throughput_check.suggest_remedy(loader) == (
        "write a .beton (python -m ssl_pretrain.data.beton write), whose images are decoded once "
        "for all views, or give the rank more cores"
    )
    loader.reader = replace(loader.reader, kind=ReaderKind.THREADS)
    assert throughput_check.suggest_remedy(loader) == (
        "write the .beton with a smaller --max-side (docs/results/loading.md lists the cost), or "
        "give the rank more cores"
    )


def test_the_rates_of_workers_add_up(loader, four_cores):
    # Four workers took 8 seconds together for 600 images, which is 75 images/s per worker.
    loader.reader = replace(loader.reader, num_workers=4)
    line = describe(loader, waiting_seconds=1.0, reading_seconds=8.0)
    assert line.startswith(
        "throughput: loader 300 images/s, model 67 images/s, waiting for data 10 % of the time: "
        "the model"
    )


def test_images_on_the_device_need_no_loader(loader):
    loader.reader = replace(loader.reader, kind=ReaderKind.DEVICE_CACHE)
    line = describe(loader, waiting_seconds=1.0, reading_seconds=0.0)
    assert line == (
        "throughput: loader on the device, model 67 images/s: the model never waits for data"
    )


@needs_ffcv
def test_the_line_is_printed_once_and_no_batch_changes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(throughput_check, "MIN_STEPS", 3)
    monkeypatch.setattr(throughput_check, "MIN_SECONDS", 0.0)
    beton = write_beton(tmp_path / "data", n=12)
    with build_loader(beton, VIEWS, "ffcv", global_batch_size=6, num_workers=1) as loader:
        batches = throughput_check.report_bottleneck(loader, 1, CPU)
        views = [batch.views for batch in itertools.islice(batches, 8)]
        expected = [batch.views for batch in itertools.islice(loader.iterate_from(1), 8)]
    pairs = zip(itertools.chain(*views), itertools.chain(*expected), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        r"throughput: loader [\d,]+ images/s, model [\d,]+ images/s, "
        r"waiting for data \d+ % of the time: the .*",
        line,
    )
