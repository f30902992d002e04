"""A .npy is one image in a class folder, a zip, a list or a shard, unless its folder says more."""

import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from reading import error_of

from ssl_pretrain.data.formats.array_source import ArraySource
from ssl_pretrain.data.image_source import ImageFiles
from ssl_pretrain.data.sources import DataConfig, open_source
from ssl_pretrain.data.tar.tar_source import TarShards

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 12, 10, 4), dtype=np.uint8)


@pytest.fixture
def open_split(tmp_path):
    def open_split(root, split="train", **options):
        options = {"cache_dir": str(tmp_path / "cache"), "channels": 4} | options
        return open_source(DataConfig(root=str(root), **options), split)

    return open_split


def write_tree(root: Path) -> Path:
    """Write 4 training and 2 validation images, root/<split>/<class>/<number>.npy."""
    for number, image in enumerate(IMAGES):
        split, label = "train" if number < 4 else "val", "ab"[number % 2]
        (root / split / label).mkdir(parents=True, exist_ok=True)
        np.save(root / split / label / f"{number}.npy", image)
    return root


def check_tree(train, val):
    assert (len(train), len(val), train.classes) == (4, 2, ["a", "b"])
    np.testing.assert_array_equal(train.labels, [0, 0, 1, 1])
    for source, numbers in ((train, [0, 2, 1, 3]), (val, [4, 5])):
        for index, number in enumerate(numbers):
            np.testing.assert_array_equal(source.read(index), IMAGES[number])


def test_class_folders_and_their_zip(tmp_path, open_split):
    root = write_tree(tmp_path / "images")
    check_tree(open_split(root), open_split(root, "val"))
    archive_path = tmp_path / "images.zip"
    with zipfile.ZipFile(archive_path, "w") as archive:
        for path in sorted(root.rglob("*.npy")):
            archive.write(path, path.relative_to(root))
    check_tree(open_split(archive_path), open_split(archive_path, "val"))


def test_a_list(tmp_path, open_split):
    write_tree(tmp_path)
    paths = sorted((tmp_path / "train").rglob("*.npy"))
    rows = [f"{path.relative_to(tmp_path)},{path.parent.name}" for path in paths]
    (tmp_path / "train.csv").write_text("\n".join(["path,label", *rows]))
    source = open_split(tmp_path / "train.csv")
    assert (len(source), source.classes) == (4, ["a", "b"])
    np.testing.assert_array_equal(source.read(2), IMAGES[1])


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    header = tarfile.TarInfo(name)
    header.size = len(content)
    archive.addfile(header, io.BytesIO(content))


def test_a_shard_whose_samples_have_no_other_image(tmp_path, open_split):
    png, npy = io.BytesIO(), io.BytesIO()
    Image.fromarray(IMAGES[0]).save(png, "PNG")
    np.save(npy, IMAGES[1])
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "0.tar", "w") as archive:
        add(archive, "0.png", png.getvalue())
        add(archive, "0.npy", npy.getvalue())  # features of the image
        add(archive, "1.npy", npy.getvalue())
        add(archive, "1.cls", b"3")
    np.save(tmp_path / "shards" / "class_weights.npy", np.ones(4))
    source = open_split(tmp_path / "shards")
    assert isinstance(source, TarShards) and len(source) == 2
    for index in range(2):
        np.testing.assert_array_equal(source.read(index), IMAGES[index])
    assert "left out" in source.notes[-1] and "1 .npy members (first: 0.npy)" in source.notes[-1]


def test_arrays_beside_images_in_other_formats_are_left_out(tmp_path, open_split):
    root = tmp_path / "images"
    for folder in ("photos", "features"):
        for label in ("a", "b"):
            (root / folder / label).mkdir(parents=True)
            np.save(root / "features" / label / "0.npy", IMAGES[0]) if folder == "features" else (
                Image.fromarray(IMAGES[0]).save(root / folder / label / "0.png")
            )
    source = open_split(root)
    assert source.classes == ["a", "b"] and len(source) == 2
    assert source.notes[-1] == (
        f"left out in {root}: 2 .npy files beside images in other formats (first: features/a/0.npy)"
    )
    archive_path = tmp_path / "images.zip"
    with zipfile.ZipFile(archive_path, "w") as archive:
        for path in sorted(root.rglob("*.*")):
            archive.write(path, path.relative_to(root))
    assert len(open_split(archive_path)) == 2


def save(folder: Path, **arrays) -> Path:
    folder.mkdir()
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return folder


class TestAFolderOfArrays:
    def test_usual_names_are_arrays_of_many_images(self, tmp_path, open_split):
        root = save(tmp_path / "arrays", images=IMAGES, labels=np.arange(6), other=IMAGES)
        assert isinstance(open_split(root), ArraySource) and len(open_split(root)) == 6
        gray = np.zeros((54, 12, 12), np.uint8)  # no axis is shorter than the others
        root = save(tmp_path / "gray", x_train=gray, cells=gray)
        assert isinstance(open_split(root, channels=1), ArraySource)

    def test_images_below_it_are_no_reason_to_read_them_instead(self, tmp_path, open_split):
        root = save(tmp_path / "arrays", images=IMAGES)
        save(root / "masks", **{"0": IMAGES[0]})
        assert isinstance(open_split(root), ArraySource)

    def test_other_names_are_one_image_each(self, tmp_path, open_split):
        root = save(tmp_path / "cells", **{f"cell_{index}": IMAGES[index] for index in range(3)})
        source = open_split(root)
        assert isinstance(source, ImageFiles) and len(source) == 3

    def test_more_than_64_are_one_image_each(self, tmp_path, open_split):
        names = ["images", *(f"cell_{index}" for index in range(64))]
        root = save(tmp_path / "cells", **dict.fromkeys(names, IMAGES[0]))
        source = open_split(root)
        assert isinstance(source, ImageFiles) and len(source) == 65

    def test_a_usual_name_among_single_images_is_ambiguous(self, tmp_path, open_split):
        root = save(tmp_path / "cells", image=IMAGES[0], other=IMAGES[1])
        assert error_of(open_split, root) == (
            f"data.root: {root} is ambiguous, because image.npy is called like an array of many "
            "images, and other.npy has the same shape (12, 10, 4), which may be that of one image; "
            f"rename image.npy if each file is one image, or give data.root={root}/image.npy"
        )

    @pytest.mark.parametrize(
        ("arrays", "listed"),
        [
            (
                {"cells": IMAGES, "kinds": np.arange(6)},
                "cells.npy (6, 12, 10, 4), kinds.npy (6,)",
            ),
            ({"cells": IMAGES[..., 0]}, "cells.npy (6, 12, 10)"),
        ],
    )
    def test_shapes_that_are_not_those_of_images_ask_for_the_array(
        self, arrays, listed, tmp_path, open_split
    ):
        root = save(tmp_path / "arrays", **arrays)
        assert error_of(open_split, root) == (
            f"data.root: {root} has no .npy with a usual name of images, such as images.npy, and "
            f"what it has is not one image per file ({listed}); give the array of the images, as "
            f"in data.root={root}/cells.npy"
        )
        assert len(open_split(root / "cells.npy", channels=4 if "kinds" in arrays else 1)) == 6

    def test_a_table_beside_them_is_read(self, tmp_path, open_split):
        datasets = pytest.importorskip("datasets", reason="the extra `data` is not installed")
        root = save(tmp_path / "table", embeddings=IMAGES[0, :, :, 0])
        table = datasets.Dataset.from_dict(
            {"image": list(IMAGES[:, :, :, :3])}, datasets.Features({"image": datasets.Image()})
        )
        table.to_parquet(str(root / "train.parquet"))
        assert len(open_split(root, channels=3)) == 6
