"""Images of several bands and 16 bits in tar shards, their checks before a run, and captions."""

import io

import numpy as np
import pytest
import tifffile
from PIL import Image
from reading import texts_of
from tars import JPEG, make_tar, open_shards

from ssl_pretrain.data.images import UnreadableImage
from ssl_pretrain.data.pixels import WrongChannels
from ssl_pretrain.data.source_report import check_images
from ssl_pretrain.data.tar.tar_writer import ShardSize, write_shards

VALUES = np.random.default_rng(0).integers(0, 4000, (6, 9, 4), np.uint16)


def npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def tiff(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, values, photometric="minisblack", planarconfig="contig")
    return file.getvalue()


def png_16_bits(low: int, high: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.linspace(low, high, 80).astype(np.uint16).reshape(8, 10)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(("suffix", "encode"), [("npy", npy), ("tif", tiff)])
def test_bands_of_16_bits_are_read_in_their_range(suffix, encode, tmp_path):
    path = make_tar(tmp_path / "a.tar", [(f"{k}.{suffix}", encode(VALUES)) for k in range(3)])
    source = open_shards(path, channels=4, range=[0, 4000])
    header = source.header(1)
    assert (header.width, header.height, header.num_channels) == (9, 6, 4)
    pixels = source.read(1)
    assert (pixels.shape, pixels.dtype) == ((6, 9, 4), np.uint8)
    np.testing.assert_allclose(pixels, VALUES / 4000 * 255, atol=0.51)
    check_images(source)


@pytest.mark.parametrize(
    ("content", "suffix", "channels", "found"),
    [(JPEG, "jpg", 4, 3), (npy(VALUES), "npy", 3, 4), (tiff(VALUES), "tif", 13, 4)],
)
def test_another_number_of_channels_is_refused(content, suffix, channels, found, tmp_path):
    path = make_tar(tmp_path / "a.tar", [(f"{k}.{suffix}", content) for k in range(3)])
    source = open_shards(path, channels=channels)
    refusals = [
        (WrongChannels, str(path), lambda: check_images(source)),
        (UnreadableImage, f"{path}, sample 0", lambda: source.read(0)),
    ]
    for kind, name, refuse in refusals:
        with pytest.raises(kind) as error:
            refuse()
        assert str(error.value) == (
            f"{name} has {found} channels, and data.channels is {channels}; set "
            f"data.channels={found} if all images have that many"
        )


def test_values_that_need_a_range_are_refused_before_a_run(tmp_path):
    path = make_tar(tmp_path / "a.tar", [(f"{k}.png", png_16_bits(0, 900)) for k in range(3)])
    with pytest.raises(ValueError) as error:
        check_images(open_shards(path))
    assert str(error.value) == (
        f"data.range: not set, and the 16-bit images of {path} use values from 0 to 900 (3 were "
        "measured), which would leave 4 of 256 gray levels; give the values of black and white, "
        "such as data.range=[0,900] (python -m ssl_pretrain.planning.inspect measures them), or "
        "data.range=[0,65535] to keep the full range"
    )


def test_captions_are_kept_in_the_index_and_in_copies(tmp_path):
    members = [
        *[("1.jpg", JPEG), ("1.txt", "a café\n".encode())],
        *[("2.jpg", JPEG), ("2.json", b'{"label": 0, "caption": "a dog"}')],
        *[("3.jpg", JPEG), ("3.json", b'{"text": "a {cat}"}')],
        *[("4.jpg", JPEG), ("4.cls", b"0")],
    ]
    source = open_shards(make_tar(tmp_path / "a" / "a.tar", members))
    expected = [[["a café"]], [["a dog"]], [["a {cat}"]], [[]]]
    assert source.num_texts == 1 and texts_of(source) == expected
    assert texts_of(source.take(np.array([2, 0]))) == [expected[2], expected[0]]
    list(write_shards(source, tmp_path / "b", "train", ShardSize(num_images=3)))
    assert texts_of(open_shards(tmp_path / "b")) == expected
    without = open_shards(make_tar(tmp_path / "c" / "a.tar", [("1.jpg", JPEG)]))
    assert without.num_texts == 0 and without.texts(0) == []
