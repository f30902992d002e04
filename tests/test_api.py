"""The Python API: images, methods and backbones of one's own, resumed bit for bit and evaluated."""

import contextlib
import doctest
import functools
import io
import os
import sys

import numpy as np
import pytest
import tifffile
import tiny
import torch
from conftest import run_ranks
from PIL import Image
from suites import quick_and_full
from torch import nn
from torch.utils.data import Dataset

import ssl_pretrain
from ssl_pretrain import api
from ssl_pretrain import config as config_module
from ssl_pretrain.checkpoint.folder import newest_checkpoint
from ssl_pretrain.checkpoint.tensor_files import read_checkpoint
from ssl_pretrain.eval import embed as embed_command

LABELS = np.arange(60) % 3
COLORS = np.array([[120, 40, 0], [0, 120, 40], [40, 0, 120]])[LABELS]
NOISE = np.random.default_rng(0).integers(0, 120, (60, 20, 20, 3))
IMAGES = (NOISE + COLORS[:, None, None]).astype(np.uint8)


class Pairs(Dataset):
    def __len__(self):
        return len(IMAGES)

    def __getitem__(self, index):
        return Image.fromarray(IMAGES[index]), int(LABELS[index])


def hugging_face():
    datasets = pytest.importorskip("datasets", reason="the extra `data` is not installed")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y", "z"])}
    )
    columns = {"image": list(map(Image.fromarray, IMAGES)), "label": LABELS.tolist()}
    return datasets.Dataset.from_dict(columns, features=features)


DATA = {"array": lambda: (IMAGES, LABELS), "torch Dataset": Pairs, "Hugging Face": hugging_face}


class Pooled(nn.Module):
    """A network of the user's, which is not one of timm."""

    def __init__(self, width=12):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, width, 3, 2), nn.BatchNorm2d(width), nn.ReLU())

    def forward(self, images):
        return self.layers(images).mean((2, 3))


@pytest.fixture
def config(tmp_path):
    return tiny.write_config(tmp_path / "config")


def weights_of(run):
    _, tensors = read_checkpoint(newest_checkpoint(run.path))
    return tensors


def stop_after(steps, monkeypatch, *arguments, **settings):
    """Call `pretrain` and request a stop after some steps."""
    with monkeypatch.context() as patch:
        stopping = functools.partial(api.train_and_report)
        patch.setattr(
            api,
            "train_and_report",
            lambda config, device, stop_after, preempt_at: stopping(
                config, device, stop_after=steps, preempt_at=None
            ),
        )
        with pytest.raises(KeyboardInterrupt, match="the same call resumes it"):
            ssl_pretrain.pretrain(*arguments, **settings)


@pytest.mark.parametrize("kind", quick_and_full([*DATA][:1], DATA))
def test_python_images_are_resumed_bit_for_bit_and_evaluated(kind, config, tmp_path, monkeypatch):
    data = DATA[kind]()
    settings = {"config": config, "epochs": 2, "val": (IMAGES[:9], LABELS[:9])}
    whole = ssl_pretrain.pretrain(data, output=tmp_path / "whole", **settings)
    stop_after(3, monkeypatch, data, output=tmp_path / "stopped", **settings)
    assert not ssl_pretrain.Run(tmp_path / "stopped").is_finished
    resumed = ssl_pretrain.pretrain(DATA[kind](), output=tmp_path / "stopped", **settings)
    assert whole.is_finished and resumed.is_finished
    expected, actual = weights_of(whole), weights_of(resumed)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    evaluation = resumed.evaluate("knn", k=3)
    assert evaluation.table["pretrained"]["clean"] == 100
    assert evaluation.table["raw pixels"]["clean"] == 100
    assert "pretrained" in str(evaluation) and evaluation.path.is_file()
    assert resumed.report().read_text().startswith("<!doctype html>")


def test_changed_images_are_not_resumed(config, tmp_path, monkeypatch):
    settings = {"config": config, "epochs": 2, "output": tmp_path / "run"}
    stop_after(2, monkeypatch, IMAGES, **settings)
    with pytest.raises(ValueError, match="the training images are not those that"):
        ssl_pretrain.pretrain(255 - IMAGES, **settings)


def test_a_module_of_ones_own_is_trained_in_a_copy_and_loaded_again(config, tmp_path, monkeypatch):
    torch.manual_seed(0)
    network = Pooled()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    settings = {
        "backbone": network,
        "config": config,
        "epochs": 2,
        "backbone__stem": "imagenet",
        "val": (IMAGES[:9], LABELS[:9]),
    }
    data = (IMAGES, LABELS)
    whole = ssl_pretrain.pretrain(data, output=tmp_path / "whole", **settings)
    stop_after(3, monkeypatch, data, output=tmp_path / "stopped", **settings)
    resumed = ssl_pretrain.pretrain(data, output=tmp_path / "stopped", **settings)
    expected, actual = weights_of(whole), weights_of(resumed)
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    backbone, transform = ssl_pretrain.load_backbone(whole)
    assert isinstance(backbone.model, Pooled)
    assert not torch.equal(backbone.model.layers[0].weight, network.layers[0].weight)
    assert backbone(transform(IMAGES[0])[None]).shape == (1, 12)
    assert whole.evaluate("linear").table["pretrained"]["all labels"] == 100
    with pytest.raises(ValueError) as error:
        ssl_pretrain.load_backbone(tmp_path / "whole")
    assert str(error.value) == (
        "backbone.name: 'object:Pooled' was an object of the program that started this run; call "
        "ssl_pretrain there, or put it into a module and give its function as "
        "package.module:function"
    )


METHOD = '''
"""Align two views and spread the batch, in a module of the user's."""

from dataclasses import dataclass

import torch

from ssl_pretrain.methods.base import LossOutput, Method, MethodConfig
from ssl_pretrain.models.components import mlp
from ssl_pretrain.schema import setting


@dataclass
class Config(MethodConfig):
    name: str = "my_methods.aligned"
    dim: int = setting(8, "Width of the embeddings.")

    def build(self, backbone):
        return Aligned(self, backbone)


class Aligned(Method):
    def __init__(self, config, backbone):
        super().__init__(config, backbone)
        self.projector = mlp(backbone.feature_dim, config.dim, last_batch_norm=True)

    def forward(self, batch):
        z_a, z_b = (self.projector(self.backbone(view)) for view in self.two_views(batch))
        return {"z_a": z_a, "z_b": z_b}

    def loss(self, embeddings, targets):
        return LossOutput((embeddings["z_a"] - embeddings["z_b"]).square().mean(), {})
'''


@pytest.fixture
def user_package(tmp_path, monkeypatch):
    """The current folder, with a package of the user's."""
    folder = tmp_path / "project"
    (folder / "my_methods").mkdir(parents=True)
    (folder / "my_methods" / "__init__.py").touch()
    (folder / "my_methods" / "aligned.py").write_text(METHOD)
    (folder / "my_network.py").write_text(
        "from torch import nn\n"
        "def pooled(width, image_size):\n"
        "    return nn.Sequential(nn.Conv2d(3, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
        "def number(): return 3\n"
        "def broken(): raise KeyError('width')\n"
    )
    monkeypatch.chdir(folder)
    yield folder
    for name in [name for name in sys.modules if name.startswith("my_")]:
        del sys.modules[name]
    if str(folder) in sys.path:
        sys.path.remove(str(folder))


def test_a_method_and_a_backbone_in_modules_of_ones_own_are_found_by_name(
    user_package, tmp_path, monkeypatch
):
    root = tiny.write_images(tmp_path / "images", images_per_class=20)
    tree = {
        "method": {"name": "my_methods.aligned", "dim": 6},
        "views": {"crops": {"global": {"count": 2, "size": 16}}},
        "online": {"knn_every_epochs": 0},
        "evaluation": {"crop_ratio": 1.0, "k": 3},
        "global_batch_size": 20,
        "log": {"wandb": "off"},
    }
    (user_package / "mine.yaml").write_text(str(tree))
    settings = {
        "config": "mine.yaml",
        "epochs": 2,
        "data__num_workers": 0,
        "backbone": "my_network:pooled",
        "backbone__args": {"width": 10},
    }
    whole = ssl_pretrain.pretrain(root, output=tmp_path / "whole", **settings)
    stop_after(3, monkeypatch, root, output=tmp_path / "stopped", **settings)
    resumed = ssl_pretrain.pretrain(root, output=tmp_path / "stopped", **settings)
    expected, actual = weights_of(whole), weights_of(resumed)
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    assert whole.config.method.name == "my_methods.aligned" and whole.config.method.dim == 6
    backbone, _ = ssl_pretrain.load_backbone(tmp_path / "whole")
    assert backbone.feature_dim == 10
    assert "pretrained" in resumed.evaluate("knn").table


BROKEN_METHODS = {
    "Config = 3": "has no class Config that extends ssl_pretrain.methods.base.MethodConfig; see "
    "CONTRIBUTING.md, `Add a method`",
    "class Config(MethodConfig): pass": ".Config is not a dataclass; put @dataclass above it",
    "@dataclass\nclass Config(MethodConfig): pass": ".Config has no method build(backbone) that "
    "returns the method; see CONTRIBUTING.md, `Add a method`",
    "raise OSError('no file')": "the import of my_broken fails: OSError: no file",
    "@dataclass\nclass Config(MethodConfig):\n    def build(self, backbone): return backbone": (
        "method.name: Config.build of my_broken returns a Backbone; return a "
        "ssl_pretrain.methods.base.Method"
    ),
    "class Mine(Method):\n    def forward(self, batch): return self.backbone(batch.views[0])\n"
    "@dataclass\nclass Config(MethodConfig):\n    def build(self, backbone): return Mine(self, "
    "backbone)": "method.name: forward of my_broken returns a Tensor; return a dict of tensors by "
    "name",
    "class Mine(Method):\n    def forward(self, batch): return {'z': self.backbone(batch.views[0])"
    "[0]}\n@dataclass\nclass Config(MethodConfig):\n    def build(self, backbone): return "
    "Mine(self, backbone)": "method.name: forward of my_broken returns 'z' with shape (96,) for 2 "
    "images; return tensors with one row per image",
}


@pytest.mark.parametrize("text", BROKEN_METHODS)
def test_a_method_that_breaks_the_contract_is_refused(text, user_package, config):
    (user_package / "my_broken.py").write_text(
        "from dataclasses import dataclass\n"
        f"from ssl_pretrain.methods.base import Method, MethodConfig\n{text}\n"
    )
    with pytest.raises(ValueError) as error:
        ssl_pretrain.pretrain(
            IMAGES,
            "my_broken",
            output=user_package / "run",
            val=None,
            backbone="test_resnet",
            views={"crops": {"global": {"count": 2, "size": 16}}},
            config=write_recipe(user_package),
        )
    assert BROKEN_METHODS[text] in str(error.value)


def write_recipe(folder):
    path = folder / "broken.yaml"
    path.write_text("{method: {name: my_broken}, global_batch_size: 20, epochs: 1}")
    return path


def test_a_backbone_that_breaks_the_contract_is_refused(user_package, config):
    for name, message in {
        "my_network:number": "backbone.name: my_network:number returns a int; return a "
        "torch.nn.Module that maps images (batch, 3, height, width) to features (batch, dim)",
        "my_network:broken": "backbone.name: my_network:broken fails: KeyError: 'width'",
        "my_network:absent": f"backbone.name: 'my_network:absent': {user_package}/my_network.py "
        "has no 'absent'; give the name of a function or class in it, as package.module:function",
    }.items():
        with pytest.raises(ValueError) as error:
            ssl_pretrain.pretrain(
                IMAGES,
                backbone=name,
                config=config,
                output=user_package / "run",
                backbone__stem="imagenet",
            )
        assert str(error.value) == message
    with pytest.raises(ValueError, match="for an image, but one vector is needed"):
        ssl_pretrain.pretrain(
            IMAGES,
            backbone=nn.Conv2d(3, 4, 3),
            config=config,
            output=user_package / "run",
            backbone__stem="imagenet",
        )


def test_embeddings_are_those_of_the_transform_and_the_backbone(config, tmp_path):
    run = ssl_pretrain.pretrain(
        IMAGES,
        config=config,
        epochs=1,
        output=tmp_path / "run",
        parallel__precision="float32",  # bfloat16 would depend on the size of the batch
    )
    backbone, transform = ssl_pretrain.load_backbone(run, device="cpu")
    with torch.inference_mode():
        expected = backbone(torch.stack([transform(image) for image in IMAGES[:5]])).numpy()
    for images in (IMAGES[:5], list(IMAGES[:5]), [Image.fromarray(image) for image in IMAGES[:5]]):
        assert np.allclose(ssl_pretrain.embed(backbone, images), expected, atol=1e-5)
    assert np.allclose(ssl_pretrain.embed(run, IMAGES[:5], batch_size=2), expected, atol=1e-5)
    with pytest.raises(ValueError, match="this backbone has no transform; give the one that"):
        ssl_pretrain.embed(Pooled(), IMAGES)


SETTINGS = {"backbone": "test_resnet", "epochs": 1, "global_batch_size": 4}
BANDS = np.random.default_rng(1).integers(0, 256, (16, 20, 20, 4), dtype=np.uint8)


def write_tiffs(folder, images):
    folder.mkdir()
    for index, image in enumerate(images):
        file = folder / f"{index:02d}.tif"
        tifffile.imwrite(file, image, photometric="minisblack", planarconfig=1)
    return folder


@pytest.mark.full
def test_an_array_of_four_channels_needs_no_setting(tmp_path):
    run = ssl_pretrain.pretrain(BANDS, output=tmp_path / "run", **SETTINGS)
    assert run.config.data.channels == 4
    backbone = run.backbone(device="cpu")
    view = backbone.transform(BANDS[0])
    assert view.shape[0] == 4
    channels_first = torch.from_numpy(BANDS).permute(0, 3, 1, 2)
    assert torch.equal(view, backbone.transform(channels_first[0]))
    features = ssl_pretrain.embed(run, BANDS)
    tiffs = write_tiffs(tmp_path / "tiffs", BANDS)
    for images in (channels_first, tiffs, sorted(tiffs.iterdir())):
        np.testing.assert_array_equal(ssl_pretrain.embed(run, images), features)
    message = " has 3 channels, and data.channels is 4; set data.channels=3 if all images have that"
    color = write_tiffs(tmp_path / "color", BANDS[..., :3])
    for work in (
        lambda: backbone.transform(BANDS[0, ..., :3]),
        lambda: ssl_pretrain.embed(run, BANDS[..., :3]),
        lambda: ssl_pretrain.embed(run, color),
    ):
        with pytest.raises(ValueError) as error:
            work()
        assert message in str(error.value)


@pytest.mark.full
def test_an_array_of_16_bits_needs_only_its_range(tmp_path):
    images = np.random.default_rng(2).integers(0, 4096, (16, 20, 20), dtype=np.uint16)
    run = ssl_pretrain.pretrain(images, output=tmp_path / "run", data__range=[0, 4095], **SETTINGS)
    transform = run.backbone(device="cpu").transform
    levels = np.rint(images * (255 / 4095)).astype(np.uint8)
    assert torch.equal(transform(images[0]), transform(levels[0]))
    features = ssl_pretrain.embed(run, levels)
    np.testing.assert_array_equal(ssl_pretrain.embed(run, images), features)
    tiffs = write_tiffs(tmp_path / "tiffs", images)
    np.testing.assert_array_equal(ssl_pretrain.embed(run, tiffs), features)
    file = tmp_path / "features.npz"
    embed_command.main([str(run.path), str(tiffs), str(file), "--device=cpu"])
    np.testing.assert_array_equal(np.load(file)["features"], features)


def test_the_metrics_of_a_killed_run_are_read_without_its_truncated_line(config, tmp_path):
    config.rename(tmp_path / "config.yaml")
    run = ssl_pretrain.Run(tmp_path)
    assert run.metrics == []
    lines = '{"step": 1, "loss": 4.0}\n{"step": 2, "loss": 3.5}\n{"step": 3, "lo'
    (tmp_path / "metrics.jsonl").write_text(lines)
    assert run.metrics == [{"step": 1, "loss": 4.0}, {"step": 2, "loss": 3.5}]


def test_weights_without_a_run_are_loaded_and_nothing_is_written(tmp_path, monkeypatch):
    import timm
    from safetensors.torch import save_file

    monkeypatch.chdir(tmp_path)
    model = timm.create_model("test_resnet", num_classes=0)
    save_file(model.state_dict(), "weights.safetensors")
    backbone, transform = ssl_pretrain.load_backbone("weights.safetensors", backbone="test_resnet")
    assert all(map(torch.equal, backbone.model.parameters(), model.parameters()))
    assert transform(IMAGES[0]).shape == (3, 160, 160)
    assert os.listdir() == ["weights.safetensors"]


def pretrain_on_a_rank(folder):
    with contextlib.redirect_stdout(io.StringIO()):
        run = ssl_pretrain.pretrain(
            (IMAGES, LABELS), backbone="test_resnet", epochs=1, output=folder
        )
    return config_module.to_yaml(run.config), run.is_finished


@pytest.mark.full
def test_ranks_of_torchrun_train_with_the_same_chosen_settings(tmp_path):
    outcomes = run_ranks(pretrain_on_a_rank, tmp_path / "run", world_size=2)
    assert outcomes[0] == outcomes[1] and outcomes[0][1]


@pytest.mark.full
def test_the_examples_of_the_docstrings_run(tmp_path):
    """They use the settings that are chosen for the built-in digits."""
    variables = {"ssl_pretrain": ssl_pretrain, "np": np, "folder": str(tmp_path / "run")}
    finder = doctest.DocTestFinder(recurse=False)
    for function in (
        api.pretrain,  # makes the run that the other examples use
        api.Run,
        api.Run.backbone,
        api.Run.evaluate,
        api.load_backbone,
        api.embed,
        api.list_methods,
    ):
        (test,) = finder.find(function, function.__name__, globs=variables)
        assert test.examples
        output = io.StringIO()
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
        assert runner.run(test, out=output.write, clear_globs=False).failed == 0, output.getvalue()
        variables |= test.globs


def test_the_package_imports_no_torch():
    script = "import sys, ssl_pretrain; dir(ssl_pretrain); assert 'torch' not in sys.modules"
    assert os.spawnl(os.P_WAIT, sys.executable, sys.executable, "-c", script) == 0
    assert ssl_pretrain.list_methods() == api.list_methods() and "dino" in api.list_methods()
    with pytest.raises(AttributeError, match="has no attribute 'train_and_report'"):
        assert ssl_pretrain.train_and_report
