"""Data sets whose images cannot have `data.channels` are refused when opened or written."""

import io

import numpy as np
import pytest
import tifffile
from betons import write_images
from format_files import (
    GRAY_TRAIN,
    TRAIN,
    cifar10_files,
    cifar100_files,
    stl10_files,
    write_files,
    write_idx,
)
from loaders import build_loader, digests
from PIL import Image
from reading import error_of

from ssl_pretrain.data.beton import __main__ as beton_command
from ssl_pretrain.data.pixels import to_gray
from ssl_pretrain.data.readers import choose_reader_kind
from ssl_pretrain.data.source_report import check_images, open_with_own_channels
from ssl_pretrain.data.sources import DataConfig, open_source
from ssl_pretrain.data.tar import __main__ as tar_command
from ssl_pretrain.views.recipe import Crop, ViewsConfig

BANDS = np.random.default_rng(0).integers(0, 4096, (6, 20, 18, 13), dtype=np.uint16)


@pytest.fixture
def open_train(tmp_path):
    def open_train(root="", **options):
        options = {"cache_dir": str(tmp_path / "cache")} | options
        return open_source(DataConfig(root=str(root), **options), "train")

    return open_train


def wrong_channels(name, found, expected) -> str:
    plural = "s" if found > 1 else ""
    return (
        f"{name} has {found} channel{plural}, and data.channels is {expected}; set data.channels="
        f"{found} if all images have that many"
    )


def write_bands(folder, compress=False):
    for number, image in enumerate(BANDS):
        path = folder / "ab"[number % 2] / f"{number}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        options = {"compression": "zlib"} if compress else {}
        tifffile.imwrite(path, image, photometric="minisblack", planarconfig="contig", **options)
    return folder


@pytest.fixture(scope="module")
def beton(tmp_path_factory):
    folder = tmp_path_factory.mktemp("beton")
    images = write_images(folder / "images", 12)
    assert beton_command.main(["write", str(images), str(folder / "a.beton"), "--workers=1"]) == 0
    return folder / "a.beton"


class TestOpening:
    def test_the_digits(self, open_train):
        assert error_of(open_train, source="digits", channels=2) == wrong_channels(
            "data.source: digits", 1, 2
        )
        gray, color = (open_train(source="digits", channels=count).read(0) for count in (1, 3))
        np.testing.assert_array_equal(np.repeat(gray, 3, axis=2), color)

    @pytest.mark.parametrize(
        ("name", "folder", "files"),
        [
            ("cifar10", "cifar-10-batches-py", cifar10_files),
            ("cifar100", "cifar-100-python", cifar100_files),
            ("stl10", "stl10_binary", stl10_files),
        ],
    )
    def test_the_published_data_sets(self, name, folder, files, tmp_path, open_train):
        # Without a root it would be downloaded.
        assert error_of(open_train, source=name, channels=4) == wrong_channels(
            f"data.source: {name}", 3, 4
        )
        root = write_files(tmp_path / folder, files())
        gray, color = (open_train(root, channels=count).read(5) for count in (1, 3))
        np.testing.assert_array_equal(gray, to_gray(color))
        message = error_of(open_train, root, channels=4)
        assert message.endswith(
            "has 3 channels, and data.channels is 4; set data.channels=3 if all images have that "
            "many"
        )
        assert message.startswith(f"data.root: {root}")

    def test_idx_before_it_is_unpacked(self, tmp_path, open_train):
        root = write_idx(tmp_path / "idx")
        path = root / "train-images-idx3-ubyte.gz"
        assert error_of(open_train, root, channels=2) == wrong_channels(f"data.root: {path}", 1, 2)
        assert not (tmp_path / "cache").exists()
        np.testing.assert_array_equal(open_train(root, channels=1).read(7)[..., 0], GRAY_TRAIN[7])

    def test_arrays(self, tmp_path, open_train):
        np.save(tmp_path / "images.npy", TRAIN)
        path = tmp_path / "images.npy"
        assert error_of(open_train, path, channels=4) == wrong_channels(
            f"data.root: {path}, of the shape (48, 12, 12, 3),", 3, 4
        )
        np.testing.assert_array_equal(open_train(path, channels=1).read(3), to_gray(TRAIN[3]))

    def test_a_beton(self, beton, open_train):
        assert error_of(open_train, beton, channels=4) == wrong_channels(
            f"data.root: {beton}", 3, 4
        )


def test_files_are_refused_before_the_first_step(tmp_path, open_train):
    root = write_bands(tmp_path / "images")
    assert error_of(check_images, open_train(root)) == wrong_channels(str(root), 13, 3)
    config, source = open_with_own_channels(DataConfig(root=str(root), cache_dir=str(tmp_path)))
    assert config.channels == source.num_channels == source.read(0).shape[2] == 13


def test_images_of_which_none_is_readable_are_refused(tmp_path, open_train):
    (tmp_path / "images" / "train").mkdir(parents=True)
    path = tmp_path / "images" / "train" / "pictures.npy"
    np.save(path, TRAIN)
    assert error_of(check_images, open_train(tmp_path / "images")) == (
        f"data.root: 1 of 1 images that were tried in {path.parent} cannot be read; the first is "
        f"{path}: its shape is (48, 12, 12, 3); save one image as (height, width), "
        "(height, width, channels) or (channels, height, width); an array of many images is given "
        "as data.root=FILE"
    )


def test_alpha_is_a_fourth_channel_on_request_and_composited_otherwise(tmp_path, open_train):
    (tmp_path / "images").mkdir()
    for number in range(3):
        pixels = (BANDS[number, ..., :4] // 16).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    source = open_train(tmp_path / "images", channels=4)
    check_images(source)
    np.testing.assert_array_equal(source.read(2), pixels)
    check_images(open_train(tmp_path / "images"))
    config = DataConfig(root=str(tmp_path / "images"), cache_dir=str(tmp_path))
    assert open_with_own_channels(config)[0].channels == 3
    assert error_of(check_images, open_train(tmp_path / "images", channels=2)) == wrong_channels(
        str(tmp_path / "images"), 4, 2
    )


class TestABetonReadInGray:
    def test_threads_and_processes_cut_the_luma_of_its_pixels(self, beton, open_train):
        gray, color = open_train(beton, channels=1), open_train(beton)
        np.testing.assert_array_equal(gray.read(5), to_gray(color.read(5)))
        views = ViewsConfig(crops={"global": Crop(count=2, size=16)}, mean=[0.5], std=[0.5])
        kind, _ = choose_reader_kind(DataConfig(channels=1), gray)
        assert kind == "threads"
        assert digests(build_loader(gray, views, kind), 0, 2) == digests(
            build_loader(gray, views), 0, 2
        )

    def test_ffcvs_decoder_is_refused(self, beton, open_train):
        source = open_train(beton, channels=1)
        assert error_of(choose_reader_kind, DataConfig(loader="ffcv", channels=1), source) == (
            "data.loader: ffcv decodes images of 3 channels, and data.channels is 1; set "
            "data.loader=threads"
        )


class TestWriting:
    @pytest.mark.parametrize("kind", ["files", "array"])
    def test_a_beton_holds_rgb(self, kind, tmp_path, capsys):
        if kind == "files":
            root, name = write_bands(tmp_path / "images"), str(tmp_path / "images")
        else:
            root = tmp_path / "images.npy"
            np.save(root, BANDS)
            name = f"data.root: {root}, of the shape (6, 20, 18, 13),"
        assert beton_command.main(["write", str(root), str(tmp_path / "a.beton")]) == 2
        assert capsys.readouterr().err == (
            f"error: {name} has 13 channels, and a .beton holds RGB; python -m "
            "ssl_pretrain.data.tar write keeps all channels in tar shards\n"
        )

    def test_shards_keep_the_bytes_of_files(self, tmp_path, open_train):
        root = write_bands(tmp_path / "images", compress=True)
        np.save(root / "a" / "x.npy", BANDS[0])
        for name in ("npy", "tif"):  # a folder has either of them
            folder = tmp_path / f"only_{name}"
            for path in sorted(root.rglob(f"*.{name}")):
                (folder / path.parent.name).mkdir(parents=True, exist_ok=True)
                path.rename(folder / path.parent.name / path.name)
            assert tar_command.main(["write", str(folder), str(tmp_path / f"{name}_shards")]) == 0
            source = open_train(folder, channels=13)
            shards = open_train(tmp_path / f"{name}_shards", channels=13)
            copies = tmp_path / f"{name}_copies"
            assert tar_command.main(["write", str(tmp_path / f"{name}_shards"), str(copies)]) == 0
            for other in (shards, open_train(copies, channels=13)):
                assert len(other) == len(source)
                for index in range(len(source)):
                    assert other.read_bytes(index) == source.read_bytes(index)
                    np.testing.assert_array_equal(other.read(index), source.read(index))

    def test_shards_keep_the_values_of_arrays(self, tmp_path, open_train):
        np.savez(tmp_path / "images.npz", images=BANDS)
        root = tmp_path / "images.npz"
        assert tar_command.main(["write", str(root), str(tmp_path / "shards")]) == 0
        shards = open_train(tmp_path / "shards", channels=13)
        for index, image in enumerate(BANDS):
            stored = np.load(io.BytesIO(shards.read_bytes(index)))
            assert stored.dtype == np.uint16
            np.testing.assert_array_equal(stored, image)
