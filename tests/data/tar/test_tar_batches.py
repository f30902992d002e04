"""Batches from tar shards equal those of the folder, whatever reads and wherever a run began."""

import itertools
import shutil

import numpy as np
import pytest
from tars import (
    VIEWS,
    build_loader,
    digest,
    digests,
    make_tar,
    open_shards,
    write_folder_and_shards,
)

from ssl_pretrain.data.image_source import Source
from ssl_pretrain.data.images import UnreadableImage
from ssl_pretrain.data.tar.tar_source import TarShards

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
NUM_STEPS = 9  # two epochs of 50 images and a step


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> tuple[Source, TarShards]:
    images, folder = write_folder_and_shards(tmp_path_factory.mktemp("tar"))
    return images, open_shards(folder)


@pytest.fixture(scope="module")
def expected(sources) -> list[str]:
    return digests(build_loader(sources[0], VIEWS), 0, NUM_STEPS)


@pytest.mark.parametrize(
    ("kind", "num_workers"), [("folder", 0), ("folder", 2), ("threads", 1), ("threads", 3)]
)
def test_shards_give_the_batches_of_their_folder(kind, num_workers, sources, expected):
    loader = build_loader(sources[1], VIEWS, kind, num_workers=num_workers)
    assert digests(loader, 0, NUM_STEPS) == expected


@pytest.mark.parametrize("kind", ["folder", "threads"])
@pytest.mark.parametrize("first", [1, 4, 7])
def test_resumed_batches_equal_uninterrupted_ones(kind, first, sources, expected):
    assert digests(build_loader(sources[1], VIEWS, kind), first, 2) == expected[first : first + 2]


@pytest.mark.parametrize("window", [0, 64])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_make_up_the_global_batch(window, world_size, tmp_path):
    images, folder = write_folder_and_shards(tmp_path, 200, 33)
    shards = open_shards(folder)
    with build_loader(images, VIEWS, window=window) as loader:
        batches = list(itertools.islice(loader.iterate_from(14), 4))
    for rank in range(world_size):
        rows = slice(rank * 12 // world_size, (rank + 1) * 12 // world_size)
        for kind in ("threads", "folder"):
            loader = build_loader(
                shards, VIEWS, kind, rank=rank, world_size=world_size, window=window
            )
            with loader:
                for batch, whole in zip(loader.iterate_from(14), batches):
                    assert batch.indices.equal(whole.indices[rows])
                    assert batch.labels.equal(whole.labels[rows])
                    for view, whole_view in zip(batch.views, whole.views):
                        assert view.equal(whole_view[rows])


def test_prefetching_ends_at_the_end_of_a_shard(sources, monkeypatch):
    shards = sources[1]
    requests = []
    monkeypatch.setattr(
        "ssl_pretrain.data.tar.tar_source.os.posix_fadvise",
        lambda _file, offset, length, _advice: requests.append((offset, length)),
    )
    for first, last in ((0, 11), (10, 11), (12, 20)):  # a shard has 12 images
        requests.clear()
        shards.prefetch(first, 9 if first == 12 else 14)
        end = shards.offset[last] + shards.length[last]
        assert requests == [(shards.offset[first], end - shards.offset[first])]


def test_a_subset_reads_its_images(sources):
    indices = np.array([40, 3, 17])
    subset = sources[1].take(indices)
    assert [subset.name(k) for k in range(3)] == [sources[1].name(k) for k in indices.tolist()]
    assert [subset.read_bytes(k) for k in range(3)] == [
        sources[0].read_bytes(k) for k in indices.tolist()
    ]
    assert subset.fingerprint != sources[1].fingerprint


def test_a_damaged_image_is_named_and_replaced(tmp_path):
    images, _ = write_folder_and_shards(tmp_path)
    members = [(f"{k}.jpg", b"damaged" if k == 7 else images.read_bytes(k)) for k in range(50)]
    path = make_tar(tmp_path / "a.tar", members)
    source = open_shards(path)
    with pytest.raises(UnreadableImage, match=r"a\.tar, sample 7: not a known image format"):
        source.read(7)
    results = []
    for kind in ("folder", "threads"):
        with (
            pytest.warns(UserWarning, match="sample 7: .* takes its place"),
            build_loader(source, VIEWS, kind, max_replaced=0.1) as loader,
        ):
            results.append([digest(b) for b in itertools.islice(loader.iterate_from(0), 5)])
    assert results[0] == results[1]


def test_the_fingerprint_is_that_of_the_content(sources, tmp_path):
    for shard in sources[1].shards:
        shutil.copy(shard.path, tmp_path)
    (tmp_path / "classes.json").write_text('["class_0", "class_1", "class_2"]')
    copy = open_shards(tmp_path)
    assert copy.fingerprint == sources[1].fingerprint
    members = [(f"{k:09d}.jpg", sources[0].read_bytes(k)) for k in range(50)]
    unlabeled = open_shards(make_tar(tmp_path / "unlabeled" / "a.tar", members))
    assert unlabeled.fingerprint != copy.fingerprint
