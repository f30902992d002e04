"""Texts without images: files of sentences, pairs and triplets, their splits and refusals."""

import json
import pickle

import numpy as np
import pytest
from reading import error_of

from ssl_pretrain.data.config import DataConfig
from ssl_pretrain.data.image_source import NoSuchSplit
from ssl_pretrain.data.sources import open_source
from ssl_pretrain.system import optional_packages

TRIPLETS = (
    "sent0,sent1,hard_neg\n"
    'A man plays a guitar.,A man makes music.,"No one, it is said, plays."\n'
    'Two dogs run.,"Dogs are\nmoving.",The dogs sleep.\n'
    "Empty,,negative\n"
    "Zoë sings.,A woman sings.,She is silent.\n"
)
TRIPLET_TEXTS = [
    [["A man plays a guitar."], ["A man makes music."], ["No one, it is said, plays."]],
    [["Two dogs run."], ["Dogs are\nmoving."], ["The dogs sleep."]],
    [["Zoë sings."], ["A woman sings."], ["She is silent."]],
]


@pytest.fixture
def open_file(tmp_path):
    """Return a function that writes a file of texts and opens it."""

    def open_file(name, content, split="train", **options):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        options = {"source": "texts", "root": str(path)} | options
        return open_source(DataConfig(**options), split)

    return open_file


def all_texts(source):
    return [source.texts(index) for index in range(len(source))]


def write_json_lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def test_each_line_of_a_text_file_is_a_sentence(open_file, tmp_path):
    source = open_file("wiki.txt", " One sentence. \r\n\nAnother, with a comma\n \nLast")
    assert all_texts(source) == [[["One sentence."]], [["Another, with a comma"]], [["Last"]]]
    assert (source.num_texts, source.has_images, source.labels.tolist()) == (1, False, [-1] * 3)
    assert source.name(2) == f"{tmp_path}/wiki.txt:5"
    assert source.notes == [
        f"2 of 5 records in {tmp_path}/wiki.txt are skipped, because a text is empty "
        "(first: line 2)"
    ]


def test_a_byte_order_mark_is_not_part_of_the_first_text(open_file):
    content = "\ufefffirst\nsecond\n"
    assert all_texts(open_file("a.txt", content)) == [[["first"]], [["second"]]]
    content = "\ufeffsent0,sent1\na,b\n"
    assert all_texts(open_file("a.csv", content)) == [[["a"], ["b"]]]


def test_a_carriage_return_inside_a_line_does_not_end_the_sentence(open_file):
    assert all_texts(open_file("a.txt", "one\rtwo\nthree\n")) == [[["one\rtwo"]], [["three"]]]


def test_triplets_of_simcse_are_found_by_their_titles(open_file, tmp_path):
    source = open_file("nli.csv", TRIPLETS)
    assert all_texts(source) == TRIPLET_TEXTS
    assert source.num_texts == 3
    assert [source.name(index).rpartition(":")[2] for index in range(3)] == ["2", "3", "6"]
    assert source.notes == [
        f"the texts of {tmp_path}/nli.csv are in the columns sent0, sent1, hard_neg",
        f"1 of 4 records in {tmp_path}/nli.csv are skipped, because a text is empty "
        "(first: line 5)",
    ]


@pytest.mark.parametrize(
    ("titles", "columns"),
    [
        ("anchor,positive,negative", 3),
        ("positive,anchor", [1, 0]),
        ("Query,Positive Passage", 2),
        ("id,question,answer,url", [1, 2]),
        ("score,sentence1,sentence2", [1, 2]),
        ("english,german", 2),
        ("sentence,label", [0]),
    ],
)
def test_usual_titles_give_the_order_of_the_texts(open_file, titles, columns):
    cells = [f"text {number}" for number in range(titles.count(",") + 1)]
    source = open_file("a.csv", f"{titles}\n{','.join(cells)}\n")
    columns = range(columns) if isinstance(columns, int) else columns
    assert all_texts(source) == [[[cells[column]] for column in columns]]


def test_columns_can_be_named_and_their_order_chosen(open_file):
    options = {"text_columns": ["hard_neg", "sent0"]}
    source = open_file("nli.csv", TRIPLETS, **options)
    assert source.texts(0) == [["No one, it is said, plays."], ["A man plays a guitar."]]
    options = {"text_columns": ["sent1", "sent0", "hard_neg"]}  # the same records are complete
    fingerprint = open_file("nli.csv", TRIPLETS).fingerprint
    assert open_file("nli.csv", TRIPLETS, **options).fingerprint != fingerprint


def test_a_table_without_titles_is_read_in_order(open_file):
    rows = 'He is here.\tShe said "no.\n\nIs it?\tIt\'s "so"\n'
    source = open_file("pairs.tsv", rows)  # quotation marks have no meaning in a .tsv
    assert all_texts(source) == [
        [["He is here."], ['She said "no.']],
        [["Is it?"], ['It\'s "so"']],
    ]


def test_labels_are_the_classes_of_both_splits(open_file, tmp_path):
    (tmp_path / "dev.csv").write_text("sentence,label\nfive,a\nsix,b\n")
    rows = "sentence,label\none,b\ntwo,c\nthree,a\nfour,\n"
    train = open_file("train.csv", rows)
    assert (train.labels.tolist(), train.classes) == ([1, 2, 0, -1], ["a", "b", "c"])
    config = DataConfig(source="texts", root=str(tmp_path))
    val = open_source(config, "val", train.classes)
    assert (val.labels.tolist(), val.classes) == ([0, 1], train.classes)
    assert open_file("train.csv", rows, label_column="none").labels.tolist() == [-1] * 4


def test_json_lines_hold_texts_passages_and_lists_of_them(open_file):
    content = write_json_lines(
        {
            "query_id": 1,
            "query": "who?",
            "positive_passages": [{"docid": "d", "title": "T", "text": "it was"}],
            "negative_passages": [{"title": "", "text": "no"}, {"text": "nor this"}],
        },
        {"query_id": 2, "query": "no negative", "positive_passages": [{"text": "p"}]},
    )
    source = open_file("train.jsonl", content + "\n")
    assert all_texts(source) == [[["who?"], ["T it was"], ["no", "nor this"]]]
    content = write_json_lines({"query": "q", "pos": ["a", "b"], "neg": ["c"]})
    assert all_texts(open_file("bge.jsonl", content)) == [[["q"], ["a", "b"], ["c"]]]


def test_parquet_has_the_same_texts(open_file, tmp_path):
    datasets = pytest.importorskip("datasets", reason="the extra `data` is not installed")
    rows = [
        dict(zip(("anchor", "positive"), pair)) for pair in (("a", "b"), (" ", "c"), ("d", "e"))
    ]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "pairs.parquet"))
    config = DataConfig(source="texts", root=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    source = pickle.loads(pickle.dumps(open_source(config, "train")))
    assert all_texts(source) == [[["a"], ["b"]], [["d"], ["e"]]]
    assert source.take(np.array([1])).texts(0) == [["d"], ["e"]]
    assert source.name(1) == f"{tmp_path}/pairs.parquet[2]"
    assert source.notes[1].startswith("1 of 3 records")


def test_parquet_without_the_library_names_the_remedy(open_file, monkeypatch):
    monkeypatch.setattr(optional_packages, "is_installed", lambda name: False)
    message = error_of(open_file, "a.parquet", b"")
    assert (
        "datasets is not installed; install it with `pip install '.[data]'` in a clone" in message
    )


def test_a_subset_and_a_copy_for_a_worker_read_the_same_texts(open_file):
    source = open_file("nli.csv", TRIPLETS)
    source.texts(0)  # opens the file
    subset = pickle.loads(pickle.dumps(source.take(np.array([2, 0]))))
    assert all_texts(subset) == [TRIPLET_TEXTS[2], TRIPLET_TEXTS[0]]
    assert subset.fingerprint != source.fingerprint


def test_a_pickled_source_does_not_contain_its_texts(open_file):
    source = open_file("a.txt", "".join(f"{number} {'x' * 500}\n" for number in range(2000)))
    assert len(pickle.dumps(source)) < 30 * len(source)


def test_the_fingerprint_depends_on_the_content_and_not_on_the_path(open_file):
    fingerprint = open_file("a.txt", "one\ntwo\n").fingerprint
    assert open_file("b.txt", "one\ntwo\n").fingerprint == fingerprint
    assert open_file("b.txt", "one\ntwa\n").fingerprint != fingerprint


def test_a_file_that_changed_is_refused(open_file, tmp_path):
    source = open_file("a.txt", "one\ntwo\n")
    (tmp_path / "a.txt").write_text("other\ntexts\n")
    assert error_of(source.texts, 0) == (
        f"data.root: {tmp_path}/a.txt has changed since it was opened; start the run again"
    )
    (tmp_path / "a.txt").unlink()
    with pytest.raises(FileNotFoundError, match="no longer exists, but existed when the run began"):
        source.check_present()


def test_pixels_are_refused(open_file):
    with pytest.raises(NotImplementedError, match=r"a\.txt contains texts and no images"):
        open_file("a.txt", "one").read(0)


def test_splits_of_a_folder_are_found_by_name(tmp_path):
    for name in ("train", "dev", "test"):
        (tmp_path / f"{name}.txt").write_text(f"text of {name}")

    def text(split, **options):
        config = DataConfig(source="texts", root=str(tmp_path), **options)
        return open_source(config, split).texts(0)[0][0]

    assert (text("train"), text("val")) == ("text of train", "text of dev")
    assert text("val", val="test.txt") == "text of test"
    assert text("train", train="dev.txt") == "text of dev"
    with pytest.raises(NoSuchSplit, match=r"data\.val: there are no validation texts"):
        text("val", val="none")


def test_a_single_file_has_no_validation_split_unless_it_is_named(open_file, tmp_path):
    (tmp_path / "b.txt").write_text("two")
    assert open_file("a.txt", "one", "val", val="b.txt").texts(0) == [["two"]]
    with pytest.raises(NoSuchSplit) as error:
        open_file("a.txt", "one", "val")
    assert str(error.value) == (
        f"data.val: {tmp_path}/a.txt is a single file; name the validation texts, as in "
        "data.val=dev.tsv"
    )


REFUSED_FILES = {
    "latin-1": (
        ("a.txt", b"fine\ncaf\xe9\n"),
        "data.root: PATH:2 is not UTF-8 (byte 0xe9 at position 4 of the line); convert the file, "
        "for example with `iconv -f WINDOWS-1252 -t UTF-8 PATH`",
    ),
    "too many cells": (
        ("a.csv", "sent0,sent1\na,b\nOh, well, yes\n"),
        "data.root: PATH:3 has 3 cells, and the first row 2; put a cell that contains the "
        "delimiter in quotation marks, or give a .jsonl",
    ),
    "open quotation": (
        ("a.csv", 'sent0,sent1\na,b\n"c,d\n'),
        "data.root: PATH:3 is not a row of a table (unexpected end of data); close its quotation "
        "marks, and double those inside",
    ),
    "not JSON": (
        ("a.jsonl", '{"query": "q", "pos": "p"}\n{"query": }\n'),
        "data.root: PATH:2 is not JSON (Expecting value: line 1 column 11 (char 10)); write one "
        "object per line",
    ),
    "a list": (
        ("a.jsonl", "[1, 2]\n"),
        "data.root: PATH:1 is '[1, 2]', not a JSON object; write one object per line",
    ),
    "a number": (
        ("a.jsonl", '{"query": "q", "pos": 7}\n'),
        "data.root: PATH:1 has no text in 'pos': 7 is no text; give a text, a list of texts, or "
        "passages with the key 'text'",
    ),
    "empty": (
        ("a.txt", "\n\n"),
        "data.root: PATH has no record in which every text is present; check the file and "
        "data.text_columns",
    ),
    "unusual titles": (
        ("a.csv", "w,x,y,z\n1,2,3,4\n"),
        "data.text_columns: PATH has the columns w, x, y, z, of which none have the usual names; "
        "name those of the texts, as in data.text_columns=[w,x]",
    ),
    "no titles": (
        ("a.csv", "a b,c d,e f,g h\n"),
        "data.text_columns: PATH has 4 columns without titles; add a first line with their "
        "titles, and name those of the texts, as in data.text_columns=[sent0,sent1]",
    ),
    "kind": (
        ("a.docx", b""),
        "data.root: PATH is a file of an unsupported kind; give a file of texts (.txt, .csv, "
        ".tsv, .jsonl, .parquet, .arrow) or a folder with train.txt",
    ),
}


@pytest.mark.parametrize("name", REFUSED_FILES)
def test_damaged_files_are_refused_with_the_line_and_the_remedy(open_file, tmp_path, name):
    (file_name, content), message = REFUSED_FILES[name]
    assert error_of(open_file, file_name, content) == message.replace(
        "PATH", str(tmp_path / file_name)
    )


REFUSED_SETTINGS = {
    "column": (
        {"text_columns": ["sent2"]},
        "data.text_columns: ROOT/nli.csv has no column 'sent2'; it has sent0, sent1, hard_neg",
    ),
    "label": (
        {"label_column": "topic"},
        "data.label_column: ROOT/nli.csv has no column 'topic'; it has sent0, sent1, hard_neg",
    ),
    "four columns": (
        {"text_columns": list("abcd")},
        "data.text_columns: ['a', 'b', 'c', 'd'] are 4 columns; give one for sentences, two for "
        "pairs, or three for pairs with a hard negative",
    ),
    "images": (
        {"image_column": "picture"},
        "data.image_column: texts has no images; leave it out, or name the columns of the texts "
        "in data.text_columns",
    ),
    "digits": (
        {"source": "digits", "text_columns": ["a"]},
        "data.text_columns: digits has no texts; leave it out, or set data.source to texts or "
        "wordnet",
    ),
    "no root": (
        {"root": ""},
        "data.root: no path is set; give a file of texts (.txt, .csv, .tsv, .jsonl, .parquet, "
        ".arrow) or a folder with train.txt",
    ),
    "absent": (
        {"train": "other.csv"},
        "data.train: ROOT/other.csv does not exist; give a file of texts (.txt, .csv, .tsv, "
        ".jsonl, .parquet, .arrow) or a folder with train.txt",
    ),
}


@pytest.mark.parametrize("name", REFUSED_SETTINGS)
def test_wrong_settings_are_refused_with_the_remedy(open_file, tmp_path, name):
    options, message = REFUSED_SETTINGS[name]
    expected = message.replace("ROOT", str(tmp_path))
    assert error_of(open_file, "nli.csv", TRIPLETS, **options) == expected


def test_sentences_have_no_columns(open_file, tmp_path):
    assert error_of(open_file, "a.txt", "one", text_columns=["text"]) == (
        f"data.text_columns: {tmp_path}/a.txt has one sentence per line and no columns; leave it "
        "out"
    )


def test_an_ambiguous_folder_is_refused(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("text")
    assert error_of(open_source, DataConfig(source="texts", root=str(tmp_path)), "train") == (
        f"data.train: {tmp_path} contains a.txt, b.txt; name the training texts, as in "
        "data.train=train.txt"
    )
