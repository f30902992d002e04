"""Parquet, Arrow and Hugging Face data sets: pixels, labels, splits, columns and refusals."""

import copy
import pickle
import shutil

import numpy as np
import pytest
from format_files import (
    CLASSES,
    GRAY_TRAIN,
    NUM_TRAIN,
    TRAIN,
    TRAIN_LABELS,
    VAL,
    VAL_LABELS,
    encode,
    make_tables,
    write_parquet,
    write_saved,
)
from reading import error_of, read_all

from ssl_pretrain.data.beton import encoder
from ssl_pretrain.data.image_source import NoSuchSplit
from ssl_pretrain.data.images import UnreadableImage, decode
from ssl_pretrain.data.python_objects import open_object
from ssl_pretrain.data.source_report import check_images
from ssl_pretrain.system import optional_packages

datasets = pytest.importorskip("datasets", reason="the extra `data` is not installed")
pa = pytest.importorskip("pyarrow", reason="the extra `data` is not installed")
parquet = pytest.importorskip("pyarrow.parquet")


def write_single_files(folder):
    """Write train.parquet and test.parquet, and return the first."""
    folder.mkdir()
    for split, table in make_tables(datasets).items():
        table.to_parquet(str(folder / f"{split}.parquet"))
    return folder / "train.parquet"


KINDS = {
    "shards": lambda folder: write_parquet(folder, datasets),
    "parquet": write_single_files,
    "saved": lambda folder: write_saved(folder, datasets),
}


@pytest.fixture(params=KINDS)
def root(request, tmp_path):
    return KINDS[request.param](tmp_path / "data")


def test_both_splits_have_the_pixels_and_labels_of_the_table(root, open_split):
    train, val = open_split(root), open_split(root, "val")
    np.testing.assert_array_equal(read_all(train), TRAIN)
    np.testing.assert_array_equal(read_all(val), VAL)
    assert train.labels.tolist() == TRAIN_LABELS.tolist()
    assert val.labels.tolist() == VAL_LABELS.tolist()
    assert train.classes == val.classes == CLASSES
    assert train.name(5) == f"{root}[5]"


def test_the_fingerprint_is_that_of_the_content_and_not_of_the_place(root, tmp_path, open_split):
    fingerprint = open_split(root).fingerprint
    shutil.move(tmp_path / "data", tmp_path / "moved")
    moved = tmp_path / "moved" / root.relative_to(tmp_path / "data")
    assert open_split(moved).fingerprint == fingerprint
    assert open_split(write_parquet(tmp_path / "same", datasets, 3)).fingerprint == fingerprint


def test_a_file_that_was_rewritten_is_read_again(tmp_path, open_split):
    path = write_single_files(tmp_path / "data")
    before = open_split(path)
    make_tables(datasets)["test"].to_parquet(str(path))
    after = open_split(path)
    assert after.fingerprint != before.fingerprint
    np.testing.assert_array_equal(read_all(after), VAL)


def test_a_pickled_source_is_small_and_reads_the_same_pixels(tmp_path, open_split):
    table = pa.table({"image": [encode(TRAIN[0]) + bytes(10_000)] * 500})
    parquet.write_table(table, tmp_path / "large.parquet")
    source = open_split(tmp_path / "large.parquet")
    content = pickle.dumps(source)
    assert len(content) < 50_000
    np.testing.assert_array_equal(pickle.loads(content).read(499), TRAIN[0])
    assert source.explain_no_workers() == ""


def test_a_subset_keeps_its_rows(root, open_split):
    source = open_split(root, subset=7)
    rows = [int(source.name(index).split("[")[-1][:-1]) for index in range(7)]
    np.testing.assert_array_equal(read_all(source), TRAIN[rows])
    assert source.labels.tolist() == TRAIN_LABELS[rows].tolist()


def test_columns_of_bytes_without_the_types_of_the_library_are_read(tmp_path, open_split):
    contents = [encode(image) for image in TRAIN]
    names = [CLASSES[label] for label in TRAIN_LABELS]
    table = pa.table({"id": list(range(NUM_TRAIN)), "jpg": contents, "species": names})
    parquet.write_table(table, tmp_path / "plain.parquet")
    source = open_split(tmp_path / "plain.parquet", label_column="species")
    np.testing.assert_array_equal(read_all(source), TRAIN)
    assert source.classes == CLASSES and source.labels.tolist() == TRAIN_LABELS.tolist()
    assert open_split(tmp_path / "plain.parquet").labels.max() == -1
    structs = [{"bytes": content, "path": None} for content in contents]
    parquet.write_table(pa.table({"image": structs}), tmp_path / "structs.parquet")
    np.testing.assert_array_equal(read_all(open_split(tmp_path / "structs.parquet")), TRAIN)


def test_an_arrow_file_is_read_in_place(tmp_path, open_split):
    write_saved(tmp_path / "saved", datasets)
    arrow = next((tmp_path / "saved" / "train").glob("*.arrow"))
    shutil.copy(arrow, tmp_path / "images.arrow")
    source = open_split(tmp_path / "images.arrow")
    np.testing.assert_array_equal(read_all(source), TRAIN)
    assert not (tmp_path / "cache").exists()


def test_one_split_that_was_saved_is_for_training(tmp_path, open_split):
    make_tables(datasets)["train"].save_to_disk(str(tmp_path / "saved"))
    assert len(open_split(tmp_path / "saved")) == NUM_TRAIN
    with pytest.raises(NoSuchSplit):
        open_split(tmp_path / "saved", "val")


def test_16_bit_images_follow_the_rules_of_files(tmp_path, open_split):
    contents = [encode(GRAY_TRAIN[index].astype(np.uint16) * 10) for index in range(20)]
    parquet.write_table(pa.table({"image": contents}), tmp_path / "wide.parquet")
    source = open_split(tmp_path / "wide.parquet")
    assert "use values from" in error_of(check_images, source)
    ranged = open_split(tmp_path / "wide.parquet", range=[0, 2550])
    check_images(ranged)
    np.testing.assert_array_equal(ranged.read(3)[..., 0], GRAY_TRAIN[3])


def test_a_beton_keeps_the_bytes_of_jpegs(tmp_path, open_split):
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(TRAIN[0]).save(file, "JPEG")
    parquet.write_table(pa.table({"image": [file.getvalue()] * 3}), tmp_path / "jpeg.parquet")
    source = open_split(tmp_path / "jpeg.parquet")
    assert source.read_bytes(1) == file.getvalue()
    np.testing.assert_array_equal(source.read(1), decode(file.getvalue(), ""))
    assert encoder.EncodedSource in type(source).__mro__


def test_an_absent_or_damaged_image_is_named(tmp_path, open_split):
    contents = [encode(TRAIN[0]), None, b"text"]
    parquet.write_table(pa.table({"image": contents}), tmp_path / "gaps.parquet")
    source = open_split(tmp_path / "gaps.parquet")
    with pytest.raises(UnreadableImage, match=r"gaps\.parquet\[1\]: the row has no image"):
        source.read(1)
    with pytest.raises(UnreadableImage, match=r"gaps\.parquet\[2\]: not a known image format"):
        source.read(2)
    (tmp_path / "gaps.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"gaps\.parquet no longer exists"):
        source.check_present()


def test_wrong_columns_are_explained(tmp_path, open_split):
    table = make_tables(datasets)["train"]
    kinds = "image (Image), label (ClassLabel)"
    path = tmp_path / "data.parquet"
    table.to_parquet(str(path))
    assert error_of(open_split, path, image_column="picture") == (
        f"data.image_column: {path} has no column 'picture'; it has {kinds}"
    )
    assert error_of(open_split, path, image_column="label") == (
        f"data.image_column: the column 'label' of {path} contains ClassLabel values, not images; "
        f"the columns are {kinds}"
    )
    assert error_of(open_split, path, label_column="kind") == (
        f"data.label_column: {path} has no column 'kind'; it has image, label"
    )
    table.remove_columns("image").to_parquet(str(path))
    assert error_of(open_split, path) == (
        f"data.image_column: no column of {path} contains images (label (ClassLabel)); give the "
        "column of encoded images, or cast it with dataset.cast_column('image', datasets.Image())"
    )
    twice = table.rename_column("image", "left").add_column("kind", table["label"])
    twice = twice.add_column("right", [{"bytes": encode(image), "path": None} for image in TRAIN])
    twice = twice.cast_column("right", datasets.Image())
    twice.to_parquet(str(path))
    assert error_of(open_split, path) == (
        f"data.image_column: several columns of {path} contain images (left, right); choose one, "
        "as in data.image_column=left"
    )
    right = open_split(path, image_column="right", label_column="kind")
    assert right.classes == ["0", "1", "2"] and len(right) == NUM_TRAIN


def test_several_label_columns_are_explained(tmp_path, open_split):
    table = make_tables(datasets)["train"].rename_column("label", "kind")
    table = table.add_column("color", table["kind"]).cast_column("color", table.features["kind"])
    path = tmp_path / "data.parquet"
    table.to_parquet(str(path))
    assert error_of(open_split, path) == (
        f"data.label_column: several columns of {path} contain labels (kind, color); choose one, "
        "as in data.label_column=kind, or set data.label_column=none"
    )
    assert open_split(path, label_column="none").classes == []


def test_unclear_splits_are_explained(tmp_path, open_split):
    root = write_parquet(tmp_path / "data", datasets)
    assert len(open_split(root, val="train")) == NUM_TRAIN
    assert error_of(open_split, root, train="extra") == (
        f"data.train: {root} has no split 'extra'; it has test, train"
    )
    copy_path = root / "data" / "extra.parquet"
    shutil.copy(next((root / "data").glob("train-*")), copy_path)
    assert error_of(open_split, root) == (
        f"data.root: {root} has the splits test, train, and other files without a split "
        "(data/extra.parquet); move them, or give one file as data.root"
    )
    copy_path.unlink()
    shutil.copytree(root / "data", root / "other")
    assert error_of(open_split, root) == (
        f"data.root: {root} has files of the split test in several folders (data, other), as data "
        f"sets with several configurations do; give one of them, as in data.root={root}/data"
    )


def test_a_damaged_file_is_explained(tmp_path, open_split):
    (tmp_path / "train.parquet").write_bytes(b"PAR1 but nothing else")
    assert error_of(open_split, tmp_path / "train.parquet").startswith(
        f"data.root: {tmp_path}/train.parquet cannot be read ("
    )
    (tmp_path / "train.arrow").write_bytes(b"text")
    assert error_of(open_split, tmp_path / "train.arrow").startswith(
        f"data.root: {tmp_path}/train.arrow cannot be read ("
    )


def test_a_missing_package_names_the_extra(tmp_path, open_split, monkeypatch):
    path = write_single_files(tmp_path / "data")
    monkeypatch.setattr(optional_packages, "is_installed", lambda module: module != "datasets")
    message = error_of(open_split, path)
    assert message.startswith(f"data.root: {path}: datasets is not installed; install it with")
    assert "[data]'" in message
    assert "[data]'" in error_of(open_split, "uoft-cs/cifar10", source="huggingface")


class TestHub:
    def test_the_library_loads_a_data_set_by_its_name(self, open_split, monkeypatch):
        calls = []

        def load_dataset(name, **options):
            calls.append((name, options.get("revision")))
            return make_tables(datasets)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        options = {"source": "huggingface", "args": {"revision": "main"}}
        train = open_split("owner/name", **options)
        assert train.name(2) == "owner/name[2]" and train.classes == CLASSES
        np.testing.assert_array_equal(read_all(open_split("owner/name", "val", **options)), VAL)
        assert set(calls) == {("owner/name", "main")}

    def test_a_path_is_opened_without_the_hub(self, tmp_path, open_split):
        root = write_saved(tmp_path / "saved", datasets)
        assert len(open_split(root, source="huggingface")) == NUM_TRAIN

    def test_a_stream_is_refused(self, open_split, monkeypatch):
        def load_dataset(name, **options):
            return make_tables(datasets)["train"].to_iterable_dataset()

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        options = {"source": "huggingface", "args": {"streaming": True}}
        assert error_of(open_split, "owner/name", **options) == (
            "data.args: owner/name is loaded as a stream, which has no order to resume from; leave "
            "out streaming"
        )

    def test_a_failure_is_explained(self, open_split, monkeypatch):
        def load_dataset(name, **options):
            raise ConnectionError("no network\nmore")

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        assert error_of(open_split, "owner/name", source="huggingface") == (
            "data.root: owner/name cannot be loaded from the Hugging Face Hub (no network); check "
            "the name (owner/name) and the network, or download it elsewhere and give the folder "
            "of its Parquet files"
        )
        assert error_of(open_split, "", source="huggingface") == (
            "data.root: no data set is named; give a name of the Hub, as in "
            "data.root=uoft-cs/cifar10, or a path"
        )


def test_an_object_of_the_library_equals_its_file(tmp_path, open_split):
    table = make_tables(datasets)["train"]
    source = open_object(table)
    np.testing.assert_array_equal(read_all(source), TRAIN)
    table.to_parquet(str(tmp_path / "data.parquet"))
    assert open_split(tmp_path / "data.parquet").fingerprint == source.fingerprint
    flipped = copy.copy(table).with_transform(
        lambda batch: {"image": [image.rotate(180) for image in batch["image"]]},
        columns=["image"],
    )
    np.testing.assert_array_equal(open_object(flipped).read(0), TRAIN[0, ::-1, ::-1])
