"""CIFAR-10, CIFAR-100 and STL-10 in their own files: pixels, labels, pickles and refusals."""

import os
import pickle
import shutil

import numpy as np
import pytest
from format_files import (
    CIFAR_TEST,
    CIFAR_TRAIN,
    CLASSES,
    NUM_TRAIN,
    NUM_VAL,
    STL10_TEST,
    STL10_TRAIN,
    STL10_UNLABELED,
    cifar10_files,
    cifar100_files,
    make_labels,
    stl10_files,
    write_files,
    write_tar,
)
from reading import error_of, read_all

FOLDERS = {
    "cifar10": ("cifar-10-batches-py", "cifar-10-python.tar.gz", cifar10_files),
    "cifar100": ("cifar-100-python", "cifar-100-python.tar.gz", cifar100_files),
    "stl10": ("stl10_binary", "stl10_binary.tar.gz", stl10_files),
}


def write_forms(name, root):
    """Return the archive, its unpacked folder, and the folder around that."""
    folder, tar_name, files = FOLDERS[name]
    write_files(root / "unpacked" / folder, files())
    tar = write_tar(root / tar_name, folder, files())
    return [tar, root / "unpacked" / folder, root / "unpacked"]


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_has_the_same_images_and_labels_in_every_form(name, tmp_path, open_split):
    fingerprints = set()
    for root in write_forms(name, tmp_path):
        train, val = open_split(root), open_split(root, "val")
        np.testing.assert_array_equal(read_all(train), CIFAR_TRAIN)
        np.testing.assert_array_equal(read_all(val), CIFAR_TEST)
        assert train.classes == val.classes == CLASSES
        assert train.labels.tolist() == make_labels(NUM_TRAIN).tolist()
        assert val.labels.tolist() == make_labels(NUM_VAL).tolist()
        fingerprints.add((train.fingerprint, val.fingerprint))
    assert len(fingerprints) == 1


def test_cifar100_has_fine_labels_by_default_and_coarse_ones_by_name(tmp_path, open_split):
    root = write_forms("cifar100", tmp_path)[0]
    coarse = open_split(root, label_column="coarse_label")
    assert coarse.classes == ["insect", "mammal"]
    assert coarse.labels.tolist() == (make_labels(NUM_TRAIN) // 2).tolist()
    assert open_split(root, label_column="none").labels.max() == -1
    assert error_of(open_split, root, label_column="label") == (
        f"data.label_column: {root} has no labels 'label'; choose one of: fine_label, "
        "coarse_label, none"
    )
    assert coarse.name(5) == f"{root}[train][5]" and str(root) in coarse.notes[0]


def test_the_images_of_stl10_are_upright_and_the_unlabeled_ones_are_for_training(
    tmp_path, open_split
):
    fingerprints = set()
    for root in write_forms("stl10", tmp_path):
        train, val = open_split(root), open_split(root, "val")
        np.testing.assert_array_equal(
            read_all(train), np.concatenate([STL10_TRAIN, STL10_UNLABELED])
        )
        np.testing.assert_array_equal(read_all(val), STL10_TEST)
        assert train.labels.tolist() == [*make_labels(NUM_TRAIN).tolist(), *[-1] * 20]
        assert train.classes == val.classes and train.classes[:2] == ["airplane", "bird"]
        assert train.name(NUM_TRAIN + 3).endswith("unlabeled_X.bin[3]") or root.suffix == ".gz"
        np.testing.assert_array_equal(
            pickle.loads(pickle.dumps(train)).read(NUM_TRAIN), STL10_UNLABELED[0]
        )
        fingerprints.add(train.fingerprint)
    assert len(fingerprints) == 1


def test_an_archive_of_any_name_is_read_if_the_source_says_what_it_is(tmp_path, open_split):
    tar = write_forms("stl10", tmp_path)[0].rename(tmp_path / "download.tar.gz")
    assert len(open_split(tar, source="stl10")) == NUM_TRAIN + 20
    assert error_of(open_split, tar).startswith(f"data.root: {tar} is compressed by gzip, so ")


def test_a_zip_of_cifar100_has_one_folder_per_class(tmp_path, open_split):
    from PIL import Image

    for split in ("train", "test"):
        for name in CLASSES:
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(tmp_path / split / name / "1.png")
    shutil.make_archive(str(tmp_path / "images"), "zip", tmp_path, ".")
    train = open_split(tmp_path / "images.zip", source="cifar100")
    assert train.classes == CLASSES and len(train) == 3
    assert len(open_split(tmp_path / "images.zip", "val", source="cifar100")) == 3


def test_a_changed_archive_is_unpacked_again(tmp_path, open_split):
    tar = write_forms("cifar100", tmp_path)[0]
    before = open_split(tar)
    os.utime(tar, ns=(1, 1))
    assert open_split(tar).fingerprint == before.fingerprint
    assert len(list((tmp_path / "cache").glob("unpacked-*.npz"))) == 2


class Exploit:
    def __reduce__(self):
        return os.mkdir, ("created_by_a_pickle",)


def test_a_pickle_that_calls_a_function_is_refused(tmp_path, open_split, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = cifar100_files() | {"meta": pickle.dumps(Exploit(), protocol=2)}
    root = write_files(tmp_path / "cifar-100-python", files)
    assert error_of(open_split, root) == (
        f"data.root: {root} contains a pickle that calls {os.mkdir.__module__}.mkdir, which the "
        "files of CIFAR do not; it could run any program and is not read; download the archive "
        "again"
    )
    assert not (tmp_path / "created_by_a_pickle").exists()


def test_damaged_archives_are_explained(tmp_path, open_split):
    files = cifar100_files()
    tar = write_tar(tmp_path / "cifar-100-python.tar.gz", "c", {"train": files["train"]})
    assert error_of(open_split, tar) == (
        f"data.root: {tar} lacks the files test, meta; download it again"
    )
    tar.write_bytes(tar.read_bytes()[:900])
    assert error_of(open_split, tar).startswith(f"data.root: {tar} is damaged (")
    root = write_files(tmp_path / "stl10_binary", stl10_files())
    content = (root / "train_X.bin").read_bytes()
    (root / "train_X.bin").write_bytes(content[:-5])
    assert error_of(open_split, root) == (
        f"data.root: {root}/train_X.bin has {len(content) - 5:,} bytes, not a multiple of the "
        "27,648 of an image; it is truncated, so copy it again"
    )
    (root / "train_X.bin").write_bytes(content[:-27648])
    assert error_of(open_split, root) == (
        f"data.root: {root} has 48 labels for 47 images in train_X.bin; copy it again"
    )


@pytest.mark.parametrize("source", ["cifar100", "stl10"])
def test_a_download_without_a_network_is_explained(source, monkeypatch, open_split):
    from torchvision.datasets import utils

    def fail(*arguments, **options):
        raise OSError("no network")

    monkeypatch.setattr(utils, "download_url", fail)
    assert error_of(open_split, "", source=source) == (
        f"data.root: {FOLDERS[source][1]} cannot be downloaded (no network); without a network, "
        "set data.root to the archive or to its unpacked folder"
    )
