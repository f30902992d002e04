"""Captions in the .txt and .json members of tar shards."""

import json
import pickle

import numpy as np
import pytest
from PIL import Image
from reading import error_of, texts_of
from tars import JPEG, make_tar, open_shards

from ssl_pretrain.data.images import UnreadableImage
from ssl_pretrain.data.sources import DataConfig, open_source
from ssl_pretrain.data.tar.tar_writer import ShardSize, write_shards

CAPTIONS = {
    "txt": ('un café, "rouge"\nà midi\n', ['un café, "rouge"\nà midi']),
    "blank": (" \n", []),
    "brace": ("{a} dog", ["{a} dog"]),
    "json": ({"caption": "a dog"}, ["a dog"]),
    "list": ({"caption": ["a dog", " ", "a hound"]}, ["a dog", "a hound"]),
    "captions": ({"captions": ["a", "b"], "caption": ""}, ["a", "b"]),
    "text": ({"text": "a cat", "label": 3}, ["a cat"]),
    "number": ({"caption": 3}, []),
}


def members_of(captions: dict) -> list[tuple[str, bytes]]:
    members = []
    for key, (value, _) in captions.items():
        is_json = isinstance(value, dict)
        content = json.dumps(value) if is_json else value
        members += [
            (f"{key}.jpg", JPEG),
            (f"{key}.{'json' if is_json else 'txt'}", content.encode()),
        ]
    return members


@pytest.fixture
def source(tmp_path):
    return open_shards(make_tar(tmp_path / "a.tar", members_of(CAPTIONS)))


def test_a_txt_is_one_caption_and_a_json_has_one_or_several(source):
    assert texts_of(source) == [[expected] for _, expected in CAPTIONS.values()]


def test_subsets_and_pickled_copies_keep_their_captions(source):
    indices = np.array([4, 0, 7])
    copy = pickle.loads(pickle.dumps(source.take(indices)))
    assert texts_of(copy) == [source.texts(index) for index in indices]


def test_shards_that_are_written_again_have_the_same_captions(source, tmp_path):
    list(write_shards(source, tmp_path / "copy", "train", ShardSize(num_images=3)))
    assert texts_of(open_shards(tmp_path / "copy")) == texts_of(source)


def test_captions_of_a_list_are_written_to_shards(tmp_path):
    for name in ("1.png", "2.png", "3.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "list.csv").write_text("path,caption\n1.png,a\n2.png,b\n1.png,c\n3.png,\n")
    config = DataConfig(root=str(tmp_path / "list.csv"), cache_dir=str(tmp_path / "cache"))
    source = open_source(config, "train")
    list(write_shards(source, tmp_path / "shards", "train", ShardSize()))
    expected = [[["a", "c"]], [["b"]], [[]]]
    assert texts_of(source) == texts_of(open_shards(tmp_path / "shards")) == expected


def test_captions_do_not_change_the_fingerprint_of_shards(source, tmp_path):
    members = [(name, content) for name, content in members_of(CAPTIONS) if name.endswith("jpg")]
    without = open_shards(make_tar(tmp_path / "b.tar", members))
    assert without.num_texts == 0
    unlabeled = open_shards(tmp_path / "a.tar")
    unlabeled.labels, unlabeled.classes = without.labels, without.classes
    assert unlabeled.fingerprint == without.fingerprint


def test_the_setting_names_no_column_of_a_shard(source, tmp_path):
    assert error_of(open_shards, tmp_path / "a.tar", caption_column="text") == (
        f"data.caption_column: {tmp_path}/a.tar has no columns; leave it out"
    )
    assert open_shards(tmp_path / "a.tar", caption_column="none").texts(0) == []


def test_a_shard_that_was_truncated_has_unreadable_captions(source, tmp_path):
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(UnreadableImage) as error:
        source.texts(0)
    assert str(error.value).startswith(f"{tmp_path}/a.tar, sample txt: ")
