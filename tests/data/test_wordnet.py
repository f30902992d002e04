"""WordNet: glosses, the split by synset, the texts of each column, and the installed files."""

from pathlib import Path

import pytest
from reading import error_of

from ssl_pretrain.data.config import DataConfig
from ssl_pretrain.data.sources import open_source
from ssl_pretrain.data.texts import wordnet

LICENSE = "  1 This software and database is being provided to you, the LICENSEE, by  \n"
CAR = (
    "02958343 06 n 05 car 0 auto 0 automobile 0 machine 6 motorcar 0 001 @ 03791235 n 0000 | a "
    'motor vehicle with four wheels; usually propelled by an internal combustion engine; "he needs '
    'a car to get to work"  \n'
)
GALORE = (
    "00013887 00 s 01 galore(ip) 0 001 & 00013662 a 0000 | existing in abundance; "
    '"whiskey galore"  \n'
)
FILES = {"noun": CAR, "verb": "", "adj": GALORE, "adv": ""}


@pytest.fixture
def root(tmp_path):
    """Write the four files with two synsets."""
    for part, lines in FILES.items():
        (tmp_path / f"data.{part}").write_text(LICENSE + lines)
    return tmp_path


@pytest.mark.parametrize(
    ("gloss", "definition", "examples"),
    [
        ("a living thing  ", "a living thing", []),
        ('use up; "he ate"; "they drank, too"  ', "use up", ["he ate", "they drank, too"]),
        ('(law) a right; "x" - Shakespeare', "(law) a right", ["x"]),
        (' responsive;"an alert mind"', "responsive", ["an alert mind"]),
        (
            'be; "muscles tensed;" "the rope strained"',
            "be",
            ["muscles tensed", "the rope strained"],
        ),
        ('work (as in the phrase "make strides"); "they did"', None, ["they did"]),
        ('a demand in the phrase "the call of duty"', None, []),
    ],
)
def test_a_gloss_is_a_definition_and_quoted_examples(gloss, definition, examples):
    if definition is None:
        definition = gloss.removesuffix('; "they did"')
    assert wordnet.split_gloss(gloss) == (definition, examples)


def test_each_column_gives_its_texts(root):
    columns = ["words", "example", "entry"]
    config = DataConfig(source="wordnet", root=str(root), text_columns=columns)
    source = open_source(config, "train")  # contains both synsets
    assert source.texts(0) == [
        ["car", "auto", "automobile", "machine", "motorcar"],
        ["he needs a car to get to work"],
        [
            "car, auto, automobile, machine, motorcar: a motor vehicle with four wheels; usually "
            "propelled by an internal combustion engine"
        ],
    ]
    assert source.texts(1) == [["galore"], ["whiskey galore"], ["galore: existing in abundance"]]
    assert [source.classes[label] for label in source.labels] == ["noun.artifact", "adj.all"]


def test_the_split_is_a_function_of_the_synset():
    keys = [f"n{number:08d}" for number in range(20_000)]
    flags = [wordnet.Synset(key, 3, ["word"], "text", ["example"]).is_val for key in keys]
    assert 0.09 < sum(flags) / len(flags) < 0.11
    assert [number for number, flag in enumerate(flags[:30]) if flag] == [2, 5, 11, 13]
    assert not any(wordnet.Synset(key, 3, ["word"], "text", []).is_val for key in keys)


def test_each_split_has_its_own_synsets(root):
    lines = "".join(CAR.replace("02958343", f"{number:08d}") for number in range(14))
    (root / "data.noun").write_text(LICENSE + lines)
    config = DataConfig(source="wordnet", root=str(root))
    val, train = open_source(config, "val"), open_source(config, "train")
    expected = [f"{root}/data.noun:{number + 2}" for number in (2, 5, 11, 13)]
    assert [val.name(index) for index in range(len(val))] == expected
    assert len(train) == 14 - 4 + 1


def test_a_satellite_is_an_adjective():
    assert wordnet.parse_synset(GALORE).key == "a00013887"


def test_absent_files_are_answered_with_the_line_that_installs_them(tmp_path):
    config = DataConfig(source="wordnet", root=str(tmp_path))
    assert error_of(open_source, config, "train") == (
        f"data.root: {tmp_path}/data.noun does not exist; install WordNet with `apt-get install "
        "wordnet-base`, or give the folder with its data.noun in data.root"
    )


def test_an_unknown_column_is_refused(root):
    config = DataConfig(source="wordnet", root=str(root), text_columns=["gloss"])
    assert error_of(open_source, config, "train") == (
        "data.text_columns: WordNet has no column 'gloss'; choose among: example, definition, "
        "words, entry"
    )


def test_a_damaged_line_is_named(root):
    (root / "data.verb").write_text(LICENSE + "not a synset\n")
    assert error_of(open_source, DataConfig(source="wordnet", root=str(root)), "train") == (
        f"data.root: {root}/data.verb:2 is 'not a synset'..., not a synset of WordNet 3; install "
        "the files again"
    )


@pytest.fixture(scope="module")
def installed_splits():
    """The example and the definition of each synset in the installed files, by split."""
    if not Path(wordnet.DEFAULT_ROOT, "data.noun").exists():
        pytest.skip("WordNet is not installed; `apt-get install wordnet-base` installs it")
    config = DataConfig(source="wordnet")
    return {split: open_source(config, split) for split in ("train", "val")}


def test_the_installed_files_have_the_known_numbers_of_synsets(installed_splits):
    train, val = installed_splits["train"], installed_splits["val"]
    assert (len(train), len(val)) == (29_602, 3_318)
    assert train.num_texts == val.num_texts == 2
    assert not {train.name(index) for index in range(len(train))} & {
        val.name(index) for index in range(len(val))
    }


def test_every_installed_example_and_definition_is_a_text(installed_splits):
    val = installed_splits["val"]
    for index in range(len(val)):
        examples, definitions = val.texts(index)
        assert all('"' not in text and text == text.strip() for text in examples)
        assert len(definitions) == 1
    assert set(val.labels.tolist()) <= set(range(45))
