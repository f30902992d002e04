"""NumPy and IDX files: pixels, labels, splits, copies of compressed arrays, and refusals."""

import gzip
import pickle
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from format_files import (
    GRAY_TRAIN,
    NUM_TRAIN,
    TRAIN,
    TRAIN_LABELS,
    VAL,
    VAL_LABELS,
    idx_bytes,
    write_idx,
    write_npy,
    write_npz,
)
from reading import error_of, read_all

from ssl_pretrain.data.beton import __main__ as beton_command
from ssl_pretrain.data.formats import unpacking
from ssl_pretrain.data.image_source import NoSuchSplit
from ssl_pretrain.data.images import UnreadableImage
from ssl_pretrain.data.source_report import check_images

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


def as_rgb(gray):
    return np.repeat(gray[..., None], 3, axis=3)


KINDS = {
    "npz": lambda folder: write_npz(folder / "data.npz"),
    "compressed npz": lambda folder: write_npz(folder / "data.npz", compress=True),
    "folder of npy": lambda folder: write_npy(folder / "arrays"),
    "npy": lambda folder: write_npy(folder / "arrays") / "train_images.npy",
}


@pytest.fixture(params=KINDS)
def root(request, tmp_path):
    (tmp_path / "data").mkdir()
    return KINDS[request.param](tmp_path / "data")


def test_both_splits_have_the_pixels_and_labels_of_the_arrays(root, open_split):
    train, val = open_split(root), open_split(root, "val")
    np.testing.assert_array_equal(read_all(train), TRAIN)
    np.testing.assert_array_equal(read_all(val), VAL)
    assert train.labels.tolist() == TRAIN_LABELS.tolist()
    assert val.labels.tolist() == VAL_LABELS.tolist()
    assert train.classes == val.classes == ["0", "1", "2"]


def test_the_fingerprint_is_that_of_the_content_and_not_of_the_place(root, tmp_path, open_split):
    fingerprint = open_split(root).fingerprint
    shutil.move(root.parent, tmp_path / "elsewhere")
    moved = next((tmp_path / "elsewhere").rglob(root.name))
    assert open_split(moved).fingerprint == fingerprint
    (tmp_path / "npz").mkdir()
    assert open_split(write_npz(tmp_path / "npz" / "data.npz")).fingerprint == fingerprint


@pytest.mark.parametrize("change", ["pixel", "label"])
def test_a_changed_pixel_or_label_changes_the_fingerprint(change, tmp_path, open_split):
    images, labels = TRAIN.copy(), TRAIN_LABELS.copy()
    if change == "pixel":
        images[17, 3, 5, 1] ^= 1
    else:
        labels[17] = 1
    np.savez(tmp_path / "changed.npz", images=images, labels=labels)
    np.savez(tmp_path / "same.npz", images=TRAIN, labels=TRAIN_LABELS)
    changed, same = (open_split(tmp_path / f"{name}.npz") for name in ("changed", "same"))
    assert changed.fingerprint != same.fingerprint


def test_a_pickled_source_is_small_and_reads_the_same_pixels(tmp_path, open_split):
    np.save(tmp_path / "images.npy", np.zeros((500, 64, 64, 3), np.uint8))
    source = open_split(tmp_path / "images.npy")
    source.read(0)  # opens the file, which cannot be pickled
    content = pickle.dumps(source)
    assert len(content) < 20 * len(source) + 4000
    np.testing.assert_array_equal(pickle.loads(content).read(499), source.read(499))


def test_several_threads_read_the_same_pixels(root, open_split):
    source, wrong = open_split(root), []

    def read():
        for index in range(NUM_TRAIN):
            if not np.array_equal(source.read(index), TRAIN[index]):
                wrong.append(index)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_subset_and_classes_of_the_training_split_are_applied(tmp_path, open_split):
    np.savez(
        tmp_path / "data.npz",
        train_images=TRAIN,
        train_labels=np.array(["b", "a", "c"] * 16),
        val_images=VAL,
        val_labels=np.array([["c"], ["a"]] * 6),
    )
    train = open_split(tmp_path / "data.npz", subset=10)
    assert len(train) == 10
    np.testing.assert_array_equal(
        read_all(train), TRAIN[[int(train.name(i).split("[")[-1][:-1]) for i in range(10)]]
    )
    val = open_split(tmp_path / "data.npz", "val")
    assert val.classes == ["a", "b", "c"] and val.labels.tolist() == [2, 0] * 6


SHAPES = {
    "gray": (GRAY_TRAIN, as_rgb(GRAY_TRAIN)),
    "one channel": (GRAY_TRAIN[..., None], as_rgb(GRAY_TRAIN)),
    "channel first": (GRAY_TRAIN[:, None], as_rgb(GRAY_TRAIN)),
    "channels first": (TRAIN.transpose(0, 3, 1, 2), TRAIN),
    "Fortran order": (np.asfortranarray(TRAIN), TRAIN),
    "booleans": (GRAY_TRAIN > 99, as_rgb(255 * (GRAY_TRAIN > 99).astype(np.uint8))),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_order_of_the_axes_gives_the_same_images(shape, tmp_path, open_split):
    array, expected = SHAPES[shape]
    np.save(tmp_path / "cells.npy", array)
    source = open_split(tmp_path / "cells.npy")
    np.testing.assert_array_equal(read_all(source), expected)
    assert source.labels.tolist() == [-1] * NUM_TRAIN and source.classes == []


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "<f4", "<i4"])
def test_wide_values_are_scaled_by_the_range(dtype, tmp_path, open_split):
    np.save(tmp_path / "cells.npy", (GRAY_TRAIN.astype(int) * 10 + 100).astype(dtype))
    source = open_split(tmp_path / "cells.npy", range=[100, 2650])
    check_images(source)
    np.testing.assert_array_equal(read_all(source), as_rgb(GRAY_TRAIN))


def test_wide_color_is_scaled_by_the_range(tmp_path, open_split):
    np.save(tmp_path / "cells.npy", TRAIN.astype(np.uint16) * 257)
    np.testing.assert_array_equal(read_all(open_split(tmp_path / "cells.npy")), TRAIN)


def test_dark_16_bit_values_and_floats_need_a_range(tmp_path, open_split):
    np.save(tmp_path / "dark.npy", GRAY_TRAIN.astype(np.uint16))
    assert error_of(check_images, open_split(tmp_path / "dark.npy")).startswith(
        f"data.range: not set, and the 16-bit images of {tmp_path}/dark.npy use values from "
    )
    np.save(tmp_path / "floats.npy", GRAY_TRAIN.astype(np.float32) / 240)
    source = open_split(tmp_path / "floats.npy")
    high = GRAY_TRAIN.astype(np.float32).max() / np.float32(240)
    assert error_of(check_images, source) == (
        f"data.range: not set, and the images of {tmp_path}/floats.npy are floats from 0 to "
        f"{high:g} (32 were measured), which have no range of their own; give the values of black "
        f"and white, such as data.range=[0,{high:g}]"
    )
    with pytest.raises(UnreadableImage, match=r"floats.npy\[0\]: pixels of mode F have no agreed"):
        source.read(0)


def test_labels_lie_beside_the_images(tmp_path, open_split):
    np.save(tmp_path / "cells.npy", TRAIN)
    np.save(tmp_path / "cells_labels.npy", TRAIN_LABELS)
    assert open_split(tmp_path / "cells.npy").labels.tolist() == TRAIN_LABELS.tolist()
    assert open_split(tmp_path / "cells.npy", label_column="none").labels.max() == -1
    (tmp_path / "cells_labels.npy").rename(tmp_path / "labels.npy")
    assert open_split(tmp_path / "cells.npy").labels.tolist() == TRAIN_LABELS.tolist()
    np.save(tmp_path / "nuclei.npy", VAL)  # the labels may be those of the other images
    assert open_split(tmp_path / "cells.npy").labels.max() == -1


def test_the_splits_may_be_files_that_the_configuration_names(tmp_path, open_split):
    np.savez(tmp_path / "first.npz", images=TRAIN, labels=TRAIN_LABELS)
    np.savez(tmp_path / "second.npz", images=VAL, labels=VAL_LABELS)
    options = {"train": "first.npz", "val": "second.npz"}
    np.testing.assert_array_equal(read_all(open_split(tmp_path, **options)), TRAIN)
    np.testing.assert_array_equal(read_all(open_split(tmp_path, "val", **options)), VAL)


def test_a_compressed_array_is_unpacked_once_until_it_changes(tmp_path, open_split, monkeypatch):
    path = write_npz(tmp_path / "data.npz", compress=True)
    source = open_split(path)
    copies = list((tmp_path / "cache").glob("unpacked-*.npy"))
    assert source.notes == [
        f"the images of {path}[x_train] are read from their unpacked copy {copies[0]}"
    ]
    assert source.name(3) == f"{path}[x_train][3]" and len(copies) == 1
    with monkeypatch.context() as context:
        context.setattr(unpacking, "open_atomically", None)
        open_split(path)
    np.savez_compressed(path, x_train=VAL, y_train=VAL_LABELS)
    np.testing.assert_array_equal(read_all(open_split(path)), VAL)
    assert (
        len(list((tmp_path / "cache").glob("unpacked-*"))) == 2
    )  # another run may read the old one


def test_a_folder_with_one_npz_is_that_npz_and_several_are_refused(tmp_path, open_split):
    folder = tmp_path / "medmnist"
    folder.mkdir()
    path = write_npz(folder / "blood.npz")
    assert open_split(folder).fingerprint == open_split(path).fingerprint
    write_npz(folder / "derma.npz")
    assert error_of(open_split, folder) == (
        f"data.root: {folder} contains 2 data sets (blood.npz, derma.npz); give one of them, as in "
        f"data.root={path}"
    )


def test_labels_of_several_columns_are_left_out_with_a_note(tmp_path, open_split):
    np.savez(tmp_path / "chest.npz", images=TRAIN, labels=np.zeros((NUM_TRAIN, 14)))
    source = open_split(tmp_path / "chest.npz")
    assert source.labels.max() == -1
    assert source.notes == [
        f"{tmp_path}/chest.npz[labels] has the shape (48, 14), not one label per image, so the "
        "images have no labels"
    ]


def test_a_folder_of_images_may_contain_arrays(tmp_path, open_split):
    from PIL import Image

    for number in range(3):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{number}.png")
    np.save(tmp_path / "images.npy", TRAIN)
    assert len(open_split(tmp_path)) == 3
    folder = tmp_path / "lists"
    folder.mkdir()
    (folder / "train.csv").write_text(f"path\n{tmp_path / '0.png'}\n{tmp_path / '1.png'}\n")
    np.save(folder / "images.npy", TRAIN)
    assert len(open_split(folder)) == 2


def test_a_beton_of_an_array_has_its_fingerprint(tmp_path, open_split):
    path = write_npz(tmp_path / "data.npz")
    beton = tmp_path / "train.beton"
    assert beton_command.main(["write", str(path), str(beton), "--workers", "1"]) == 0
    source = open_split(beton)
    np.testing.assert_array_equal(read_all(source), TRAIN)
    assert source.fingerprint == open_split(path).fingerprint


REFUSED = {
    "no images": (
        {"features": np.zeros((5, 7)), "labels": np.zeros(5)},
        {},
        "data.root: FILE has no array of images, with the shape (n, height, width), "
        "(n, height, width, 3) or (n, 3, height, width); it has features float64 (5, 7); labels "
        "float64 (5,)",
    ),
    "several": (
        {"left": TRAIN, "right": TRAIN},
        {},
        "data.image_column: several arrays of FILE may hold the images (left, right); choose one, "
        "as in data.image_column=left",
    ),
    "several labels": (
        {"images": TRAIN, "labels": TRAIN_LABELS, "y": TRAIN_LABELS},
        {},
        "data.label_column: several arrays of FILE may hold the labels (labels, y); choose one, as "
        "in data.label_column=labels, or set data.label_column=none",
    ),
    "missing": (
        {"images": VAL},
        {"image_column": "pixels"},
        "data.image_column: FILE has no array 'pixels'; it has images uint8 (12, 12, 12, 3)",
    ),
    "missing labels": (
        {"images": VAL},
        {"label_column": "kind"},
        "data.label_column: FILE has no array 'kind'; it has images",
    ),
    "lengths": (
        {"images": TRAIN, "labels": VAL_LABELS},
        {},
        "data.label_column: FILE[labels] has 12 labels, and FILE[images] has 48 images; give one "
        "label per image, or set data.label_column=none",
    ),
    "objects": (
        {"images": np.array([VAL[0], VAL[1, :5]], dtype=object)},
        {},
        "data.root: FILE[images] is an array of Python objects, which only pickle can load, and a "
        "pickle can run any program; save the images as one array of numbers of the same shape",
    ),
    "channels": (
        {"images": np.zeros((5, 8, 8, 4), np.uint8)},
        {},
        "data.root: FILE[images], of the shape (5, 8, 8, 4), has 4 channels, and data.channels is "
        "3; set data.channels=4 if all images have that many",
    ),
    "one image": (
        {"images": VAL[0]},
        {},
        "data.root: FILE[images] has the shape (12, 12, 3), that of one color image; give (n, "
        "height, width), (n, height, width, channels) or (n, channels, height, width)",
    ),
    "complex": (
        {"images": VAL.astype(np.complex64)},
        {},
        "data.root: FILE[images] has values of type complex64, not those of images; save them as "
        "integers or floats",
    ),
    "fractional labels": (
        {"images": VAL, "labels": VAL_LABELS + 0.5},
        {},
        "data.label_column: FILE[labels] has values of type float64, neither whole numbers nor "
        "names; choose another array, or set data.label_column=none",
    ),
    "no training split": (
        {"x_test": VAL},
        {},
        "data.train: FILE has no training split; it has test; name the one with the training "
        "images, as in data.train=test",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_unsuitable_npz_is_explained(case, tmp_path, open_split):
    arrays, options, message = REFUSED[case]
    np.savez(tmp_path / "data.npz", **arrays)
    assert error_of(open_split, tmp_path / "data.npz", **options) == message.replace(
        "FILE", f"{tmp_path}/data.npz"
    )


def test_a_missing_validation_split_is_explained(tmp_path, open_split):
    np.savez(tmp_path / "data.npz", images=TRAIN)
    with pytest.raises(NoSuchSplit) as error:
        open_split(tmp_path / "data.npz", "val")
    assert str(error.value) == (
        f"data.val: {tmp_path}/data.npz has no split for validation, such as val or test; name the "
        "one that contains the validation images, or leave out evaluations that need them"
    )


def test_damaged_files_are_explained(tmp_path, open_split):
    (tmp_path / "text.npy").write_text("no array")
    assert error_of(open_split, tmp_path / "text.npy").startswith(
        f"data.root: {tmp_path}/text.npy is not an array of NumPy ("
    )
    (tmp_path / "text.npz").write_text("no archive")
    assert error_of(open_split, tmp_path / "text.npz").startswith(
        f"data.root: {tmp_path}/text.npz is not an .npz that can be read ("
    )
    np.save(tmp_path / "cut.npy", TRAIN)
    content = (tmp_path / "cut.npy").read_bytes()
    (tmp_path / "cut.npy").write_bytes(content[:-100])
    assert error_of(open_split, tmp_path / "cut.npy") == (
        f"data.root: {tmp_path}/cut.npy is truncated; the file has {len(content) - 100:,} bytes, "
        f"and its header promises {len(content):,}; copy it again"
    )
    write_idx(tmp_path / "idx")
    images = tmp_path / "idx" / "train-images-idx3-ubyte.gz"
    images.write_bytes(images.read_bytes()[:-400])
    assert error_of(open_split, tmp_path / "idx").startswith(
        f"data.root: {images} is damaged (EOFError: "
    )


def test_a_file_that_becomes_shorter_ends_in_an_error_and_not_in_a_signal(tmp_path, open_split):
    np.save(tmp_path / "images.npy", TRAIN)
    source = open_split(tmp_path / "images.npy")
    with (tmp_path / "images.npy").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(UnreadableImage, match=r"images.npy\[40\]: the file is truncated"):
        source.read(40)
    (tmp_path / "images.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"images\.npy no longer exists"):
        source.check_present()


def test_a_cache_that_cannot_be_written_is_explained(tmp_path, open_split):
    path = write_npz(tmp_path / "data.npz", compress=True)
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "cache"
    assert error_of(open_split, path, cache_dir=str(folder)) == (
        f"data.cache_dir: {path} has to be unpacked once, and {folder} cannot be written (Not a "
        "directory); set data.cache_dir to a folder with free space"
    )


@pytest.mark.parametrize("compress", [True, False])
def test_a_folder_of_idx_files_has_both_splits(compress, tmp_path, open_split):
    root = write_idx(tmp_path / "mnist", compress)
    train, val = open_split(root), open_split(root, "val")
    np.testing.assert_array_equal(read_all(train), as_rgb(GRAY_TRAIN))
    assert train.labels.tolist() == TRAIN_LABELS.tolist()
    assert val.labels.tolist() == VAL_LABELS.tolist() and val.classes == ["0", "1", "2"]
    assert open_split(root / next(root.glob("train-images*")).name).fingerprint == train.fingerprint
    torchvision_root = tmp_path / "MNIST"
    torchvision_root.mkdir()
    shutil.move(root, torchvision_root / "raw")
    assert open_split(torchvision_root).fingerprint == train.fingerprint
    assert open_split(torchvision_root.parent / "MNIST").labels.max() == 2
    assert open_split(torchvision_root, label_column="none").labels.max() == -1


def test_idx_refusals_are_explained(tmp_path, open_split):
    root = write_idx(tmp_path / "emnist", prefix="emnist-letters-")
    write_idx(root, prefix="emnist-digits-")
    first = root / "emnist-digits-train-images-idx3-ubyte.gz"
    assert error_of(open_split, root) == (
        f"data.root: {root} contains 2 data sets (emnist-digits, emnist-letters); give the "
        f"training images of one, as in data.root={first}"
    )
    letters = root / "emnist-letters-train-images-idx3-ubyte.gz"
    assert len(open_split(letters)) == NUM_TRAIN and len(open_split(letters, "val")) == len(VAL)
    assert error_of(open_split, letters, image_column="x") == (
        f"data.image_column: {letters} has no columns, so 'x' names none; leave it out"
    )
    letters.write_bytes(gzip.compress(b"text"))
    assert error_of(open_split, letters) == (
        f"data.root: {letters} does not begin like an IDX file; copy it again"
    )
    letters.write_bytes(gzip.compress(idx_bytes(TRAIN.reshape(NUM_TRAIN, -1))))
    assert error_of(open_split, letters) == (
        f"data.root: {letters} has the shape (48, 432), not that of images; give (n, height, "
        "width), (n, height, width, channels) or (n, channels, height, width)"
    )


@pytest.mark.skipif(
    not FASHION_MNIST.exists(), reason="Debian's package dataset-fashion-mnist is not installed"
)
def test_fashion_mnist_of_debian_has_its_classes(open_split):
    train, val = open_split(FASHION_MNIST), open_split(FASHION_MNIST, "val")
    assert (len(train), len(val)) == (60_000, 10_000)
    assert train.classes[9] == "Ankle boot" and train.label(0) == 9
    assert np.bincount(train.labels).tolist() == [6000] * 10
    assert train.read(0).shape == (28, 28, 3) and train.read(0).sum() == 3 * 76247
