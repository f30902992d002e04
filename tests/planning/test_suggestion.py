"""Suggested configurations suit every method, few images, gray images and a CPU."""

import re
import time

import numpy as np
import pytest
import torch

from ssl_pretrain import config, methods
from ssl_pretrain.data.python_objects import open_object
from ssl_pretrain.data.sources import DataConfig, open_source
from ssl_pretrain.planning import step_time, suggestion
from ssl_pretrain.system import user_objects

RNG = np.random.default_rng(0)
SHAPES = {"32 pixels": (100, 32, 32, 3), "224 pixels": (100, 224, 224, 3), "gray": (100, 28, 28)}


@pytest.fixture
def images(request):
    """A data set of 100 labeled images and its configuration."""
    shape = SHAPES[getattr(request, "param", "32 pixels")]
    source = open_object((RNG.integers(0, 256, shape).astype(np.uint8), np.arange(100) % 5))
    with user_objects.provide({"data": {"train": source, "val": None}.get}):
        yield DataConfig(source="object:data"), source


def fix_step_time(seconds, monkeypatch):
    monkeypatch.setattr(step_time, "seconds_per_image", lambda config, source: seconds)


@pytest.mark.parametrize("images", SHAPES, indirect=True)
@pytest.mark.parametrize(
    "has_gpu", [False, pytest.param(True, marks=pytest.mark.full)], ids=["CPU", "GPU"]
)
def test_every_method_gets_settings_that_pass_the_check_on_100_images(has_gpu, images, monkeypatch):
    """`suggest` ends with the check of the configuration, which runs the method's forward pass."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    fix_step_time(0.01, monkeypatch)
    data_config, source = images
    is_quick = not has_gpu and source.read(0).shape[0] != 32
    for method in ["simclr", "dino", "cpc", "moco"] if is_quick else methods.names():
        result = suggestion.suggest(data_config, source, method=method)
        assert result.get("method.name") == method
        assert result.get("global_batch_size") == 16
        assert {"epochs", "views.mean", "global_batch_size"} <= result.reasons.keys()


@pytest.mark.full
@pytest.mark.parametrize("images", SHAPES, indirect=True)
@pytest.mark.parametrize("method", methods.names())
def test_every_method_takes_a_real_step_of_its_suggestion(method, images):
    data_config, source = images
    result = suggestion.suggest(data_config, source, method=method, max_seconds=1)
    assert result.expected_seconds > 0


def test_gray_images_keep_their_one_channel(monkeypatch):
    fix_step_time(0.01, monkeypatch)
    data_config = DataConfig(source="digits")
    result = suggestion.suggest(data_config, open_source(data_config, "train"), method="dino")
    for name, crop in result.tree["views"]["crops"].items():
        assert crop["saturation"] == crop["hue"] == crop["grayscale"] == 0
        assert crop["brightness"] > 0
        assert result.reasons[f"views.crops.{name}.hue"] == "the images are gray"


def test_a_run_on_a_cpu_is_to_end_within_an_hour(images, monkeypatch):
    data_config, source = images
    for seconds in (1e-4, 0.01, 0.1, 5.0):
        fix_step_time(seconds, monkeypatch)
        result = suggestion.suggest(data_config, source)
        assert 1 <= result.get("epochs") <= 800
        assert result.expected_seconds == result.get("epochs") * len(source) * seconds <= 3600
    assert result.get("backbone.name") == "test_resnet"  # the others would take even longer


def test_a_network_of_the_callers_is_kept(images, monkeypatch):
    fix_step_time(5.0, monkeypatch)
    data_config, source = images
    for name in ("resnet34", "convnext_atto"):
        result = suggestion.suggest(data_config, source, backbone=name)
        assert result.get("backbone.name") == name


def test_the_schedule_is_scaled_with_the_epochs(images, monkeypatch):
    fix_step_time(0.1, monkeypatch)
    data_config, source = images
    result = suggestion.suggest(data_config, source, max_seconds=1000)
    assert result.get("epochs") == 100
    assert result.get("optim.warmup_epochs") == 1.0  # 10 of the recipe's 1,000 epochs
    result = suggestion.suggest(data_config, source, method="align_uniform", max_seconds=1000)
    assert result.get("optim.milestones") == [77.5, 85.0, 92.5]  # the recipe: 155, 170, 185 of 200


def test_the_yaml_is_the_tree_with_its_reasons(images, monkeypatch, tmp_path):
    fix_step_time(0.01, monkeypatch)
    data_config, source = images
    result = suggestion.suggest(data_config, source, method="swav")
    text = result.to_yaml()
    path = tmp_path / "my.yaml"
    path.write_text(text)
    loaded, expected = config.load(path), config.from_dict(result.tree)
    loaded.output = ""
    assert config.to_dict(loaded) == config.to_dict(expected)
    for key, reason in result.reasons.items():
        name = key.rpartition(".")[2]
        assert re.search(rf"^ *{name}: .* # {re.escape(reason)}$", text, re.MULTILINE)


def test_what_cannot_be_learned_from_is_refused(monkeypatch):
    fix_step_time(0.01, monkeypatch)
    few = open_object(RNG.integers(0, 256, (15, 8, 8, 3)).astype(np.uint8))
    unlabeled = open_object(RNG.integers(0, 256, (30, 8, 8, 3)).astype(np.uint8))
    with pytest.raises(ValueError) as error:
        suggestion.suggest(DataConfig(source="object:data"), few)
    assert str(error.value) == (
        "data.root: data has 15 images, which is too few to learn from; give 16 or more, better "
        "thousands"
    )
    with pytest.raises(ValueError, match="method supcon needs labels"):
        suggestion.suggest(DataConfig(source="object:data"), unlabeled, method="supcon")


def test_the_measured_time_is_that_of_a_real_step():
    data_config = DataConfig(source="digits")
    source = open_source(data_config, "train")
    start = time.monotonic()
    result = suggestion.suggest(data_config, source, max_seconds=1)
    elapsed = time.monotonic() - start
    assert 0 < result.expected_seconds / result.get("epochs") < 1297 * elapsed
