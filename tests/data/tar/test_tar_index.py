"""The index of a shard: what it holds, when it is renewed, and which shards are refused."""

import gzip
import os
import pickle
import re
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from tars import JPEG, Members, make_tar, open_shards

from ssl_pretrain.data.images import image_suffixes
from ssl_pretrain.data.tar import index_files, shard_index
from ssl_pretrain.data.tar.index_files import build_index, index_beside, local_shard, open_indexes
from ssl_pretrain.data.tar.shard_index import load_index

PNG_SUFFIXES = sorted(suffix for suffix in image_suffixes() if suffix.startswith(".p"))


def samples(n: int, **members: bytes) -> Members:
    members = members or {"jpg": JPEG}
    return [
        (f"{number:04d}.{suffix}", content)
        for number in range(n)
        for suffix, content in members.items()
    ]


def test_an_index_has_the_positions_of_images_labels_and_captions(tmp_path):
    members = [
        *[("a/1.jpg", JPEG), ("a/1.cls", b"7\n"), ("a/1.txt", b"a cat")],
        *[("a/2.JPEG", JPEG + b"2"), ("a/2.json", b'{"label": 3, "caption": "a dog"}')],
        *[("3.png", JPEG), ("3.json", b'{"cls": "4"}')],
        *[("4.webp", JPEG), ("4.cls", b"-1")],
    ]
    path = make_tar(tmp_path / "a.tar", members)
    source, content = open_shards(path), path.read_bytes()
    assert [source.key(index) for index in range(4)] == ["a/1", "a/2", "3", "4"]
    assert source.labels.tolist() == [7, 3, 4, -1]
    assert [source.read_bytes(index) for index in range(4)] == [JPEG, JPEG + b"2", JPEG, JPEG]
    spans = zip(source.caption_offset.tolist(), source.caption_length.tolist())
    captions = [content[start : start + length] for start, length in spans]
    assert captions == [b"a cat", members[4][1], b"", b""]
    assert source.notes == [f"1 of 4 images in {path} have no label (first: {path}, sample 4)"]
    assert source.name(1) == f"{path}, sample a/2"


@pytest.mark.parametrize("suffix", PNG_SUFFIXES)
def test_every_suffix_that_pillow_decodes_is_an_image(suffix, tmp_path):
    source = open_shards(make_tar(tmp_path / "a.tar", [(f"1{suffix}", JPEG)]))
    assert len(source) == 1


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_are_read(tar_format, tmp_path):
    keys = ["k" * 150, "folder/" * 40 + "é漢", "b"]
    members = [
        (f"{key}.{suffix}", content)
        for key in keys
        for suffix, content in (("jpg", JPEG), ("cls", b"1"))
    ]
    source = open_shards(make_tar(tmp_path / "a.tar", members, tar_format))
    assert [source.key(index) for index in range(3)] == keys
    assert source.labels.tolist() == [1, 1, 1]
    assert source.read_bytes(2) == JPEG


def test_what_is_not_read_is_counted_and_named(tmp_path):
    members = [
        *[("1.jpg", JPEG), ("1.mask.png", JPEG), ("1.npy", b"x"), ("2.cls", b"1")],
        *[("._3.jpg", JPEG), ("README", b"x"), ("4.jpg", JPEG)],
    ]
    source = open_shards(make_tar(tmp_path / "a.tar", members))
    assert [source.key(index) for index in range(len(source))] == ["1", "4"]
    assert source.notes == [
        f"left out in {tmp_path}/a.tar: 1 .mask.png members (first: 1.mask.png), 1 .npy members "
        "(first: 1.npy), 1 files without a suffix (first: README), 1 hidden or system entries "
        "(first: ._3.jpg), 1 samples without an image (first: 2)"
    ]


def test_folders_links_and_an_empty_shard_are_skipped(tmp_path):
    path = tmp_path / "a-0.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind in (("d", tarfile.DIRTYPE), ("l.jpg", tarfile.SYMTYPE)):
            header = tarfile.TarInfo(name)
            header.type, header.linkname = kind, "1.jpg"
            archive.addfile(header)
    make_tar(tmp_path / "a-1.tar", samples(2))
    source = open_shards(tmp_path)
    assert len(source) == 2
    assert source.notes == ["1 shards have no image (first: a-0.tar)"]


def refusal(path: Path, **options) -> str:
    with pytest.raises(ValueError) as error:
        open_shards(path, **options)
    return str(error.value).replace(f"{path.parent}/", "")


def test_a_truncated_shard_is_refused_with_its_offset(tmp_path):
    path = make_tar(tmp_path / "a.tar", samples(3, jpg=bytes(3000)))
    os.truncate(path, 5000)
    assert refusal(path) == (
        "data.root: a.tar is truncated, because it ends at offset 5,000 inside 0001.jpg, which "
        "begins at offset 3,584; copy or write the shard again"
    )
    os.truncate(path, 3584)
    assert refusal(path) == (
        "data.root: a.tar is truncated, because it ends at offset 3,584 before its end mark; copy "
        "or write the shard again"
    )
    os.truncate(path, 0)
    assert refusal(path) == (
        "data.root: a.tar has 0 bytes, as its writer was stopped or the disk was full; copy or "
        "write the shard again"
    )


def test_damaged_and_concatenated_shards_are_refused(tmp_path):
    path = make_tar(tmp_path / "a.tar", samples(2, jpg=bytes(100)))
    content = bytearray(path.read_bytes())
    path.write_bytes(content + content)
    assert refusal(path) == (
        "data.root: a.tar continues after its end mark at offset 2,048, as concatenated tars do; "
        "join them with `tar --concatenate`, or keep them as separate shards"
    )
    content[1024 + 5] ^= 1
    path.write_bytes(content)
    assert refusal(path) == (
        "data.root: a.tar is damaged, because the header at offset 1,024 is invalid; copy or write "
        "the shard again"
    )


def test_compressed_shards_are_refused(tmp_path):
    content = make_tar(tmp_path / "b.tar", samples(1)).read_bytes()
    expected = (
        "data.root: {} is compressed by gzip, so its images cannot be read in any order; "
        "decompress it once with `gunzip`, which costs little space because images are compressed "
        "already"
    )
    for name in ("a.tar.gz", "a.tar"):
        path = tmp_path / name.replace(".", "") / name
        path.parent.mkdir()
        path.write_bytes(gzip.compress(content))
        assert refusal(path) == expected.format(name)
        assert refusal(path.parent) == expected.format(f"{path.parent.name}/{name}")


def test_a_sparse_file_is_refused(tmp_path):
    path = make_tar(tmp_path / "a.tar", samples(1))
    content = bytearray(path.read_bytes())
    content[156:157] = b"S"
    content[148:156] = b"%06o\0 " % sum([*content[:148], *b" " * 8, *content[156:512]])
    path.write_bytes(content)
    assert refusal(path) == (
        "data.root: a.tar stores 0000.jpg as a sparse file, which is not read; write the shard "
        "again without tar's option --sparse"
    )


def test_ambiguous_samples_are_refused(tmp_path):
    path = make_tar(tmp_path / "a.tar", [("1.jpg", JPEG), ("1.png", JPEG)])
    assert refusal(path) == (
        "data.root: a.tar: the sample '1' at offset 0 has several images, 1.jpg and 1.png; keep "
        "one image per sample, or name the others with two suffixes, such as 1.mask.png"
    )
    path = make_tar(tmp_path / "a.tar", [("1.jpg", b"x"), ("2.jpg", b"x"), ("1.cls", b"3")])
    assert refusal(path) == (
        "data.root: a.tar has two samples with the key '1', at the offsets 0 and 2,048; give each "
        "sample its own key, and keep the members of a sample together"
    )


def test_unusable_labels_are_refused(tmp_path):
    path = make_tar(tmp_path / "a.tar", samples(1, jpg=b"x", cls=b"\x80\x02K\x07."))
    assert refusal(path) == (
        "data.root: a.tar: the label in 0000.cls at offset 1,024 is neither a number nor the name "
        "of a class; write a number as text"
    )
    path = make_tar(tmp_path / "a.tar", samples(1, jpg=b"x", json=b"{"))
    assert refusal(path).startswith(
        "data.root: a.tar: 0000.json at offset 1,024 is not valid JSON: Expecting property name"
    )
    path = make_tar(tmp_path / "a.tar", samples(1, jpg=b"x", cls=b"1000000"))
    assert refusal(path) == (
        "data.root: a.tar has the label 1,000,000, but it is too large; check classes.json or "
        "classes.txt and the labels in .cls or .json"
    )
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    path = make_tar(tmp_path / "a.tar", samples(1, jpg=b"x", cls=b"2"))
    assert refusal(path) == (
        "data.root: a.tar has the label 2, but there are only 2 classes; check classes.json or "
        "classes.txt and the labels in .cls or .json"
    )
    path = make_tar(tmp_path / "a.tar", samples(1, jpg=b"x", cls=b"bird"))
    assert refusal(path) == (
        "data.root: a.tar has the class 'bird', but the list of classes has only cat, dog; check "
        "the shards of both splits"
    )
    (tmp_path / "classes.json").write_text("3")
    assert refusal(path) == (
        "data.root: classes.json is not a list of class names; write a JSON list, such as "
        '["cat", "dog"], or delete the file'
    )


@pytest.mark.parametrize(
    "text", ['["cat", "dog"]', '{"0": "cat", "1": "dog"}', '{"dog": 1, "cat": 0}']
)
def test_class_names_come_from_a_file_beside_the_shards(text, tmp_path):
    (tmp_path / "classes.json").write_text(text)
    source = open_shards(make_tar(tmp_path / "a.tar", samples(1, jpg=b"x", cls=b"1")))
    assert (source.labels.tolist(), source.classes) == ([1], ["cat", "dog"])


def test_names_are_labels_too(tmp_path):
    make_tar(tmp_path / "train-0.tar", samples(1, jpg=b"x", cls=b"dog"))
    make_tar(tmp_path / "train-1.tar", samples(1, jpg=b"x", cls=b"cat"))
    make_tar(tmp_path / "val-0.tar", samples(1, jpg=b"x", cls=b"dog"))
    source, val = open_shards(tmp_path), open_shards(tmp_path, "val")
    assert (source.labels.tolist(), source.classes) == ([1, 0], ["cat", "dog"])
    assert (val.labels.tolist(), val.classes) == ([1], ["cat", "dog"])
    odd = open_shards(make_tar(tmp_path / "odd" / "a.tar", samples(1, jpg=b"x", cls=b"+-5")))
    assert (odd.labels.tolist(), odd.classes) == ([0], ["+-5"])


def test_shards_without_images_are_refused(tmp_path):
    path = make_tar(tmp_path / "a.tar", samples(2, tar=b"x"))
    assert refusal(path) == (
        "data.root: a.tar contains no image that Pillow can decode; give tars of images "
        "(NAME.jpg) in WebDataset's layout, which `ssl-pretrain shards write` makes; 2 samples "
        "without an image (first: 0000)"
    )


# Storing an index


def count_builds(monkeypatch) -> list[str]:
    built = []

    def build(shard, *arguments):
        built.append(os.path.basename(shard.path))
        return build_index(shard, *arguments)

    monkeypatch.setattr(index_files, "build_index", build)
    return built


def test_an_index_is_made_once_and_renewed_when_the_shard_changes(tmp_path, monkeypatch):
    built = count_builds(monkeypatch)
    path = make_tar(tmp_path / "a.tar", samples(3))
    assert len(open_shards(path)) == len(open_shards(path)) == 3
    assert built == ["a.tar"]
    make_tar(path, samples(5))
    assert len(open_shards(path)) == 5
    time.sleep(0.01)
    make_tar(path, samples(5, png=JPEG))  # the same size
    assert len(open_shards(path)) == 5
    assert built == ["a.tar"] * 3
    index_beside(path).write_bytes(index_beside(path).read_bytes()[:-1])
    assert len(open_shards(path)) == 5
    assert built == ["a.tar"] * 4


def test_a_flipped_bit_in_an_index_is_noticed(tmp_path):
    path = make_tar(tmp_path / "a.tar", samples(3))
    open_shards(path)
    content = bytearray(index_beside(path).read_bytes())
    content[-3] ^= 4
    index_beside(path).write_bytes(content)
    with pytest.raises(ValueError, match="it is damaged"):
        load_index(index_beside(path))


def test_the_cache_holds_the_index_of_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(index, path):
        if path.parent.name == "shards":
            raise PermissionError(13, "Permission denied")
        shard_index.save_index(index, path)

    monkeypatch.setattr(index_files, "save_index", refuse)
    built = count_builds(monkeypatch)
    path = make_tar(tmp_path / "shards" / "a.tar", samples(3))
    for _ in range(2):
        assert len(open_shards(path, cache_dir=str(tmp_path / "cache"))) == 3
    assert built == ["a.tar"]
    (tmp_path / "file").write_text("")
    assert refusal(path, cache_dir=str(tmp_path / "file")) == (
        f"data.cache_dir: the index of a.tar can be written neither to {path.parent} (Permission "
        f"denied) nor to {tmp_path}/file (File exists); give a folder that can be written, as in "
        "data.cache_dir=/scratch/cache"
    )
    index_beside(path).write_bytes(b"another shard")
    assert refusal(path, cache_dir=str(tmp_path / "file")) == (
        "data.cache_dir: the index a.tar.index is older than its shard or of another one, and a "
        f"new one can be written neither to {path.parent} (Permission denied) nor to "
        f"{tmp_path}/file (File exists); give a folder that can be written, as in "
        "data.cache_dir=/scratch/cache"
    )


def test_processes_build_the_same_indexes(tmp_path):
    paths = [make_tar(tmp_path / f"{k}.tar", samples(3, jpg=JPEG, cls=b"2")) for k in range(3)]
    shards = list(map(local_shard, paths))
    contents = []
    for num_processes in (1, 2):
        open_indexes(shards, tmp_path / "cache", num_processes)
        contents.append([index_beside(path).read_bytes() for path in paths])
        for path in paths:
            index_beside(path).unlink()
    assert contents[0] == contents[1]


def test_a_missing_shard_is_named(tmp_path):
    for number in (0, 2):
        make_tar(tmp_path / f"{number}.tar", samples(1))
    assert refusal(tmp_path / "{0..4}.tar") == (
        "data.root: 1.tar, 3.tar, 4.tar do not exist, of 5 shards; check the pattern, or copy the "
        "missing shards"
    )


def test_a_shard_that_changes_during_a_run_ends_it(tmp_path):
    path = make_tar(tmp_path / "a.tar", samples(3))
    source = open_shards(path)
    source.check_present()
    os.utime(path)
    with pytest.raises(ValueError, match="sample 0001: the shard was replaced or changed"):
        source.read(1)
    with pytest.raises(ValueError) as error:
        source.check_present()
    assert str(error.value) == (
        f"data.root: {path} was replaced or changed while it was being read; start the run again"
    )
    path.unlink()
    with pytest.raises(FileNotFoundError) as missing:
        source.check_present()
    assert str(missing.value) == (
        f"data.root: {path} no longer exists, but existed when the run began"
    )


def test_the_pickled_source_is_small(tmp_path):
    n = 2000
    path = make_tar(tmp_path / "a.tar", samples(n, jpg=b"x", cls=b"1"))
    source = open_shards(path)
    assert len(pickle.dumps(source)) < 60 * n
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy.offset, source.offset)
    assert re.fullmatch("[0-9a-f]{16}", copy.fingerprint)
    assert copy.fingerprint == source.fingerprint
