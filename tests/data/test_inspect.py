"""The inspection counts, names bad files, and suggests a configuration that loads."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssl_pretrain import config
from ssl_pretrain.data import inspect
from ssl_pretrain.data.source_report import ImageStatistics, measure_images
from ssl_pretrain.data.sources import DataConfig, open_source
from ssl_pretrain.data.suggestion import suggest_config


@pytest.fixture(autouse=True)
def _temporary_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # listings are cached below it


@pytest.fixture
def root(tmp_path) -> Path:
    """Write 6 images of class a and 2 of b, half of them black and half white."""
    for index in range(8):
        path = tmp_path / "data" / "train" / ("a" if index < 6 else "b") / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (30 + index, 20), 255 * (index % 2)).save(path)
    return tmp_path / "data"


def test_counts_sizes_modes_and_colors_are_printed(root, capsys):
    assert inspect.main([str(root)]) == 0
    output = capsys.readouterr().out
    for line in (
        (
            f"data: training {root}/train: 8 images, 2 classes (a, b); validation none "
            f"(data.val: {root} has no folder or list for validation,"
        ),
        "images per class: min 2, median 4, max 6",
        "          2  b",
        "          6  a",
        "read 8 of 8 images\n",
        "  width   min 30, median 33, max 37 pixels",
        "  height  min 20, median 20, max 20 pixels",
        "  modes   L 8",
        (
            "  mean    0.5000, 0.5000, 0.5000 (red, green, blue, in [0, 1]; each image has "
            "equal weight)"
        ),
        (
            "  std     0.5000, 0.5000, 0.5000 (red, green, blue, in [0, 1]; each image has "
            "equal weight)"
        ),
        "  bad     0",
    ):
        assert line in output


def test_bad_files_are_named(root, capsys):
    (root / "train" / "a" / "3.png").write_bytes(b"")
    assert inspect.main([str(root)]) == 1
    assert f"  bad     1\n    {root}/train/a/3.png: the file is empty\n" in capsys.readouterr().out


def test_the_size_of_the_sample_is_printed(root, capsys):
    inspect.main([str(root), "--sample", "3"])
    assert (
        "read 3 of 8 images (evenly spaced in the list; --sample 0 reads all)"
        in capsys.readouterr().out
    )


def test_each_image_has_the_same_weight(tmp_path):
    for name, size, value in (("1.png", (1, 1), 255), ("2.png", (50, 50), 0)):
        (tmp_path / "data").mkdir(exist_ok=True)
        Image.new("RGB", size, (value, 0, 51)).save(tmp_path / "data" / name)
    statistics = measure_images(open_source(DataConfig(root=str(tmp_path / "data")), "train"))
    np.testing.assert_allclose(statistics.mean, [0.5, 0, 0.2], atol=1e-6)
    np.testing.assert_allclose(statistics.std, [0.5, 0, 0], atol=1e-4)


def test_long_lists_of_classes_are_shortened(tmp_path, capsys):
    for index in range(30):
        path = tmp_path / "data" / f"class_{index:02d}" / "1.png"
        path.parent.mkdir(parents=True)
        Image.new("L", (4, 4)).save(path)
    inspect.main([str(tmp_path / "data")])
    assert "        ...  10 classes (--all-classes lists them)\n" in capsys.readouterr().out
    inspect.main([str(tmp_path / "data"), "--all-classes"])
    output = capsys.readouterr().out
    assert all(f"  class_{index:02d}\n" in output for index in range(30))


# Maps (number of images, their shorter side) to (size of the views, batch size, epochs).
SUGGESTIONS = {
    (1297, 8): (16, 256, 800),
    (50_000, 32): (32, 512, 800),
    (100_000, 64): (64, 512, 400),
    (1_281_167, 375): (224, 1024, 100),
    (3, 300): (224, 1, 800),
}


@pytest.mark.parametrize(("num_images", "side"), SUGGESTIONS)
def test_the_suggested_config_loads_and_gives_its_reasons(num_images, side, tmp_path):
    class SourceOfLength:
        def __len__(self):
            return num_images

    statistics = ImageStatistics(sizes=[(side, 2 * side)])
    path = tmp_path / "my.yaml"
    path.write_text(suggest_config(DataConfig(root='/data/a "b"'), SourceOfLength(), statistics))
    run_config = config.load(path)
    assert (run_config.method.name, run_config.data.root) == ("simclr", '/data/a "b"')
    assert (
        run_config.views.crops["global"].size,
        run_config.global_batch_size,
        run_config.epochs,
    ) == SUGGESTIONS[num_images, side]
    for key in ("size", "base_lr", "global_batch_size", "epochs", "stem"):  # each with its reason
        assert re.search(rf"^ *{key}: \S+ +# \S", path.read_text(), re.MULTILINE)


def test_a_missing_folder_is_reported(tmp_path, capsys):
    assert inspect.main([str(tmp_path / "absent")]) == 2
    assert capsys.readouterr().err.startswith(f"data.root: {tmp_path}/absent does not exist;")


def test_help_shows_options_and_examples():
    command = [sys.executable, "-m", "ssl_pretrain.data.inspect"]
    result = subprocess.run(
        [*command, "--help"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=True,
    )
    for text in (
        "--sample",
        "--all-classes",
        "python -m ssl_pretrain.data.inspect /data/imagenet",
        "Exit status: 0 on success,",
    ):
        assert text in result.stdout
