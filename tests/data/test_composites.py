"""Composites of digits or garments, whose captions describe what they show."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from format_files import write_idx
from reading import error_of, texts_of

from ssl_pretrain.data import composites
from ssl_pretrain.data.composites import BACKGROUNDS, COLORS, PLACES, open_split
from ssl_pretrain.data.named_datasets import Digits
from ssl_pretrain.data.sources import DataConfig, open_source


@pytest.fixture(scope="module")
def train():
    return open_split("train", train_images=4000)


@pytest.fixture(scope="module")
def val():
    return open_split("val", val_images=1000)


def combinations_of(source) -> set[tuple[str, str, str]]:
    attributes = map(source.attributes, range(len(source)))
    return {(image["what"], image["color"], image["place"]) for image in attributes}


def test_a_fifth_of_the_combinations_is_only_for_validation(train, val):
    held_out = {
        (val.classes[what], list(COLORS)[color], PLACES[place])
        for what, color, place in np.argwhere(composites.held_out_combinations(10))
    }
    assert len(held_out) == 10 * 8 * 9 / 5
    assert not combinations_of(train) & held_out and combinations_of(val) <= held_out
    other_seed = open_split("val", val_images=1000, seed=7)
    assert combinations_of(other_seed) <= held_out


def test_both_splits_have_every_value_of_every_attribute(train, val):
    for source in (train, val):
        images = [source.attributes(index) for index in range(400)]
        for key, values in source.attribute_values.items():
            assert {image[key] for image in images} == set(values)


def test_the_objects_of_the_splits_are_disjoint_digits(train, val):
    for source, split in ((train, "train"), (val, "val")):
        digits = Digits(split, 1)
        for index in range(20):
            object_index = source._layout(index).object_index
            assert digits.label(object_index) == source.label(index)
        assert source._objects.fingerprint == digits.fingerprint


def test_labels_are_the_names_in_the_captions(val):
    assert val.classes == list(composites.DIGITS)
    for index in range(100):
        assert val.attributes(index)["what"] == val.classes[val.label(index)]


def test_captions_name_all_attributes_of_the_image(train):
    for index in range(200):
        (captions,) = train.texts(index)
        assert len(set(captions)) == 5
        for caption in captions:
            for value in train.attributes(index).values():
                assert value in caption
    assert composites.describe(
        {"what": "eight", "color": "orange", "place": "on the left", "background": "olive"}
    ) == [
        "an orange eight on the left, on an olive background",
        "on an olive background, an orange eight on the left",
        "on the left of an olive image there is an orange eight",
        "an eight in orange, drawn on the left on olive",
        "the image shows an orange eight on the left and is otherwise olive",
    ]


def test_pixels_have_the_colors_and_the_place_of_the_attributes(val):
    for index in range(100):
        attributes, pixels = val.attributes(index), val.read(index).astype(int)
        assert pixels.shape == (48, 48, 3)
        distances = {
            name: np.abs(pixels - color).sum(2) for name, color in ((COLORS | BACKGROUNDS).items())
        }
        is_background = distances[attributes["background"]] <= 3 * composites._NOISE
        is_object = distances[attributes["color"]] <= 3 * composites._NOISE
        assert is_background.mean() > 0.85 and is_object.sum() > 5
        rows, columns = np.nonzero(~is_background)
        row, column = divmod(PLACES.index(attributes["place"]), 3)
        assert abs(rows.mean() - (9.5 + 14 * row)) < 5
        assert abs(columns.mean() - (9.5 + 14 * column)) < 5


def test_the_background_never_has_the_hue_of_the_object(train):
    hues = set(zip(COLORS, BACKGROUNDS))
    images = [train.attributes(index) for index in range(1000)]
    shown = {(image["color"], image["background"]) for image in images}
    assert not shown & hues and len(shown) == 8 * 7


def test_an_image_depends_on_the_seed_the_split_and_the_index_only(train):
    few = open_split("train", train_images=10)
    for index in (3, 9):
        np.testing.assert_array_equal(few.read(index), train.read(index))
        assert few.texts(index) == train.texts(index) and few.label(index) == train.label(index)
    other = open_split("train", train_images=10, seed=1)
    assert texts_of(other) != texts_of(few) and other.fingerprint != few.fingerprint
    assert not np.array_equal(train.read(3), train.read(4))
    assert open_split("train", train_images=10).fingerprint == few.fingerprint


def test_a_subset_and_a_pickled_copy_keep_images_and_captions(train):
    subset = pickle.loads(pickle.dumps(train)).take(np.array([30, 2]))
    for index, original in enumerate((30, 2)):
        np.testing.assert_array_equal(subset.read(index), train.read(original))
        assert subset.texts(index) == train.texts(original)
        assert subset.label(index) == train.label(original)
    assert len(pickle.dumps(train)) < 300_000
    assert train.without_texts().texts(0) == []


def test_the_setting_names_the_function_and_its_arguments():
    config = DataConfig(
        source="ssl_pretrain.data.composites:open_split", args={"val_images": 30, "seed": 4}
    )
    source = open_source(config, "val")
    assert len(source) == 30 and source.num_texts == 1
    assert source.classes == list(composites.DIGITS)
    assert texts_of(source) == texts_of(open_split("val", val_images=30, seed=4))


def test_garments_come_from_the_files_of_fashion_mnist(tmp_path, monkeypatch):
    monkeypatch.setattr(composites, "_WHATS", {"fashion_mnist": composites.GARMENTS[:3]})
    root = write_idx(tmp_path / "fashion-mnist")
    options = {"root": str(root), "cache_dir": str(tmp_path / "cache")}
    source = open_split("val", "fashion_mnist", val_images=50, **options)
    assert source.read(0).shape == (48, 48, 3)
    whats = {source.attributes(index)["what"] for index in range(50)}
    assert whats == {"T-shirt", "pair of trousers", "pullover"}


def test_wrong_arguments_are_explained(tmp_path: Path):
    assert error_of(open_split, "train", "mnist") == (
        "dataset: 'mnist' is not known; choose one of: digits, fashion_mnist"
    )
    assert error_of(open_split, "train", train_images=0) == (
        "train_images: 0 is too small; give 1 or more"
    )
    assert error_of(open_split, "train", "fashion_mnist", str(tmp_path / "none")) == (
        f"root: {tmp_path}/none is not a folder; install the package dataset-fashion-mnist of "
        "Debian or Ubuntu, or give the folder of the IDX files"
    )
