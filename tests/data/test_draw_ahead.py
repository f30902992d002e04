"""Numbers that a thread draws ahead give the same batches and errors as numbers drawn in turn."""

import itertools
import threading

import pytest
import torch
from loaders import build_loader, digests

from ssl_pretrain.data import draw_ahead as module
from ssl_pretrain.data.draw_ahead import draw_ahead
from ssl_pretrain.data.sources import DataConfig, open_source
from ssl_pretrain.views.recipe import Crop, ViewsConfig

CPU = torch.device("cpu")
VIEWS = ViewsConfig(
    crops={
        "global": Crop(count=2, size=12, jitter=0.8, brightness=0.4, grayscale=0.2, blur=0.5),
        "local": Crop(count=1, size=6, scale=[0.1, 0.4]),
    }
)


@pytest.fixture
def ahead_on_cpu(monkeypatch):
    monkeypatch.setattr(module, "THREADED_DEVICES", ("cpu",))


@pytest.mark.parametrize("kind", ["device", "folder"])
@pytest.mark.parametrize("first_step", [0, 3])  # an epoch has four steps
def test_batches_have_the_same_bits_in_the_same_order(kind, first_step, monkeypatch):
    source = open_source(DataConfig("digits"), "val")
    expected = digests(build_loader(source, VIEWS, kind, global_batch_size=120), first_step, 6)
    monkeypatch.setattr(module, "THREADED_DEVICES", ("cpu",))
    ahead = digests(build_loader(source, VIEWS, kind, global_batch_size=120), first_step, 6)
    assert ahead == expected and len(set(ahead)) == 6


def test_the_next_request_is_drawn_while_the_current_one_is_used(ahead_on_cpu):
    events = [threading.Event() for _ in range(5)]

    def draw(request):
        events[request].set()
        return threading.current_thread().name

    draws = draw_ahead(draw, itertools.count(), CPU)
    request, thread_name = next(draws)
    assert request == 0 and thread_name.startswith("draw_ahead")
    assert events[1].wait(10) and not events[2].is_set()
    assert next(draws)[0] == 1 and events[2].wait(10) and not events[3].is_set()
    draws.close()
    assert not any(thread.name.startswith("draw_ahead") for thread in threading.enumerate())


@pytest.mark.parametrize("devices", [(), ("cpu",)])
def test_an_error_is_raised_when_its_request_is_due(devices, monkeypatch):
    monkeypatch.setattr(module, "THREADED_DEVICES", devices)
    draws = draw_ahead(lambda request: 6 // (2 - request), range(4), CPU)
    assert [next(draws), next(draws)] == [(0, 3), (1, 6)]
    with pytest.raises(ZeroDivisionError):
        next(draws)


def test_all_requests_are_drawn_once(ahead_on_cpu):
    assert list(draw_ahead(lambda request: -request, range(3), CPU)) == [(0, 0), (1, -1), (2, -2)]
    assert list(draw_ahead(abs, [], CPU)) == []


def test_on_a_cpu_the_numbers_are_drawn_by_the_caller():
    names = [name for _, name in draw_ahead(lambda _: threading.current_thread().name, [1], CPU)]
    assert names == [threading.current_thread().name]
