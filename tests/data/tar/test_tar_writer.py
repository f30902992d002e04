"""`shards write` makes the same bytes whatever interrupts it, from any source."""

import fcntl
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from betons import write_beton
from tars import JPEG, make_tar, open_shards, write_folder_and_shards

from ssl_pretrain.data.images import decode
from ssl_pretrain.data.sources import DataConfig, open_source
from ssl_pretrain.data.tar import tar_writer
from ssl_pretrain.data.tar.__main__ import main, parse_size
from ssl_pretrain.data.tar.index_files import index_beside
from ssl_pretrain.data.tar.tar_writer import ShardSize, write_shards


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_folder_and_shards(tmp_path_factory.mktemp("writer"))


def tar_bytes(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("*.tar"))]


def test_a_shard_has_the_images_unchanged_with_label_and_class(written):
    images, folder = written
    assert [path.name for path in sorted(folder.glob("*.tar"))] == [
        f"train-{number:06d}.tar" for number in range(5)
    ]
    with tarfile.open(folder / "train-000001.tar") as archive:
        contents = {
            member.name: archive.extractfile(member).read() for member in archive.getmembers()
        }
    assert list(contents)[:3] == ["000000012.jpg", "000000012.cls", "000000012.json"]
    assert contents["000000012.jpg"] == images.read_bytes(12)
    assert int(contents["000000012.cls"]) == images.label(12)
    assert json.loads(contents["000000012.json"]) == {
        "label": images.label(12),
        "class": images.classes[images.label(12)],
        "file": images.files.path(12),
    }
    assert json.loads((folder / "classes.json").read_text()) == images.classes
    shards = open_shards(folder)
    assert shards.labels.tolist() == images.labels.tolist()
    assert shards.classes == images.classes


def test_the_index_is_written_with_its_shard(written, monkeypatch):
    monkeypatch.setattr("ssl_pretrain.data.tar.index_files.build_index", None)
    assert len(open_shards(written[1])) == 50


@pytest.mark.parametrize("limits", [ShardSize(num_images=12), ShardSize(num_bytes=40_000)])
@pytest.mark.parametrize("num_samples", [1, 30])
def test_an_interrupted_write_is_continued(limits, num_samples, written, tmp_path, monkeypatch):
    images, _ = written
    whole = list(write_shards(images, tmp_path / "whole", "train", limits))
    assert sum(shard.num_images for shard in whole) == 50
    encode, calls = tar_writer.encode_sample, []

    def count(source, index):
        calls.append(index)
        if len(calls) == num_samples:
            raise KeyboardInterrupt
        return encode(source, index)

    monkeypatch.setattr(tar_writer, "encode_sample", count)
    with pytest.raises(KeyboardInterrupt):
        list(write_shards(images, tmp_path / "resumed", "train", limits))
    num_finished = len(tar_bytes(tmp_path / "resumed"))
    assert (num_finished > 0) == (num_samples > 1)
    calls[:] = [-1] * num_samples  # no further interruption
    resumed = list(write_shards(images, tmp_path / "resumed", "train", limits))
    first_index = sum(shard.num_images for shard in whole[:num_finished])
    assert calls[num_samples] == first_index
    assert [shard.num_images for shard in resumed] == [shard.num_images for shard in whole]
    assert tar_bytes(tmp_path / "resumed") == tar_bytes(tmp_path / "whole")
    assert not list((tmp_path / "resumed").glob("*.writing"))


def test_shards_keep_their_size_limit(written, tmp_path):
    list(write_shards(written[0], tmp_path, "train", ShardSize(num_bytes=40_000)))
    sizes = [path.stat().st_size for path in sorted(tmp_path.glob("*.tar"))]
    assert len(sizes) > 3
    assert max(sizes) <= 40_000
    assert min(sizes[:-1]) > 25_000


def test_shards_are_written_from_a_beton_arrays_and_shards(written, tmp_path):
    beton = write_beton(tmp_path / "images", 10)
    list(write_shards(beton, tmp_path / "a", "train", ShardSize(num_images=4)))
    shards = open_shards(tmp_path / "a")
    for index in range(10):
        np.testing.assert_array_equal(shards.read(index), beton.read(index))
    assert shards.labels.tolist() == beton.labels.tolist()
    digits = open_source(DataConfig(source="digits"), "val").take(np.arange(5))
    list(write_shards(digits, tmp_path / "b", "val", ShardSize(num_images=5)))
    with tarfile.open(tmp_path / "b" / "val-000000.tar") as archive:
        png = archive.extractfile("000000003.png").read()
    np.testing.assert_array_equal(decode(png, "x"), digits.read(3))
    list(write_shards(open_shards(written[1]), tmp_path / "c", "train", ShardSize(num_images=9)))
    copies = open_shards(tmp_path / "c")
    assert [copies.read_bytes(k) for k in range(50)] == [
        written[0].read_bytes(k) for k in range(50)
    ]


def test_unreadable_images_are_left_out_and_named(tmp_path, capsys):
    folder = tmp_path / "train"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.jpg").write_bytes(JPEG)
    (tmp_path / "gone").write_bytes(JPEG)
    images = open_source(DataConfig(root=str(tmp_path), cache_dir=str(tmp_path / "c")), "train")
    (folder / "2.jpg").unlink()
    shards = list(write_shards(images, tmp_path / "out", "train", ShardSize(num_images=2)))
    assert [shard.num_images for shard in shards] == [2, 1]
    assert shards[1].unreadable == [f"{folder}/2.jpg: No such file or directory"]


def test_shards_of_another_write_are_never_overwritten(written, tmp_path):
    images, _ = written
    list(write_shards(images, tmp_path, "train", ShardSize(num_images=30)))
    before = tar_bytes(tmp_path)
    with pytest.raises(ValueError) as error:
        list(write_shards(images, tmp_path, "train", ShardSize(num_images=20)))
    assert str(error.value) == (
        f"{tmp_path}/train-000000.tar is a shard of another write; delete the train shards of "
        f"{tmp_path}, or give another folder"
    )
    assert tar_bytes(tmp_path) == before
    other = images.take(np.flatnonzero(images.labels == 0))
    other.classes = ["other"]
    with pytest.raises(ValueError) as classes:
        list(write_shards(other, tmp_path, "val", ShardSize(num_images=20)))
    assert str(classes.value) == (
        f"{tmp_path}/classes.json has other classes than this source; give another folder, or "
        "delete it and its shards"
    )


def test_two_processes_do_not_write_the_same_shards(written, tmp_path):
    first = write_shards(written[0], tmp_path, "train", ShardSize(num_images=20))
    next(first)
    with pytest.raises(ValueError) as error:
        list(write_shards(written[0], tmp_path, "train", ShardSize(num_images=20)))
    assert str(error.value) == (
        f"{tmp_path}: another process is writing the train shards; wait until it ends, or stop it"
    )
    assert len(list(first)) == 2


def test_a_lock_that_another_write_removes_is_taken_again(written, tmp_path, monkeypatch):
    """A write may end after the next one has opened its lock, and before it has locked it."""
    path = tmp_path / ".train.lock"
    path.touch()
    flock, calls = fcntl.flock, []

    def end_first_write(file, operation):
        calls.append(operation)
        if len(calls) == 1:
            path.unlink()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", end_first_write)
    second = write_shards(written[0], tmp_path, "train", ShardSize(num_images=20))
    next(second)
    with pytest.raises(ValueError, match="another process is writing"):
        list(write_shards(written[0], tmp_path, "train", ShardSize(num_images=20)))
    assert len(list(second)) == 2
    assert not path.exists()


def test_the_command_writes_both_splits_and_inspect_reads_them(tmp_path, capsys):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(3):
                (folder / f"{number}.jpg").write_bytes(JPEG)
    out = tmp_path / "shards"
    for split in ("train", "val"):
        arguments = [str(tmp_path / "images"), str(out), "--split", split, "--shard-size", "10K"]
        assert main(["write", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{out}: 6 train images in ")
    for path in out.glob("*.index"):
        path.unlink()
    assert main(["index", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" in ")[0] for line in lines] == [
        "train: 6 images, 2 classes (cat, dog),",
        "val: 6 images, 2 classes (cat, dog),",
    ]
    assert all(index_beside(path).exists() for path in out.glob("*.tar"))
    result = subprocess.run(
        [sys.executable, "-m", "ssl_pretrain.planning.inspect", str(out)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "training " in result.stdout
    assert ": 6 images, 2 classes (cat, dog); validation " in result.stdout
    assert "  modes   RGB 6" in result.stdout


def test_the_command_writes_the_columns_that_its_options_name(tmp_path):
    generator = np.random.default_rng(0)
    left, right = generator.integers(0, 256, (2, 6, 12, 9, 3), dtype=np.uint8)
    arrays = {"left": left, "right": right, "kind": np.arange(6) % 2, "grade": np.arange(6) % 3}
    np.savez(tmp_path / "cells.npz", **arrays)
    root = str(tmp_path / "cells.npz")
    for column, labels in (("kind", [0, 1] * 3), ("none", [-1] * 6)):
        folder = tmp_path / column
        options = ["--image-column", "right", "--label-column", column]
        assert main(["write", root, str(folder), *options]) == 0
        shards = open_shards(folder)
        assert shards.labels.tolist() == labels
        np.testing.assert_array_equal(shards.read(3), right[3])


def test_the_command_refuses_wrong_arguments(tmp_path, capsys):
    assert main(["index", str(make_tar(tmp_path / "a" / "1.tar", []).parent.parent)]) == 2
    assert "error: data.root: " in capsys.readouterr().err
    for text, size in (("1GB", 10**9), ("500m", 5 * 10**8), ("2.5 kb", 2500), ("7", 7)):
        assert parse_size(text) == size
    with pytest.raises(SystemExit):
        main(["write", "a", "b", "--shard-size", "big"])
    assert "'big' is not a size; give one such as 1GB or 500MB" in capsys.readouterr().err
