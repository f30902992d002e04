"""Each format is pretrained on, resumed and evaluated with one YAML and the key `data.root`.

For images of other channels or bits, `inspect --write` makes the YAML.
"""

import json
from pathlib import Path

import pytest
import tiny
import torch
from format_files import (
    cifar10_files,
    cifar100_files,
    stl10_files,
    write_idx,
    write_image_files,
    write_npy,
    write_npz,
    write_parquet,
    write_saved,
    write_tar,
)
from known_time import fix_step_time
from suites import quick_and_full

from ssl_pretrain import config
from ssl_pretrain.checkpoint.folder import newest_checkpoint
from ssl_pretrain.checkpoint.tensor_files import read_checkpoint
from ssl_pretrain.data.tar import __main__ as tar_command
from ssl_pretrain.eval import knn, runs
from ssl_pretrain.planning import inspect
from ssl_pretrain.train import main

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


def _parquet(folder):
    return write_parquet(
        folder, pytest.importorskip("datasets", reason="the extra `data` is not installed")
    )


def _saved(folder):
    return write_saved(
        folder, pytest.importorskip("datasets", reason="the extra `data` is not installed")
    )


def _fashion_mnist(folder):
    if not FASHION_MNIST.exists():
        pytest.skip("Debian's package dataset-fashion-mnist is not installed")
    return FASHION_MNIST


ROOTS = {
    "npz": lambda folder: write_npz(folder.with_suffix(".npz"), compress=True),
    "folder of npy": write_npy,
    "IDX": write_idx,
    "Fashion-MNIST": _fashion_mnist,
    "CIFAR-10": lambda folder: write_tar(
        folder / "cifar-10-python.tar.gz", "cifar-10-batches-py", cifar10_files()
    ),
    "CIFAR-100": lambda folder: write_tar(
        folder / "cifar-100-python.tar.gz", "cifar-100-python", cifar100_files()
    ),
    "STL-10": lambda folder: write_tar(
        folder / "stl10_binary.tar.gz", "stl10_binary", stl10_files()
    ),
    "Parquet": _parquet,
    "saved data set": _saved,
}


def _shards(folder):
    """Write the 16-bit images as tar shards, and return their folder."""
    images = write_image_files(folder / "images", ".png", 1, 4095)
    for split in ("train", "val"):
        arguments = ["write", str(images), str(folder / "shards"), "--split", split]
        assert tar_command.main(arguments) == 0
    return folder / "shards"


# Images for which `inspect` finds the number of channels and the range.
FOLDERS = {
    "13 bands": lambda folder: write_image_files(folder, ".tif", 13, 4000),
    "16 bits": lambda folder: write_image_files(
        write_image_files(folder, ".png", 1, 4095), ".tif", 1, 4095
    ),
    "npy": lambda folder: write_image_files(folder, ".npy", 5, 1, "float32"),
    "two pages": lambda folder: write_image_files(folder, ".pages.tif", 2, 900),
    "shards of 16 bits": _shards,
}
CHANNELS = {"13 bands": 13, "npy": 5, "two pages": 2}


KINDS = quick_and_full(["folder of npy", "STL-10"], ROOTS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_resumed_and_evaluated(kind, tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(
        tiny.YAML.replace("num_workers: 0", f"num_workers: 0, cache_dir: {tmp_path / 'cache'}")
    )
    overrides = [f"data.root={ROOTS[kind](tmp_path / 'images')}", "data.num_workers=1"]
    if kind == "Fashion-MNIST":
        overrides += ["data.subset=48"]
    accuracy = _train_and_evaluate(path, overrides, tmp_path)
    assert accuracy > (10 if kind == "Fashion-MNIST" else 100 / 3)


@pytest.mark.parametrize("kind", quick_and_full(["13 bands", "16 bits"], FOLDERS))
def test_inspect_writes_the_yaml_of_a_run(kind, tmp_path, monkeypatch, capsys):
    fix_step_time(0.01, monkeypatch)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # listings are cached below it
    root, path = FOLDERS[kind](tmp_path / "images"), tmp_path / "my.yaml"
    assert inspect.main([str(root), "--write", str(path)]) == 0
    suggested = config.load(path)
    channels = CHANNELS.get(kind, 3)
    assert suggested.data.channels == len(suggested.views.mean) == channels
    assert len(suggested.data.range) == (2 * channels if channels != 3 else 2)
    assert all(
        crop.hue == crop.saturation == crop.grayscale == 0
        for crop in suggested.views.crops.values()
    )
    assert all(0.2 < value < 0.8 for value in suggested.views.mean)
    assert suggested.evaluation.crop_ratio == 0.875
    overrides = ["backbone.name=test_resnet", "method.projector_dims=[16,8]", "log.wandb=off"]
    overrides += ["global_batch_size=24", "parallel.threads=1", "online.knn_every_epochs=0"]
    overrides += ["checkpoint.every_epochs=0", "data.num_workers=0", "optim.warmup_epochs=0.5"]
    assert _train_and_evaluate(path, overrides, tmp_path) > 100 / 3


def _train_and_evaluate(path, overrides, folder):
    """Train two epochs, once without an interruption. Return the accuracy of k-NN in %."""

    def run(name, *arguments):
        output = folder / name
        assert main([str(path), *overrides, "epochs=2", f"output={output}", *arguments]) == 0
        return read_checkpoint(newest_checkpoint(output))[1]

    uninterrupted = run("uninterrupted")
    run("stopped", "--stop-after", "1")
    resumed = run("stopped")
    assert all(torch.equal(resumed[name], value) for name, value in uninterrupted.items())
    evaluated = runs.load_run(folder / "stopped", device="cpu")
    knn.evaluate(evaluated, shift_distances=[], rows=["pretrained"])
    rows = json.loads((folder / "stopped" / "eval" / "knn.json").read_text())["rows"]
    return rows[0]["metrics"]["clean"]
