"""The inspection counts, names bad files, and suggests a configuration that loads."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from known_time import fix_step_time
from PIL import Image

from ssl_pretrain import config
from ssl_pretrain.data.source_report import measure_images
from ssl_pretrain.data.sources import DataConfig, open_source
from ssl_pretrain.planning import inspect
from ssl_pretrain.system import program


@pytest.fixture(autouse=True)
def _temporary_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # listings are cached below it


@pytest.fixture(autouse=True)
def _known_step_time(monkeypatch):
    fix_step_time(0.01, monkeypatch)


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
            f"# data: training {root}/train: 8 images, 2 classes (a, b); validation none "
            f"(data.val: {root} has no folder or list for validation,"
        ),
        "# images per class: min 2, median 4, max 6",
        "#           2  b",
        "#           6  a",
        "# read 8 of 8 images\n",
        "#   width   min 30, median 33, max 37 pixels",
        "#   height  min 20, median 20, max 20 pixels",
        "#   modes   L 8",
        (
            "#   mean    0.5000, 0.5000, 0.5000 (red, green, blue, in [0, 1]; each image has "
            "equal weight)"
        ),
        (
            "#   std     0.5000, 0.5000, 0.5000 (red, green, blue, in [0, 1]; each image has "
            "equal weight)"
        ),
        "#   bad     0",
    ):
        assert line in output


def test_bad_files_are_named(root, capsys):
    (root / "train" / "a" / "3.png").write_bytes(b"")
    assert inspect.main([str(root)]) == 1
    output = capsys.readouterr().out
    assert f"#   bad     1\n#     {root}/train/a/3.png: the file is empty\n" in output


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


def test_a_written_suggestion_loads_and_the_next_command_is_printed(tmp_path, capsys):
    for index in range(20):
        (tmp_path / "data").mkdir(exist_ok=True)
        Image.new("RGB", (40, 30), (index, 0, 0)).save(tmp_path / "data" / f"{index}.png")
    path = tmp_path / "my.yaml"
    arguments = [str(tmp_path / "data"), "--method", "dino", "--write", str(path)]
    assert inspect.main(arguments) == 0
    assert capsys.readouterr().out.endswith(
        f"{path}: a configuration with a reason on each line that was chosen\n"
        "expected: about 3 min of training on this machine\n"
        f"next: {program.command('pretrain')} {path}\n"
    )
    run_config = config.load(path)
    assert run_config.method.name == "dino" and run_config.data.root == str(tmp_path / "data")
    assert inspect.main(arguments) == 2
    assert capsys.readouterr().err == (
        f"error: --write: {path} exists; give another name, or --force to overwrite it\n"
    )
    assert inspect.main([*arguments, "--force"]) == 0


def test_the_output_without_write_is_a_yaml_that_loads(tmp_path, capsys):
    for index in range(20):
        (tmp_path / "data" / "#").mkdir(exist_ok=True, parents=True)
        path = tmp_path / "data" / "#" / f"a: {index}\nb: c.png"
        Image.new("RGB", (40, 30), (index, 0, 0)).save(path)
    path.write_bytes(b"")
    assert inspect.main([str(tmp_path / "data")]) == 1
    output = capsys.readouterr().out
    (tmp_path / "my.yaml").write_text(output)
    assert config.load(tmp_path / "my.yaml").data.root == str(tmp_path / "data")
    assert "\n#   bad     1\n" in output


def test_too_few_images_get_a_description_and_no_configuration(root, capsys):
    assert inspect.main([str(root)]) == 0
    assert capsys.readouterr().err.endswith(
        f"no configuration is suggested: data.root: {root}/train has 8 images, which is too few to "
        "learn from; give 16 or more, better thousands\n"
    )


def test_a_missing_folder_is_reported(tmp_path, capsys):
    assert inspect.main([str(tmp_path / "absent")]) == 2
    assert capsys.readouterr().err.startswith(
        f"error: data.root: {tmp_path}/absent does not exist;"
    )


@pytest.mark.full
def test_help_shows_options_and_examples():
    command = [sys.executable, "-m", "ssl_pretrain.planning.inspect"]
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
        "python -m ssl_pretrain.planning.inspect /data/imagenet",
        "Exit status: 0 on success,",
    ):
        assert text in result.stdout


def write_gray_arrays(path: Path, dtype: str, scale: float) -> Path:
    values = np.random.default_rng(0).random((40, 28, 28)) * scale
    np.savez(path, x_train=values.astype(dtype), y_train=np.arange(40) % 4)
    return path


def suggested_keys(text: str, *names: str) -> dict[str, str]:
    """Return the suggested values by key, each with its comment."""
    lines = [line.strip().split(": ", 1) for line in text.splitlines() if ": " in line]
    return {key: value for key, value in lines if key in names}


def test_gray_arrays_get_no_colors_and_are_evaluated_whole(tmp_path, capsys):
    path = write_gray_arrays(tmp_path / "gray.npz", "uint8", 250)
    assert inspect.main([str(path)]) == 0
    text = capsys.readouterr().out
    assert f"# data: training {path}[x_train]: 40 images, 4 classes (0, 1, 2, ...); " in text
    assert "#   modes   L 40\n" in text
    names = ("hue", "saturation", "grayscale", "crop_ratio", "size", "root")
    assert suggested_keys(text, *names) == {
        "hue": "0.0    # the images are gray",
        "saturation": "0.0    # the images are gray",
        "grayscale": "0.0    # the images are gray",
        "crop_ratio": "1.0    # small images are evaluated whole",
        "size": "32",
        "root": f'"{path}"',
    }


@pytest.mark.parametrize(("dtype", "mode"), [("uint16", "I;16"), ("float32", "float32")])
def test_arrays_of_wide_values_get_a_range(dtype, mode, tmp_path, capsys):
    path = write_gray_arrays(tmp_path / "wide.npz", dtype, 3000)
    assert inspect.main([str(path), "--label-column", "none"]) == 0
    text = capsys.readouterr().out
    assert f"#   modes   {mode} 40\n" in text
    assert "measured again with the range suggested below" in text
    suggested = suggested_keys(text, "range", "mean", "label_column")
    low, high = json.loads(suggested["range"].split("#")[0])
    assert 0 <= low < 10 and 2990 < high <= 3000
    mean = json.loads(suggested["mean"].split("#")[0])
    assert mean == pytest.approx([0.5] * 3, abs=0.01)
    assert suggested["label_column"] == '"none"'


def test_photos_are_evaluated_by_their_center(tmp_path, capsys):
    for number in range(20):
        noise = np.random.default_rng(number).integers(0, 256, (200, 200, 3)).astype(np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{number}.png")
    assert inspect.main([str(tmp_path)]) == 0
    suggested = suggested_keys(capsys.readouterr().out, "crop_ratio")
    assert suggested["crop_ratio"] == "0.875    # the center, as usual for photos"
