"""The inspection counts channels, and --channels and --range are checked."""

import numpy as np
import pytest
import tifffile
from known_time import fix_step_time
from PIL import Image

from ssl_pretrain.planning import inspect

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _temporary_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # listings are cached below it
    fix_step_time(0.01, monkeypatch)


def save(folder, modes):
    """Write one image per mode: a Pillow mode with 8 bits, or a number of bands."""
    folder.mkdir()
    for number, mode in enumerate(modes):
        shape = (20, 20, mode if isinstance(mode, int) else {"L": 1, "RGB": 3, "RGBA": 4}[mode])
        values = RNG.integers(1, 256, shape, dtype=np.uint8)
        if isinstance(mode, int):
            path = folder / f"{number:02d}.tif"
            tifffile.imwrite(path, values, photometric="minisblack", planarconfig="contig")
        else:
            Image.fromarray(values.squeeze()).save(folder / f"{number:02d}.png")
    return folder


def output_of(capsys, *arguments):
    status = inspect.main([str(argument) for argument in arguments])
    return status, capsys.readouterr().out


def test_other_channels_than_those_of_the_views_are_counted(tmp_path, capsys):
    root = save(tmp_path / "mixed", ["RGB"] * 20 + ["L"] * 3 + ["RGBA"] * 2 + [4])
    status, output = output_of(capsys, root)
    assert status == 1
    assert (
        "#   channels 3\n"
        "#           3 of 26 images have 1 channel, gray, which is repeated\n"
        "#           2 of 26 images have 4 channels, the last one alpha, which is composited on "
        "black\n"
        "#           1 of 26 images have 4 channels, which cannot become 3, so they are "
        "unreadable\n"
    ) in output
    assert (
        f"#   bad     1\n#     {root}/25.tif has 4 channels, and data.channels is 3; set "
        "data.channels=4 if all images have that many\n"
    ) in output
    assert "channels:" not in output


def test_the_channels_of_most_files_are_proposed(tmp_path, capsys):
    root = save(tmp_path / "bands", [4] * 20 + ["RGBA"] * 2 + ["RGB"])
    status, output = output_of(capsys, root)
    assert status == 1
    assert (
        "#   channels 4\n"
        "#           1 of 23 images have 3 channels, which cannot become 4, so they are "
        "unreadable\n"
    ) in output
    assert "\n  channels: 4    # the channels of the images\n" in output
    for operation in ("saturation", "hue", "grayscale"):
        assert f"\n      {operation}: 0.0    # the images have 4 channels\n" in output


def test_gray_on_request(tmp_path, capsys):
    root = save(tmp_path / "color", ["RGB"] * 16 + ["L"] * 4)
    status, output = output_of(capsys, root, "--channels", 1)
    assert status == 0
    assert (
        "#   channels 1\n#           16 of 20 images have 3 channels, color, which becomes gray\n"
    ) in output
    assert "\n  channels: 1    # the channels of the images\n" in output


def test_a_range_per_channel_tells_the_number_of_channels(tmp_path, capsys):
    (tmp_path / "wide").mkdir()
    for number in range(16):
        values = RNG.integers(0, 4096, (20, 20, 2), dtype=np.uint16)
        np.save(tmp_path / "wide" / f"{number:02d}.npy", values)
    status, output = output_of(capsys, tmp_path / "wide", "--range", 0, 4095, 100, 2000)
    assert status == 0
    assert "\n  channels: 2    # the channels of the images\n" in output
    assert "\n  range: [0.0, 4095.0, 100.0, 2000.0]    #" in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--channels", "33"],
            "argument --channels: '33' is out of range; give a whole number >= 1 and <= 32.",
        ),
        (
            ["--channels", "two"],
            "argument --channels: 'two' is not a whole number; give one >= 1 and <= 32.",
        ),
        (
            ["--channels", "4", "--range", "0", "1", "0", "1"],
            "error: data.range: [0.0, 1.0, 0.0, 1.0] must be two numbers, the lower one first, "
            "such as [0, 4095], or two per channel (8)\n",
        ),
        (
            ["--range", "0", "1", "2"],
            "error: data.range: [0.0, 1.0, 2.0] must be two numbers, the lower one first, such as "
            "[0, 4095], or two per channel (6)\n",
        ),
        (
            ["--channels", "4"],
            " has 2 channels, and data.channels is 4; set data.channels=2 if all images have that "
            "many\n",
        ),
    ],
)
def test_wrong_options_are_explained(options, message, tmp_path, capsys):
    root = save(tmp_path / "bands", [2] * 16)
    try:
        status = inspect.main([str(root), *options])
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert message in capsys.readouterr().err
