"""The shards of a split are found by names: folders, files and patterns."""

from pathlib import Path

import pytest
from tars import JPEG, make_tar, open_shards

from ssl_pretrain.data.image_source import ImageFiles, NoSuchSplit
from ssl_pretrain.data.sources import DataConfig, open_source
from ssl_pretrain.data.tar.shard_patterns import expand_braces


def make(root: Path, *names: str) -> Path:
    for name in names:
        make_tar(root / name, [(f"{Path(name).stem}.jpg", JPEG)])
    return root


def keys(root: Path | str, split: str = "train", **options) -> list[str]:
    source = open_shards(root, split, **options)
    return [source.key(index) for index in range(len(source))]


@pytest.mark.parametrize(
    ("names", "train", "val"),
    [
        (["train-1.tar", "train-0.tar", "val-0.tar"], ["train-0", "train-1"], ["val-0"]),
        (["x-train-0.tar", "x-test-0.tar"], ["x-train-0"], ["x-test-0"]),
        (["train-0.tar", "val.tar", "test.tar"], ["train-0"], ["val"]),
        (["train/1.tar", "validation/2.tar"], ["1"], ["2"]),
        (["b.tar", "a.tar"], ["a", "b"], None),
    ],
)
def test_splits_of_a_folder_are_found_by_name(names, train, val, tmp_path):
    make(tmp_path, *names)
    assert keys(tmp_path) == train
    if val is not None:
        assert keys(tmp_path, "val") == val
        return
    with pytest.raises(NoSuchSplit) as error:
        open_shards(tmp_path, "val")
    assert str(error.value) == (
        f"data.val: {tmp_path} has no shards for validation, such as val-000000.tar; name them, as "
        "in data.val=PATTERN, or leave out evaluations that need them"
    )


def test_keys_name_the_shards_of_a_split(tmp_path):
    make(tmp_path, *(f"{k:02d}.tar" for k in range(4)))
    assert keys(tmp_path, train="{00..02}.tar", val="03.tar") == ["00", "01", "02"]
    assert keys(tmp_path, "val", train="{00..02}.tar", val="03.tar") == ["03"]
    assert keys("", "val", val=f"{tmp_path}/{{01,03}}.tar") == ["01", "03"]
    assert keys(tmp_path, train=".") == ["00", "01", "02", "03"]
    assert keys(tmp_path / "{00..01}.tar") == ["00", "01"]
    assert keys(tmp_path / "02.tar") == ["02"]
    for options in ({"train": "00.tar", "val": "none"}, {"train": "."}):
        with pytest.raises(NoSuchSplit):
            open_source(DataConfig(root=str(tmp_path), **options), "val")


def test_images_beside_tars_are_read_as_before(tmp_path):
    make(tmp_path, "ILSVRC2012_img_val.tar")
    (tmp_path / "train" / "cat").mkdir(parents=True)
    (tmp_path / "train" / "cat" / "1.jpg").write_bytes(JPEG)
    source = open_source(DataConfig(root=str(tmp_path), cache_dir=str(tmp_path / "c")), "train")
    assert isinstance(source, ImageFiles)


def test_shards_of_no_split_beside_others_are_refused(tmp_path):
    make(tmp_path, "train-0.tar", "other.tar")
    with pytest.raises(ValueError) as error:
        open_shards(tmp_path)
    assert str(error.value) == (
        f"data.root: {tmp_path} has shards of no split (other.tar) beside those of splits; say "
        "which are which, as in data.train=other.tar data.val=none"
    )


def test_a_folder_without_training_shards_is_refused(tmp_path):
    make(tmp_path, "val-0.tar")
    with pytest.raises(ValueError) as error:
        open_shards(tmp_path)
    assert str(error.value) == (
        f"data.train: {tmp_path} has shards for val, but none for training; name them, as in "
        "data.train=PATTERN"
    )


def test_braces_stand_for_numbers_and_words():
    assert expand_braces("a{08..11}b") == ["a08b", "a09b", "a10b", "a11b"]
    assert expand_braces("{a,b}-{0..1}") == ["a-0", "a-1", "b-0", "b-1"]
    assert expand_braces("plain") == ["plain"]
    with pytest.raises(ValueError) as error:
        expand_braces("x-{9..3}.tar")
    assert str(error.value) == (
        "data.root: x-{9..3}.tar has the invalid range {9..3}; give the lower number first, as in "
        "{000000..000146}"
    )


def test_a_shard_that_is_named_twice_is_refused(tmp_path):
    with pytest.raises(ValueError) as error:
        open_shards(tmp_path / "{a,a}.tar")
    assert str(error.value) == (
        f"data.root: {tmp_path}/{{a,a}}.tar names a shard twice; name each one once"
    )
