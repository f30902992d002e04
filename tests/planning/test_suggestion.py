"""Suggested configurations suit every method, few images, gray images and a CPU."""

import re
import time
from collections import Counter
from functools import partial

import numpy as np
import pytest
import timm
import torch
from known_time import fix_step_time

from ssl_pretrain import config, methods
from ssl_pretrain.data.python_objects import open_object
from ssl_pretrain.data.sources import DataConfig, open_source
from ssl_pretrain.optim import optimizers
from ssl_pretrain.planning import run_length, run_settings, step_time, suggestion
from ssl_pretrain.system import user_objects
from ssl_pretrain.views.batch import Batch

RNG = np.random.default_rng(0)
METHODS = sorted(set(methods.names()) - {"simcse"})  # those that take images
SHAPES = {"32 pixels": (100, 32, 32, 3), "224 pixels": (100, 224, 224, 3), "gray": (100, 28, 28)}


@pytest.fixture
def images(request):
    """A data set of 100 labeled images and its configuration."""
    shape = SHAPES[getattr(request, "param", "32 pixels")]
    source = open_object((RNG.integers(0, 256, shape).astype(np.uint8), np.arange(100) % 5))
    with user_objects.provide({"data": {"train": source, "val": None}.get}):
        yield DataConfig(source="object:data"), source


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
    for method in ["simclr", "dino", "cpc", "moco"] if is_quick else METHODS:
        result = suggestion.suggest(data_config, source, method=method)
        assert result.get("method.name") == method
        assert result.get("global_batch_size") == 16
        assert {"epochs", "views.mean", "global_batch_size"} <= result.reasons.keys()


@pytest.mark.full
@pytest.mark.parametrize("images", SHAPES, indirect=True)
@pytest.mark.parametrize("method", METHODS)
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
    for seconds in (1e-4, 0.01, 0.1, 0.46, 5.0):
        fix_step_time(seconds, monkeypatch)
        result = suggestion.suggest(data_config, source)
        assert 1 <= result.get("epochs") <= 800
        assert result.expected_seconds == result.get("epochs") * len(source) * seconds <= 3600
        assert result.get("epochs") / result.get("online.knn_every_epochs") <= 10
    assert result.get("backbone.name") == "test_resnet"  # the others would take even longer


def test_a_network_of_the_callers_is_kept(images, monkeypatch):
    fix_step_time(5.0, monkeypatch)
    data_config, source = images
    for name in ("resnet34", "convnext_atto"):
        result = suggestion.suggest(data_config, source, backbone=name)
        assert result.get("backbone.name") == name


def test_settings_of_the_callers_are_timed_and_named_as_such(images, monkeypatch):
    data_config, source = images
    sizes = []

    def measure_step(config, batch):
        sizes.append(config.views.crops["global"].size)
        return 0.01

    fix_step_time(0.01, monkeypatch)
    monkeypatch.setattr(step_time, "measure_step", measure_step)
    settings = {"views": {"crops": {"global": {"size": 16}}}, "global_batch_size": 8}
    result = suggestion.suggest(data_config, source, settings=settings)
    assert set(sizes) == {16}
    assert result.get("views.crops.global.size") == 16
    assert result.get("global_batch_size") == 8
    assert result.reasons["global_batch_size"] == "as given"


def test_a_rectangle_of_the_callers_is_kept_with_patches_of_its_shorter_side(images, monkeypatch):
    fix_step_time(0.01, monkeypatch)
    settings = {"views": {"crops": {"global": {"size": [32, 48]}}}}
    result = suggestion.suggest(*images, method="cpc", settings=settings)
    assert result.build().views.crops["global"].size == [32, 48]
    assert (result.get("method.patch_size"), result.get("method.stride")) == (8, 4)


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


def test_a_set_that_does_not_fit_in_the_time_is_cut(monkeypatch):
    many = open_object(RNG.integers(0, 256, (3000, 8, 8, 3)).astype(np.uint8))
    data_config = DataConfig(source="object:data")
    with user_objects.provide({"data": {"train": many, "val": None}.get}):
        fix_step_time(2.0, monkeypatch)
        result = suggestion.suggest(data_config, many)
        assert result.get("data.subset") == 450 and result.get("epochs") == 1
        assert result.expected_seconds == 450 * 2.0 == 900
        assert result.get("global_batch_size") == 64  # instead of 256, which are few steps of 450
        assert result.reasons["data.subset"] == (
            "one epoch of all 3,000 images takes about 1 h 40 min on this machine; data.subset=0 "
            "uses them all"
        )
        assert len(open_source(result.build().data, "train")) == 450
        for wish in ({"epochs": 1}, {"keep_all_images": True}):
            result = suggestion.suggest(data_config, many, **wish)
            assert result.get("data.subset") is None and result.get("epochs") == 1
            assert result.expected_seconds == 3000 * 2.0


def test_a_subset_of_the_callers_is_kept_however_long_it_takes(monkeypatch, tmp_path):
    fix_step_time(2.0, monkeypatch)
    overrides = {"data": {"subset": 1000}}
    run = run_settings.choose(tmp_path, None, None, {"source": "digits"}, overrides)
    assert run.data.subset == 1000 and run.epochs == 1


def test_the_largest_network_that_is_fast_enough_is_chosen(images, monkeypatch):
    fix_step_time(0.0, monkeypatch)
    data_config, source = images
    measured = []

    def measure_step(config, batch):
        network = (config.backbone.name, config.backbone.stem)
        measured.append(network)
        return seconds[network]

    monkeypatch.setattr(step_time, "measure_step", measure_step)
    large, medium, small = run_length.CPU_NETWORKS
    limit = 900 / 20 / len(source)  # seconds per image of 20 epochs in a quarter of an hour
    for expected, seconds, trials in (
        (large, {small: limit / 100, large: limit}, [small, large]),
        (medium, {small: limit / 50, large: 2 * limit, medium: limit}, [small, large, medium]),
        (medium, {small: limit / 20, medium: limit}, [small, medium]),  # the large is hopeless
        (small, {small: limit / 10, medium: 1.1 * limit}, [small, medium]),
        (small, {small: 2 * limit}, [small]),
    ):
        measured.clear()
        result = suggestion.suggest(data_config, source)
        assert (result.get("backbone.name"), result.get("backbone.stem")) == expected
        assert measured == trials
        assert result.expected_seconds == pytest.approx(
            result.get("epochs") * len(source) * seconds[expected]
        )


@pytest.mark.parametrize(
    ("shape", "network", "advice"),
    [
        ((20, 80, 80, 3), "resnet18", "timm:a1_in1k backbone.stem=no_pool"),
        ((20, 80, 80, 3), "convnext_atto", "timm:d2_in1k"),
        ((20, 80, 80, 3), "convnext_atto_rms", None),  # timm has no weights of it
        ((20, 80, 80), "test_resnet", None),
        ((20, 32, 32, 3), "test_resnet", None),
        ((2000, 80, 80, 3), "test_resnet", None),
    ],
    ids=["small stem", "no stem", "no weights", "gray", "small images", "many"],
)
def test_published_weights_are_recommended_for_few_photos(shape, network, advice, monkeypatch):
    fix_step_time(1e-4, monkeypatch)
    pixels = np.zeros(shape, np.uint8)
    pixels[::2] = 255
    if len(shape) == 4:
        pixels[..., 0] = 128
    source = open_object(pixels)
    with user_objects.provide({"data": {"train": source, "val": None}.get}):
        result = suggestion.suggest(DataConfig(source="object:data"), source, backbone=network)
    reason = result.reasons.get("backbone.init")
    if advice is None:
        assert reason is None
    else:
        assert reason == (
            "with fewer than 2,000 photos, published weights usually serve better: "
            f"backbone.init={advice}"
        )
        tag = advice.split()[0].removeprefix("timm:")
        assert timm.is_model_pretrained(f"{result.get('backbone.name')}.{tag}")


def test_weights_are_only_recommended_if_they_fit_the_network(monkeypatch):
    """The recipe of I-JEPA for small images has a narrow ViT without a class token."""
    fix_step_time(1e-4, monkeypatch)
    pixels = RNG.integers(0, 256, (20, 80, 80, 3)).astype(np.uint8)
    source = open_object(pixels)
    with user_objects.provide({"data": {"train": source, "val": None}.get}):
        data_config = DataConfig(source="object:data")
        for name, is_recommended in (("ijepa", False), ("simclr", True)):
            reasons = suggestion.suggest(data_config, source, method=name).reasons
            assert ("backbone.init" in reasons) == is_recommended
        result = suggestion.suggest(
            data_config, source, method="simclr", backbone="vit_tiny_patch16_224"
        )
        assert "timm:augreg_in21k_ft_in1k" in result.reasons["backbone.init"]


def test_few_large_photos_are_decoded(monkeypatch):
    num_read = Counter()

    class Photos:
        def __len__(self):
            return 3000

        def __getitem__(self, index):
            num_read["images"] += 1
            return np.full((1000, 1200, 3), index % 256, np.uint8)

    source = open_object(Photos())
    with user_objects.provide({"data": {"train": source, "val": None}.get}):
        num_read.clear()
        suggestion.suggest(DataConfig(source="object:data"), source, backbone="test_resnet")
    assert 32 <= num_read["images"] <= 150


def test_the_time_to_compile_code_is_not_taken_for_that_of_reading(monkeypatch):
    data_config = DataConfig(source="digits")
    source = open_source(data_config, "train")
    config = suggestion.suggest(data_config, source, backbone="test_resnet", epochs=1).build()
    clock = 0.0

    class SlowStart(step_time.Loader):
        def iterate_from(self, step):
            nonlocal clock
            for number, batch in enumerate(super().iterate_from(step)):
                seconds = 30.0 if number == 0 else 0.25
                clock += seconds
                self.reading_seconds = clock
                yield batch

    monkeypatch.setattr(step_time, "Loader", SlowStart)
    monkeypatch.setattr(step_time.time, "perf_counter", lambda: clock)
    reading = step_time.measure_reading(config, source)
    assert reading.worker_seconds == pytest.approx(0.25 / 16)
    assert len(reading.batch) == 4 * 16


def test_the_measured_time_includes_the_optimizer_and_no_slow_steps(monkeypatch):
    data_config = DataConfig(source="digits")
    source = open_source(data_config, "train")
    result = suggestion.suggest(data_config, source, backbone="test_resnet", epochs=1)
    config = result.build()
    batch = step_time.measure_reading(config, source).batch
    step_if_finite, step_seconds = optimizers.step_if_finite, iter([9, 1, 1, 0.1])
    clock = 0.0

    def take_time(*arguments):
        nonlocal clock
        clock += next(step_seconds)
        return step_if_finite(*arguments)

    monkeypatch.setattr(optimizers, "step_if_finite", take_time)
    monkeypatch.setattr(step_time.time, "perf_counter", lambda: clock)
    state = torch.get_rng_state()
    assert step_time.measure_step(config, batch) == pytest.approx(0.1 / 64)
    assert torch.equal(torch.get_rng_state(), state)


def test_reading_and_training_share_the_cores_of_a_cpu():
    batch = Batch([], torch.zeros(0), torch.zeros(0))
    reading = partial(step_time.Reading, batch, worker_seconds=8.0, color_seconds=1.0, num_cores=4)
    assert reading(num_workers=0).seconds_per_image(10.0) == 19.0
    assert reading(num_workers=4).seconds_per_image(10.0) == 13.0
    assert reading(num_workers=4, is_on_cpu=False).seconds_per_image(10.0) == 11.0
    assert reading(num_workers=2, is_on_cpu=False).seconds_per_image(1.0) == 4.0


def test_the_measured_time_is_that_of_a_real_step():
    data_config = DataConfig(source="digits")
    source = open_source(data_config, "train")
    start = time.monotonic()
    result = suggestion.suggest(data_config, source, max_seconds=1)
    elapsed = time.monotonic() - start
    assert 0 < result.expected_seconds / result.get("epochs") < 1297 * elapsed
