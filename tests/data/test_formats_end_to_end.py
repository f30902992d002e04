"""Each format is pretrained on, resumed and evaluated with one YAML and the key `data.root`."""

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
    write_npy,
    write_npz,
    write_parquet,
    write_saved,
    write_tar,
)

from ssl_pretrain.checkpoint.folder import newest_checkpoint
from ssl_pretrain.checkpoint.tensor_files import read_checkpoint
from ssl_pretrain.eval import knn, runs
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


@pytest.mark.parametrize("kind", ROOTS)
def test_a_run_is_resumed_and_evaluated(kind, tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(
        tiny.YAML.replace("num_workers: 0", f"num_workers: 0, cache_dir: {tmp_path / 'cache'}")
    )
    root = ROOTS[kind](tmp_path / "images")
    overrides = [f"data.root={root}", "epochs=2", "data.num_workers=1"]
    if kind == "Fashion-MNIST":
        overrides += ["data.subset=48"]

    def run(name, *arguments):
        output = tmp_path / name
        assert main([str(path), *overrides, f"output={output}", *arguments]) == 0
        return read_checkpoint(newest_checkpoint(output))[1]

    uninterrupted = run("uninterrupted")
    run("stopped", "--stop-after", "1")
    resumed = run("stopped")
    assert all(torch.equal(resumed[name], value) for name, value in uninterrupted.items())
    evaluated = runs.load_run(tmp_path / "stopped", device="cpu")
    knn.evaluate(evaluated, shift_distances=[], rows=["pretrained"])
    rows = json.loads((tmp_path / "stopped" / "eval" / "knn.json").read_text())["rows"]
    chance = 10 if kind == "Fashion-MNIST" else 100 / 3
    assert rows[0]["metrics"]["clean"] > chance
