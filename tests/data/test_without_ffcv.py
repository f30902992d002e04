"""The loader of threads works without FFCV and without any program on the PATH, such as a compiler.

`test_packaging.py` does the same with the built wheel, in a process of its own.
"""

import sys
from pathlib import Path

import pytest
import tiny
import torch
from betons import write_images

from ssl_pretrain.checkpoint.folder import newest_checkpoint
from ssl_pretrain.checkpoint.tensor_files import read_checkpoint
from ssl_pretrain.data.beton.__main__ import main as beton_main
from ssl_pretrain.data.native import ffcv
from ssl_pretrain.data.tar.__main__ import main as shards_main
from ssl_pretrain.train import main


@pytest.fixture(autouse=True)
def _without_ffcv_and_programs(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ffcv", None)  # an import fails, and no package is found
    monkeypatch.setenv("PATH", str(tmp_path / "no programs"))


@pytest.fixture
def config(tmp_path) -> Path:
    """Write a configuration, and 50 JPEGs as a folder, as a .beton and as tar shards."""
    images = write_images(tmp_path / "images")
    assert beton_main(["write", str(images), str(tmp_path / "train.beton"), "--workers", "1"]) == 0
    command = ["write", str(images), str(tmp_path / "shards"), "--images-per-shard", "20"]
    assert shards_main(command) == 0
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny.YAML.replace("data: {", f"data: {{cache_dir: {tmp_path / 'cache'}, "))
    return path


def train(config: Path, name: str, root: str, *overrides: str) -> dict[str, torch.Tensor]:
    """Train for two epochs of two steps, and return the tensors of the checkpoint."""
    output = config.parent / name
    arguments = [str(config), f"data.root={config.parent / root}", f"output={output}", "epochs=2"]
    assert main([*arguments, *overrides]) == 0
    return read_checkpoint(newest_checkpoint(output))[1]


def test_threads_end_with_the_weights_of_the_folder_loader(config, capsys):
    with pytest.raises(ValueError, match="FFCV is not installed"):
        ffcv.load_library()
    expected = train(config, "processes", "images", "data.loader=folder")
    reasons = {
        "images": "data.loader is set to threads",
        "train.beton": f"{config.parent / 'train.beton'} is a .beton",
        "shards": f"{config.parent / 'shards'}/train-000000.tar ... train-000002.tar "
        "are tar shards",
    }
    for root, reason in reasons.items():
        capsys.readouterr()
        is_folder = root == "images"
        options = ["data.loader=threads"] if is_folder else []
        tensors = train(config, f"threads_{root}", root, "data.num_workers=2", *options)
        assert f"\ndata.loader: threads: {reason}\n" in capsys.readouterr().err
        assert tensors.keys() == expected.keys()
        differing = [name for name in expected if not torch.equal(tensors[name], expected[name])]
        assert differing == [], root
