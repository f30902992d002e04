"""Sources: the files of each split, their labels, the cached listing, and every error message."""

import os
import pickle
import shutil
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from reading import error_of
from sklearn.datasets import load_digits

from ssl_pretrain.data import listing, sources, zip_archive
from ssl_pretrain.data.beton import beton_file
from ssl_pretrain.data.image_source import require_labels
from ssl_pretrain.data.images import MAX_BYTES, UnreadableImage
from ssl_pretrain.data.source_report import check_images
from ssl_pretrain.data.sources import DataConfig, open_source


def write_images(root: Path, *names: str) -> Path:
    """Write a small image of a different color at each path below root."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 3), (number, 2 * number, 3 * number)).save(path)
    return root


def zip_folder(root: Path, compression: int = zipfile.ZIP_STORED) -> Path:
    path = root.parent / f"{root.name}.zip"
    with zipfile.ZipFile(path, "w", compression) as archive:
        for file in sorted(root.rglob("*"), reverse=True):
            archive.write(file, file.relative_to(root))
    return path


def paths_of(source) -> list[str]:
    return [os.path.relpath(source.name(index), source.files.root) for index in range(len(source))]


IMAGENET = ("train/n02/b.png", "train/n02/a.png", "train/n01/c.JPEG", "val/n02/d.png")


def test_each_folder_of_a_split_is_a_class(tmp_path, open_split):
    root = write_images(tmp_path / "data", *IMAGENET)
    train, val = open_split(root), open_split(root, "val")
    assert paths_of(train) == ["n01/c.JPEG", "n02/a.png", "n02/b.png"]
    assert train.labels.dtype == np.int64
    assert train.labels.tolist() == [0, 1, 1]
    assert [train.label(index) for index in range(3)] == [0, 1, 1]
    assert train.classes == val.classes == ["n01", "n02"]
    assert val.labels.tolist() == [1]  # val has no n01, so classes must be matched by name
    np.testing.assert_array_equal(train.read(2), np.zeros((3, 4, 3)))  # image number 0
    np.testing.assert_array_equal(train.read(1), np.broadcast_to([1, 2, 3], (3, 4, 3)))


def test_class_folders_beside_val_are_the_training_split(tmp_path, open_split):
    source = open_split(write_images(tmp_path / "data", "cat/1.png", "dog/2.png", "val/cat/3.png"))
    assert paths_of(source) == ["cat/1.png", "dog/2.png"]
    assert source.classes == ["cat", "dog"]


TREES = {
    "flat": "1.png 2.png",
    "mixed": "a/1.png a/b/2.png 3.png",
    "one folder": "only/1.png only/2.png",
}


@pytest.mark.parametrize("tree", TREES)
def test_other_trees_have_no_labels(tree, tmp_path, open_split):
    files = TREES[tree].split()
    source = open_split(write_images(tmp_path / "data", *files))
    assert paths_of(source) == sorted(files)
    assert source.labels.tolist() == [-1] * len(files)
    assert source.classes == []


def test_the_parent_of_the_class_folders_is_not_a_class(tmp_path, open_split):
    source = open_split(write_images(tmp_path / "data", "a/b/1.png", "a/c/2.png"))
    assert source.classes == ["b", "c"]
    assert source.labels.tolist() == [0, 1]


def test_a_data_set_may_lie_in_a_single_subfolder(tmp_path, open_split):
    root = write_images(tmp_path / "data", *(f"subfolder/{name}" for name in IMAGENET))
    assert open_split(root).classes == open_split(zip_folder(root)).classes == ["n01", "n02"]
    assert len(open_split(root, "val")) == len(open_split(zip_folder(root), "val")) == 1


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_equals_its_folder(compression, tmp_path, open_split):
    root = write_images(tmp_path / "data", *IMAGENET)
    path = zip_folder(root, compression)
    for split in ("train", "val"):
        folder, archive = open_split(root, split), open_split(path, split)
        assert archive.fingerprint == folder.fingerprint
        assert archive.labels.tolist() == folder.labels.tolist()
        for index in range(len(folder)):
            np.testing.assert_array_equal(archive.read(index), folder.read(index))
    assert archive.name(0) == str(tmp_path / "data.zip" / "val/n02/d.png")


def test_a_list_may_name_classes(tmp_path, open_split):
    root = write_images(tmp_path / "data", "x/1.png", "y/2.png", "z 3.png")
    (root / "all.csv").write_text('path,label\nx/1.png,dog\ny/2.png,cat\n\n"z 3.png",\n')
    source = open_split(root / "all.csv")
    assert paths_of(source) == ["x/1.png", "y/2.png", "z 3.png"]
    assert source.labels.tolist() == [1, 0, -1]
    assert source.classes == ["cat", "dog"]
    assert source.read(2).shape == (3, 4, 3)


def test_numeric_classes_of_lists_are_sorted_by_value(tmp_path, open_split):
    root = write_images(tmp_path / "data", "1.png", "2.png", "3.png")
    (root / "train.txt").write_text("3.png, 10\n1.png,2\n")
    (root / "test.txt").write_text("2.png,10\n")
    lists = {"train": "train.txt", "val": "test.txt"}
    train, val = open_split(root, "train", **lists), open_split(root, "val", **lists)
    assert train.classes == ["2", "10"]
    assert train.labels.tolist() == [1, 0]
    assert val.labels.tolist() == [1]
    assert open_split(root / "train.txt", "val", val="test.txt").labels.tolist() == [1]


def test_a_list_may_have_no_labels(tmp_path, open_split):
    write_images(tmp_path / "data", "1.png")
    (tmp_path / "data" / "list.txt").write_text("1.png\n")
    assert open_split(tmp_path / "data" / "list.txt").labels.tolist() == [-1]


def test_symlinks_are_followed_but_not_in_loops(tmp_path, open_split):
    root = write_images(tmp_path / "data", "cat/1.png")
    write_images(tmp_path / "elsewhere", "2.png", "3.png")
    (root / "dog").symlink_to(tmp_path / "elsewhere")
    (root / "cat" / "loop").symlink_to(root)
    (root / "cat" / "4.png").symlink_to(tmp_path / "elsewhere" / "2.png")
    paths = paths_of(open_split(root))
    assert {"cat/1.png", "cat/4.png", "dog/2.png", "dog/3.png"} <= set(paths)
    assert len(paths) < 20


def test_hidden_and_system_files_are_skipped(tmp_path, open_split):
    hidden = (".cache/3.png", "a/.4.png", "__MACOSX/a/5.png")
    root = write_images(tmp_path / "data", "a/1.png", "b/2.png", *hidden)
    (root / "a" / "notes.txt").write_text("not an image")
    assert paths_of(open_split(zip_folder(root))) == ["a/1.png", "b/2.png"]


def test_a_file_name_need_not_be_utf8(tmp_path, open_split):
    root = write_images(tmp_path / "data", "a.png")
    os.rename(root / "a.png", os.fsencode(root) + b"/\xff.png")
    source = open_split(root)
    assert source.read(0).shape == (3, 4, 3)
    assert len(source.fingerprint) == 16


def test_fingerprints_of_different_lists_differ(tmp_path, open_split):
    root = write_images(tmp_path / "data", *IMAGENET)
    before = open_split(root).fingerprint
    assert open_split(root).fingerprint == before
    write_images(root, "train/n01/e.png")
    assert open_split(root).fingerprint != before


def test_a_pickled_source_reads_the_same_pixels(tmp_path, open_split):
    source = open_split(zip_folder(write_images(tmp_path / "data", *IMAGENET)))
    first = source.read(0)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(source)).read(0), first)


def test_a_subset_is_the_same_in_every_run_and_does_not_apply_to_validation(tmp_path, open_split):
    names = [f"train/{label}/{number}.png" for label in "ab" for number in range(20)]
    root = write_images(tmp_path / "data", *names, "val/a/1.png", "val/a/2.png")
    train, subset = open_split(root), open_split(root, subset=7)
    paths, subset_paths = paths_of(train), paths_of(subset)
    assert len(set(subset_paths)) == len(subset) == 7
    assert subset_paths == sorted(subset_paths) == paths_of(open_split(root, subset=7))
    assert set(subset_paths) < set(paths_of(open_split(root, subset=8)))
    assert subset.labels.tolist() == [train.labels[paths.index(path)] for path in subset_paths]
    assert subset.fingerprint != train.fingerprint
    assert len(open_split(root, "val", subset=7)) == 2
    assert len(open_source(DataConfig("digits", subset=100), "train")) == 100


def test_the_splits_of_the_digits_are_disjoint_and_equal_scikit_learns_images():
    train, val = (open_source(DataConfig("digits"), split) for split in ("train", "val"))
    assert (len(train), len(val)) == (1297, 500)
    assert train.classes == [str(digit) for digit in range(10)]
    assert np.bincount(val.labels).tolist() == [50] * 10
    train_names, val_names = ({s.name(i) for i in range(len(s))} for s in (train, val))
    assert train_names.isdisjoint(val_names)
    assert train.fingerprint == open_source(DataConfig("digits"), "train").fingerprint
    assert train.fingerprint != val.fingerprint

    pixels = train.read(0)
    assert pixels.shape == (8, 8, 3)
    assert pixels.dtype == np.uint8
    digits, number = load_digits(), int(train.name(0).split("/")[1])
    np.testing.assert_array_equal(pixels[..., 1], np.rint(digits.images[number] * 255 / 16))
    assert train.label(0) == digits.target[number]


def test_a_zip_of_cifar10_has_balanced_splits(shared_data, open_split):
    root = shared_data("cifar10.zip")
    train, val = open_split(root, source="cifar10"), open_split(root, "val", source="cifar10")
    assert np.bincount(train.labels).tolist() == [5000] * 10
    assert np.bincount(val.labels).tolist() == [1000] * 10
    assert train.classes[:2] == ["airplane", "automobile"]
    assert train.read(49999).shape == (32, 32, 3)
    assert val.name(0).endswith("cifar10.zip/test/airplane/0000.jpg")


def test_a_zip_of_imagenet_has_one_class_per_folder(shared_data, open_split):
    source = open_split(shared_data("imagenet_sample.zip"))
    assert (len(source), len(source.classes)) == (600, 600)
    assert source.read(0).ndim == 3


def test_torchvisions_cifar10_is_packed_as_a_zip(tmp_path, monkeypatch, open_split):
    class CIFAR10:
        classes = ("airplane", "automobile")

        def __init__(self, root, train, download):
            self.data = np.full((4 if train else 2, 32, 32, 3), 7 if train else 8, np.uint8)
            self.targets = [0, 1, 1, 0][: len(self.data)]

    monkeypatch.setattr("torchvision.datasets.CIFAR10", CIFAR10)
    assert open_split("", source="cifar10").labels.tolist() == [0, 0, 1, 1]
    val = open_split("", "val", source="cifar10")
    assert val.labels.tolist() == [0, 1]
    assert (val.read(0) == 8).all()
    files = [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".npz"]
    assert [file.name for file in files] == ["cifar10.zip"]


class TestCache:
    """A cached listing is used until the files change."""

    @pytest.fixture
    def root(self, tmp_path, monkeypatch):
        monkeypatch.setattr(listing, "_SETTLED_NS", 0)
        return write_images(tmp_path / "data", "a/1.png", "b/2.png")

    @pytest.fixture
    def scans(self, monkeypatch):
        """Return a list that receives the root of each folder or zip that is scanned."""
        scans = []

        def record_calls(scan):
            return lambda root: scans.append(root) or scan(root)

        for module, name in ((listing, "scan_folder"), (zip_archive, "scan_zip")):
            monkeypatch.setattr(module, name, record_calls(getattr(module, name)))
        return scans

    def test_a_second_start_does_not_scan_the_folder(self, root, scans, open_split):
        first = open_split(root)
        second = open_split(root)
        assert len(scans) == 1
        assert paths_of(second) == paths_of(first)
        assert second.fingerprint == first.fingerprint

    @pytest.mark.parametrize("change", ["add", "add deep", "delete", "delete folder"])
    def test_a_changed_folder_is_scanned_again(self, change, root, scans, open_split):
        open_split(root)
        times = {path: path.stat().st_mtime_ns for path in (root, root / "a", root / "b")}
        time.sleep(0.05)  # longer than a tick of the file system's clock
        if change == "add":
            Image.new("L", (2, 2)).save(root / "b" / "3.png")
        elif change == "add deep":
            write_images(root / "b", "deep/3.png")
        elif change == "delete":
            (root / "b" / "2.png").unlink()
        else:
            (root / "b" / "2.png").unlink()
            (root / "b").rmdir()
        for path in times:
            if path.exists():
                os.utime(path, ns=(times[path], times[path]))  # as unpacking an archive does
        paths = paths_of(open_split(root))
        assert len(scans) == 2
        assert paths == sorted(os.path.relpath(path, root) for path in root.rglob("*.png"))

    def test_a_changed_zip_is_scanned_again(self, root, scans, open_split):
        path = zip_folder(root)
        open_split(path)
        open_split(path)
        assert len(scans) == 1
        write_images(root, "a/3.png")
        assert len(open_split(zip_folder(root))) == 3

    @pytest.mark.parametrize("damage", [b"", b"PK\3\4 no npz", None])
    def test_a_damaged_cache_is_replaced(self, damage, root, scans, tmp_path, open_split):
        expected = paths_of(open_split(root))
        (cache_file,) = (tmp_path / "cache").iterdir()
        content = cache_file.read_bytes()
        cache_file.write_bytes(content[: len(content) // 2] if damage is None else damage)
        for _ in range(2):  # the first call replaces the cache, and the second one uses it
            assert paths_of(open_split(root)) == expected
            assert len(scans) == 2
        assert list((tmp_path / "cache").iterdir()) == [cache_file]  # no temporary file is left

    def test_a_recently_changed_folder_is_not_cached(self, root, scans, monkeypatch, open_split):
        monkeypatch.setattr(listing, "_SETTLED_NS", 2_000_000_000)
        open_split(root)
        open_split(root)
        assert len(scans) == 2

    def test_a_cache_that_cannot_be_written_only_costs_time(self, root, tmp_path):
        (tmp_path / "file").write_text("not a folder")
        config = DataConfig(root=str(root), cache_dir=str(tmp_path / "file" / "cache"))
        assert len(open_source(config, "train")) == 2


class TestErrorMessages:
    def test_a_wrong_root_is_explained(self, tmp_path, open_split):
        assert error_of(open_split, "") == (
            "data.root: no path is set; give a folder, a .zip, a .beton, tar shards, a "
            ".parquet, an .npz, or a list of files (.csv, .tsv, .txt), as in "
            "data.root=/data/imagenet"
        )
        assert error_of(open_split, tmp_path / "absent") == (
            f"data.root: {tmp_path}/absent does not exist; "
            "give a folder, a .zip, a .beton, tar shards, a .parquet, an .npz, or a list of files "
            "(.csv, .tsv, .txt)"
        )
        (tmp_path / "a.rar").write_text("")
        assert error_of(open_split, tmp_path / "a.rar") == (
            f"data.root: {tmp_path}/a.rar is a file of an unsupported kind; "
            "give a folder, a .zip, a .beton, tar shards, a .parquet, an .npz, or a list of files "
            "(.csv, .tsv, .txt)"
        )
        assert error_of(open_split, tmp_path, source="cifar") == (
            "data.source: 'cifar' is not known. Did you mean 'cifar10'? Choose one of: digits, "
            "cifar10, cifar100, stl10, folder, huggingface, texts, wordnet, or give "
            "package.module:function"
        )

    def test_an_empty_data_set_is_explained(self, tmp_path, open_split):
        (tmp_path / "empty").mkdir()
        assert error_of(open_split, tmp_path / "empty") == (
            f"data.root: {tmp_path}/empty contains no image that Pillow can decode, at any depth; "
            "give the folder of your images"
        )
        (tmp_path / "empty.csv").write_text("path,label\n")
        assert error_of(open_split, tmp_path / "empty.csv").startswith(
            f"data.root: {tmp_path}/empty.csv contains no image"
        )

    def test_a_wrong_split_is_explained(self, tmp_path, open_split):
        root = write_images(tmp_path / "data", "a/1.png", "b/2.png")
        assert error_of(open_split, root, "val") == (
            f"data.val: {root} has no folder or list for validation, such as val/; "
            "it has a/, b/; name the one that contains the validation images, "
            "or leave out evaluations that need them"
        )
        assert error_of(open_split, root, train="trian") == (
            f"data.train: {root} has no folder or list 'trian'; "
            "it has a/, b/; name the one that contains the training images"
        )
        assert error_of(open_split, root, "test") == (
            "split: 'test' is not a split of a data set; choose one of: train, val"
        )
        assert error_of(open_split, root, source="cifar10") == (
            f"data.root: {root} has no folder 'train'; "
            "give a folder or a .zip that contains train/<class>/ and test/<class>/"
        )
        assert error_of(open_split, root, subset=3) == (
            "data.subset: 3 is not a possible number of training images; give a number from "
            "1 to 2, or 0 for all"
        )

    def test_a_class_that_only_validation_has_is_explained(self, tmp_path, open_split):
        names = ("train/a/1.png", "train/b/1.png", "val/c/1.png", "val/a/1.png")
        root = write_images(tmp_path / "data", *names)
        assert error_of(open_split, root, "val") == (
            f"data.val: {root}/val has the class 'c', but the training split has only a, b; "
            "check data.train and data.val"
        )

    def test_a_wrong_list_is_explained(self, tmp_path, open_split):
        (tmp_path / "list.csv").write_text("missing.png\n")
        assert error_of(open_split, tmp_path / "list.csv") == (
            f"data.root: {tmp_path}/list.csv begins with 'missing.png', "
            f"which is not in {tmp_path}; write paths relative to the list's folder"
        )
        (tmp_path / "list.txt").write_bytes(b"\xff\xfe\0")
        assert error_of(open_split, tmp_path / "list.txt").startswith(
            f"data.root: {tmp_path}/list.txt is not a list of paths: "
        )

    def test_an_unreadable_zip_is_explained(self, tmp_path, open_split):
        (tmp_path / "bad.zip").write_bytes(b"no zip")
        assert error_of(open_split, tmp_path / "bad.zip") == (
            f"data.root: {tmp_path}/bad.zip cannot be read as a zip: File is not a zip file"
        )
        root = write_images(tmp_path / "data", "a/1.png")
        path = zip_folder(root, zipfile.ZIP_LZMA)
        assert error_of(open_split, path) == (
            f"data.root: {path} contains a/1.png, which is encrypted or compressed by an "
            "unsupported method; pack the images again with `zip -r -0`"
        )

    def test_a_download_without_a_network_is_explained(self, monkeypatch, open_split):
        def raise_error(*_arguments, **_options):
            raise OSError("no route to host")

        monkeypatch.setattr("torchvision.datasets.CIFAR10", raise_error)
        assert error_of(open_split, "", source="cifar10") == (
            "data.root: CIFAR-10 cannot be loaded with torchvision (no route to host); "
            "without a network, set data.root to a folder or a .zip "
            "with train/<class>/ and test/<class>/"
        )

    def test_missing_labels_are_explained(self, tmp_path, open_split):
        source = open_split(write_images(tmp_path / "data", "1.png", "2.png"))
        assert error_of(require_labels, source, "k-NN") == (
            f"data.root: k-NN needs labels, and {tmp_path}/data has no labeled images; "
            "put the images in one folder per class (<class>/<file>), "
            "or list them in a CSV as path,label"
        )
        (tmp_path / "data" / "list.csv").write_text("1.png,x\n2.png\n")
        source = open_split(tmp_path / "data" / "list.csv")
        message = f"has 1 of 2 labeled images (the first without a label: {tmp_path}/data/2.png);"
        assert message in error_of(require_labels, source, "k-NN")
        require_labels(open_source(DataConfig("digits"), "train"), "k-NN")

    def test_unreadable_images_are_named(self, tmp_path, open_split):
        root = write_images(tmp_path / "data", "1.png", "2.png", "3.png")
        source = open_split(root)
        (root / "1.png").write_bytes(b"text")
        (root / "2.png").unlink()
        messages = ["1.png: not a known image format", "2.png: No such file or directory"]
        for index, message in enumerate(messages):
            with pytest.raises(UnreadableImage) as error:
                source.read(index)
            assert str(error.value) == f"{root}/{message}"

    def test_an_image_of_a_zip_that_was_replaced_is_named(self, tmp_path, open_split):
        path = zip_folder(write_images(tmp_path / "data", "1.png", "2.png"))
        source = open_split(path)
        path.write_bytes(b"\0" * path.stat().st_size)
        with pytest.raises(UnreadableImage) as error:
            source.read(0)
        assert str(error.value) == f"{path}/1.png: the zip is damaged or was replaced"


class TestBetonBesideFolders:
    """A .beton is read instead of a folder, unless data.loader is folder."""

    @pytest.fixture
    def root(self, tmp_path, monkeypatch):
        monkeypatch.setattr(beton_file, "read", lambda path: path)
        monkeypatch.setattr(sources, "Beton", lambda path, num_channels: path)
        monkeypatch.setattr(sources, "_choose_subset", lambda source, size: source)
        root = write_images(tmp_path / "data", "train/a/1.png", "train/b/2.png", "val/a/3.png")
        for name in ("train.beton", "val-00000-of-00002.beton", "val-00001-of-00002.beton"):
            (root / name).touch()
        return root

    def test_a_beton_beside_a_folder_is_read_by_threads(self, root, open_split):
        assert open_split(root) == root / "train.beton"
        assert open_split(root, "val") == root / "val-00000-of-00002.beton"
        assert open_split(root, loader="ffcv") == root / "train.beton"
        assert paths_of(open_split(root, loader="folder")) == ["a/1.png", "b/2.png"]

    def test_a_beton_without_a_folder_is_always_read(self, root, open_split):
        train, val = root / "train.beton", root / "val-00000-of-00002.beton"
        assert open_split(train) == train
        assert open_split(train, "val", loader="ffcv") == val
        shutil.rmtree(root / "train")
        assert open_split(root, loader="folder") == root / "train.beton"


@pytest.mark.parametrize("share", [1.5, float("nan")])
def test_max_replaced_must_be_a_share(share):
    assert error_of(open_source, DataConfig("digits", max_replaced=share), "train") == (
        f"data.max_replaced: {share} must be a share between 0 and 1, such as 0.01"
    )


@pytest.mark.parametrize("limits", [[9.0, 3.0], [9.0], [0.0, float("inf")]])
def test_a_range_must_be_two_finite_numbers_in_ascending_order(limits):
    assert error_of(open_source, DataConfig("digits", range=limits), "train") == (
        f"data.range: {limits} must be two numbers, the lower one first, such as [0, 4095], or "
        "two per channel (6)"
    )


def test_16_bit_images_among_8_bit_ones_need_a_range(tmp_path, open_split):
    pixels = np.random.default_rng(0).integers(0, 3000, (8, 8))
    images = {"a/1.png": (pixels % 256).astype(np.uint8), "b/2.png": pixels.astype(np.uint16)}
    for name, array in images.items():
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True)
        Image.fromarray(array).save(path)
    with pytest.raises(ValueError) as error:
        check_images(open_split(tmp_path / "data"))
    assert str(error.value).startswith(
        f"data.range: not set, and the 16-bit images of {tmp_path}/data use values from "
    )


def test_a_file_larger_than_any_image_is_not_read(tmp_path, open_split):
    with (tmp_path / "1.png").open("wb") as file:
        file.truncate(MAX_BYTES + 1)  # a sparse file
    with pytest.raises(UnreadableImage) as error:
        open_split(tmp_path).read(0)
    assert str(error.value) == f"{tmp_path}/1.png: 1,073,741,825 bytes are too many for an image"
