"""Captions of images in lists, tables and Python objects."""

import csv
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from reading import error_of, texts_of
from torch.utils.data import Dataset

from ssl_pretrain.data.caption_texts import PackedCaptions, clean_captions
from ssl_pretrain.data.images import UnreadableImage
from ssl_pretrain.data.python_objects import open_object
from ssl_pretrain.data.sources import DataConfig, open_source

TRICKY = ('a "big", red dog', "two\nlines", "un café; 猫 🐈", "tab\there | pipe, comma", "'quoted'")
IMAGES = np.random.default_rng(0).integers(0, 256, (10, 6, 8, 3)).astype(np.uint8)


def write_list(
    folder: Path, header: list[str], rows: list[list[str]], delimiter: str = ",", name: str = ""
) -> Path:
    """Write a list, and an image for each name in its column `path`."""
    folder.mkdir(exist_ok=True)
    path = folder / (name or "list.csv")
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])
    for image in {row[header.index("path")] for row in rows}:
        Image.new("RGB", (4, 4)).save(folder / image)
    return path


class TestLists:
    @pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
    def test_captions_may_have_quotes_commas_lines_and_any_character(
        self, delimiter, tmp_path, open_split
    ):
        rows = [[f"{number}.png", text] for number, text in enumerate(TRICKY)]
        source = open_split(write_list(tmp_path, ["path", "caption"], rows, delimiter))
        assert source.num_texts == 1 and texts_of(source) == [[[text]] for text in TRICKY]
        assert source.labels.tolist() == [-1] * 5 and source.classes == []

    @pytest.mark.parametrize("title", ["Captions", "text", "title", "sentence", "description"])
    def test_usual_titles_are_recognized_beside_labels(self, title, tmp_path, open_split):
        rows = [["eel, in the sea", "eel", "1.png"], ["cat", "cat", "2.png"]]
        source = open_split(write_list(tmp_path, [title, "class", "path"], rows))
        assert texts_of(source) == [[["eel, in the sea"]], [["cat"]]]
        assert source.classes == ["cat", "eel"] and source.labels.tolist() == [1, 0]

    def test_rows_with_the_same_path_are_captions_of_one_image(self, tmp_path, open_split):
        rows = [
            ["2.png", "0", "a dog"],
            ["1.png", "0", "a cat"],
            ["2.png", "1", "a brown dog"],
            ["2.png", "2", " "],
        ]
        source = open_split(write_list(tmp_path, ["path", "number", "caption"], rows))
        assert [source.name(index) for index in range(2)] == [
            f"{tmp_path}/2.png",
            f"{tmp_path}/1.png",
        ]
        assert texts_of(source) == [[["a dog", "a brown dog"]], [["a cat"]]]
        assert source.labels.tolist() == [-1, -1]  # the numbers of the captions are no labels
        note = f"the 4 rows of {tmp_path}/list.csv are captions of 2 images"
        assert note in source.notes

    def test_merged_rows_keep_the_label_of_the_image(self, tmp_path, open_split):
        rows = [["1.png", "a", ""], ["2.png", "b", "cat"], ["1.png", "c", "dog"]]
        rows.append(["2.png", "d", "eel"])
        source = open_split(write_list(tmp_path, ["path", "caption", "label"], rows))
        assert source.classes == ["cat", "dog"] and source.labels.tolist() == [1, 0]

    def test_an_image_without_a_caption_is_noted(self, tmp_path, open_split):
        rows = [["1.png", "a"], ["2.png", " "], ["3.png"]]
        source = open_split(write_list(tmp_path, ["path", "caption"], rows))
        assert texts_of(source) == [[["a"]], [[]], [[]]]
        note = f"2 of 3 images in {tmp_path}/list.csv have no caption (first: 2.png)"
        assert source.notes == [note]

    def test_captions_of_an_older_spreadsheet_are_legible(self, tmp_path, open_split):
        path = write_list(tmp_path, ["path", "caption"], [["1.png", "a"]])
        path.write_bytes("path,caption\n1.png,un café\n".encode("cp1252"))
        assert texts_of(open_split(path)) == [[["un café"]]]

    def test_the_setting_names_the_column_or_none(self, tmp_path, open_split):
        rows = [["1.png", "a dog", "dog"], ["2.png", "a cat", "cat"], ["2.png", "a tom", "cat"]]
        path = write_list(tmp_path, ["path", "comment", "title"], rows)
        source = open_split(path, caption_column="comment")
        assert texts_of(source) == [[["a dog"]], [["a cat", "a tom"]]]
        without = open_split(path, caption_column="none")
        assert (without.num_texts, without.texts(0), len(without)) == (0, [], 3)
        assert error_of(open_split, path, caption_column="Comment") == (
            f"data.caption_column: {path} has no captions in a column 'Comment'; its columns are "
            "path, comment, title; choose one of them, or set data.caption_column=none"
        )
        path.write_text("1.png,a dog\n2.png,a cat\n")
        assert error_of(open_split, path, caption_column="caption") == (
            f"data.caption_column: {path} has no names of columns; write them into its first row, "
            "as in path,caption"
        )

    def test_a_title_that_is_a_label_stays_one_without_captions(self, tmp_path, open_split):
        path = write_list(tmp_path, ["path", "title"], [["1.png", "dog"], ["2.png", "cat"]])
        assert open_split(path, caption_column="none").classes == ["cat", "dog"]
        assert open_split(path).classes == []

    def test_validation_images_need_no_captions(self, tmp_path, open_split):
        write_list(tmp_path, ["path", "comment"], [["1.png", "a dog"]], name="train.csv")
        write_list(tmp_path, ["path", "label"], [["2.png", "dog"]], name="val.csv")
        val = open_split(tmp_path, "val", caption_column="comment")
        assert val.num_texts == 0 and val.classes == ["dog"]
        assert val.notes[0].startswith(f"data.caption_column: {tmp_path}/val.csv has no captions")

    def test_a_column_of_splits_is_recognized_beside_captions(self, tmp_path, open_split):
        rows = [["1.png", "a train", "train"], ["2.png", "val", "val"], ["1.png", "b", "train"]]
        path = write_list(tmp_path, ["path", "caption", "split"], rows)
        assert texts_of(open_split(path)) == [[["a train", "b"]]]
        assert texts_of(open_split(path, "val")) == [[["val"]]]

    def test_a_missing_quotation_mark_is_explained(self, tmp_path, open_split):
        path = write_list(tmp_path, ["path", "caption"], [["1.png", "a"]] * 3)
        path.write_text(path.read_text() + '1.png,"a dog\n' + "1.png,a\n" * 20_000)
        assert error_of(open_split, path) == (
            f"data.root: {path} cannot be split into columns (field larger than field limit "
            "(131072)); end each quoted cell with a quotation mark"
        )

    def test_subsets_and_pickled_copies_keep_their_captions(self, tmp_path, open_split):
        rows = [[f"{number}.png", text] for number, text in enumerate(TRICKY)]
        rows.append(["1.png", "another"])
        source = open_split(write_list(tmp_path, ["path", "caption"], rows))
        indices = np.array([3, 1])
        copy = pickle.loads(pickle.dumps(source.take(indices))).with_classes(["x"])
        assert texts_of(copy) == [source.texts(index) for index in indices]
        assert copy.texts(1) == [[TRICKY[1], "another"]] and copy.name(1) == source.name(1)

    def test_the_fingerprint_changes_with_a_caption_and_is_the_same_without(
        self, tmp_path, open_split
    ):
        path = tmp_path / "list.csv"
        write_list(tmp_path, ["path", "caption", "y"], [["1.png", "a", "0"], ["2.png", "bc", "1"]])
        first, without = open_split(path), open_split(path, caption_column="none")
        path.write_text("path,caption,y\n1.png,ab,0\n2.png,c,1\n")
        assert open_split(path).fingerprint != first.fingerprint
        assert open_split(path, caption_column="none").fingerprint == without.fingerprint
        path.write_text("path,y\n1.png,0\n2.png,1\n")
        assert open_split(path).fingerprint == without.fingerprint


def test_packed_captions_are_small_and_equal_the_texts():
    captions = [["a", "bé"], [], ["", "c"], []]
    packed = PackedCaptions.pack(captions)
    assert [packed.captions(index) for index in range(4)] == captions
    taken = packed.take(np.array([2, 1, 0]))
    assert [taken.captions(index) for index in range(3)] == [captions[2], captions[1], captions[0]]
    many = PackedCaptions.pack([["x" * 50] * 5] * 1000)
    assert len(pickle.dumps(many)) < 300_000
    assert (
        PackedCaptions.pack([["ab"], []]).identity() != PackedCaptions.pack([[], ["ab"]]).identity()
    )


def test_blank_and_broken_texts_are_cleaned():
    assert clean_captions(["  a ", "\n", "b\ud83d", 3]) == ["a", "b?"]
    assert clean_captions(None) == clean_captions(7) == clean_captions({}) == []


class TestTables:
    @pytest.fixture
    def datasets(self):
        return pytest.importorskip("datasets", reason="the extra `data` is not installed")

    def table(self, datasets, **columns):
        """Return a data set with these columns, and the first images."""
        num_images = len(next(iter(columns.values())))
        images = [Image.fromarray(image) for image in IMAGES[:num_images]]
        return datasets.Dataset.from_dict({**columns, "image": images})

    def test_a_column_of_texts_or_lists_of_texts_has_the_captions(
        self, datasets, tmp_path, open_split
    ):
        texts = [*TRICKY[:3], None]
        lists = [["a", "b"], [], ["c", " "], None]
        table = self.table(datasets, caption=texts, sentences=lists)
        for folder, data in (("texts", table), ("lists", table.remove_columns("caption"))):
            data.to_parquet(tmp_path / f"{folder}.parquet")
        expected = [[[text]] for text in TRICKY[:3]] + [[[]]]
        assert texts_of(open_split(tmp_path / "texts.parquet")) == expected
        assert texts_of(open_object(table)) == expected
        expected = [[["a", "b"]], [[]], [["c"]], [[]]]
        assert texts_of(open_split(tmp_path / "lists.parquet")) == expected
        source = open_split(tmp_path / "texts.parquet", caption_column="sentences")
        assert texts_of(source) == expected
        assert open_split(tmp_path / "texts.parquet", caption_column="none").num_texts == 0

    def test_subsets_and_pickled_copies_keep_their_captions(self, datasets, tmp_path, open_split):
        table = self.table(datasets, text=[f"caption {number}" for number in range(10)])
        table.to_parquet(tmp_path / "data.parquet")
        source = open_split(tmp_path / "data.parquet")
        pickled = pickle.dumps(source.take(np.array([7, 2])))
        assert texts_of(pickle.loads(pickled)) == [[["caption 7"]], [["caption 2"]]]
        assert len(pickled) < 20_000

    def test_a_changed_caption_changes_the_fingerprint(self, datasets):
        fingerprints = {
            open_object(self.table(datasets, text=["a", text])).fingerprint for text in ("b", "c")
        }
        without = open_object(self.table(datasets, other=["a", "b"]))
        assert len(fingerprints) == 2 and without.num_texts == 0
        other = open_object(self.table(datasets, other=["a", "c"]))
        assert other.fingerprint == without.fingerprint

    def test_numbers_called_text_are_no_captions(self, datasets):
        assert open_object(self.table(datasets, text=[1, 2])).num_texts == 0

    def test_a_table_with_a_format_has_its_captions(self, datasets):
        table = self.table(datasets, text=["a", "b"]).with_format("numpy")
        assert texts_of(open_object(table)) == [[["a"]], [["b"]]]

    def test_a_wrong_column_is_explained(self, datasets, tmp_path, open_split):
        path = tmp_path / "data.parquet"
        self.table(datasets, text=["a"], number=[3], tags=[["x"]]).to_parquet(path)
        columns = "text (string), number (int64), tags (list of strings), image (Image)"
        assert error_of(open_split, path, caption_column="txt") == (
            f"data.caption_column: {path} has no column 'txt'; it has {columns}; choose one of "
            "them, or set data.caption_column=none"
        )
        assert error_of(open_split, path, caption_column="number") == (
            f"data.caption_column: the column 'number' of {path} contains int64 values, not texts; "
            f"the columns are {columns}"
        )


class Captioned(Dataset):
    """Pairs of an image and its captions, as in torchvision's COCO."""

    def __init__(self):
        self.num_reads = 0

    def __len__(self):
        return len(IMAGES)

    def __getitem__(self, index):
        self.num_reads += 1
        return Image.fromarray(IMAGES[index]), [f"image {index}", "a dog "][: index % 3]


class TestPythonObjects:
    def test_pairs_of_an_image_and_a_list_of_texts_have_captions(self):
        source = open_object(Captioned())
        assert source.num_texts == 1 and source.labels.tolist() == [-1] * 10
        assert source.texts(2) == [["image 2", "a dog"]]
        assert source.texts(3) == [[]] and source.texts(4) == [["image 4"]]
        subset = pickle.loads(pickle.dumps(source.take(np.array([8, 4]))))
        assert texts_of(subset) == [source.texts(8), source.texts(4)]

    def test_a_pair_of_an_image_and_one_text_has_a_label(self):
        source = open_object([(image, "cat") for image in IMAGES])
        assert source.num_texts == 0 and source.classes == ["cat"]

    @pytest.mark.parametrize("key", ["caption", "captions", "text"])
    def test_dicts_have_captions_and_labels(self, key):
        items = [{"image": image, "label": 1, key: "a dog"} for image in IMAGES]
        items[4] |= {key: ["x", "y"]}
        items[5].pop(key)
        items[6] |= {key: None}
        source = open_object(items)
        assert [source.texts(index) for index in (0, 4, 5, 6)] == [
            *([["a dog"]], [["x", "y"]], [[]], [[]]),
        ]
        assert source.labels.tolist() == [0] * 10 and source.classes == ["1"]

    def test_values_that_are_no_texts_are_no_captions(self):
        items = [{"image": image, "text": np.zeros(4)} for image in IMAGES]
        assert open_object(items).num_texts == 0

    def test_an_item_is_read_once_for_its_image_and_its_captions(self):
        data = Captioned()
        source = open_object(data)
        num_reads = data.num_reads
        for index in (1, 2, 2):
            source.read(index)
            source.texts(index)
        assert data.num_reads == num_reads + 3
        source.texts(2)  # the item is not kept for a second time
        source.read(1)
        assert source.texts(5) == [["image 5", "a dog"]]
        assert data.num_reads == num_reads + 6

    def test_captions_are_part_of_the_fingerprint(self):
        fingerprints = {
            open_object([{"image": image, "text": text} for image in IMAGES]).fingerprint
            for text in ("a", "a", "b")
        }
        assert len(fingerprints) == 2

    def test_captions_chosen_at_random_are_refused(self):
        class Random(Captioned):
            def __getitem__(self, index):
                return super().__getitem__(index)[0], [f"read {self.num_reads}"]

        assert error_of(open_object, Random()) == (
            "data: the caption of data[0] changes each time it is read; return all captions as a "
            "list, because pretraining chooses one of them itself"
        )

    def test_an_item_that_cannot_be_read_has_no_captions(self):
        class Broken(Captioned):
            def __getitem__(self, index):
                if index == 4:
                    raise OSError("no database")
                return super().__getitem__(index)

        with pytest.raises(UnreadableImage) as error:
            open_object(Broken()).texts(4)
        assert str(error.value) == "data[4]: no caption, OSError: no database"

    def test_the_setting_names_the_key_or_none(self):
        items = [{"image": image, "comment": "a", "size": 3} for image in IMAGES]
        assert open_object(items).num_texts == 0
        assert open_object(items, caption_column="comment").texts(0) == [["a"]]
        assert open_object(Captioned(), caption_column="none").num_texts == 0
        for key in ("other", "size"):
            assert error_of(open_object, items, caption_column=key) == (
                f"data.caption_column: data[0] has no text under {key!r}; its keys are image, "
                "comment, size; choose one of them, or set data.caption_column=none"
            )
        for data in (Captioned(), IMAGES, open_object(IMAGES)):
            assert error_of(open_object, data, caption_column="text") == (
                "data.caption_column: data has no columns; leave it out"
            )


def test_the_setting_is_refused_where_there_are_no_columns(tmp_path, open_split):
    Image.new("RGB", (4, 4)).save(tmp_path / "1.png")
    assert error_of(open_split, tmp_path, caption_column="text") == (
        f"data.caption_column: {tmp_path} has no columns; leave it out"
    )
    assert error_of(open_split, "", source="digits", caption_column="text") == (
        "data.caption_column: digits has no columns; leave it out"
    )
    assert open_split(tmp_path, caption_column="none").num_texts == 0
    np.save(tmp_path / "images.npy", IMAGES)
    assert error_of(open_split, tmp_path / "images.npy", caption_column="text") == (
        f"data.caption_column: {tmp_path}/images.npy has no columns; leave it out"
    )


def test_the_setting_applies_to_the_objects_of_a_function(tmp_path, monkeypatch):
    (tmp_path / "captioned_pets.py").write_text(
        "import numpy as np\n"
        "def load(split):\n"
        "    image = np.zeros((4, 4, 3))\n"
        "    return [{'image': image, 'comment': f'{split} {number}'} for number in (1, 2)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = DataConfig(source="captioned_pets:load", caption_column="comment", subset=1)
    assert texts_of(open_source(config, "train")) in ([[["train 1"]]], [[["train 2"]]])
    assert texts_of(open_source(config, "val")) == [[["val 1"]], [["val 2"]]]
