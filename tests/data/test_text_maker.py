"""Captions in batches: drawn by counter, tokenized by the workers, the same for every reader."""

import itertools

import numpy as np
import pytest
import torch
from loaders import build_loader, digests
from PIL import Image

from ssl_pretrain.data.config import DataConfig
from ssl_pretrain.data.sources import open_source
from ssl_pretrain.data.text_maker import TextMaker
from ssl_pretrain.views import tokenizers
from ssl_pretrain.views.recipe import Crop, ViewsConfig
from ssl_pretrain.views.text_recipe import TextConfig

pytest.importorskip("open_clip", reason="open_clip is not installed")

NUM_IMAGES, LENGTH, SEED = 24, 8, 3
VIEWS = ViewsConfig(crops={"global": Crop(count=1, size=8)})
TEXT = TextConfig(length=LENGTH)
READERS = [("folder", 0), ("folder", 2), ("threads", 2), ("device", 0)]


def write_images(folder, captions):
    """Write images and a list with the captions of each, and return the path of the list."""
    rows = ["path,caption"]
    for index in range(NUM_IMAGES):
        pixels = np.random.default_rng(index).integers(0, 256, (10, 10, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        rows += [f"{index}.png,{caption}" for caption in captions(index)]
    path = folder / "train.csv"
    path.write_text("\n".join(rows) + "\n")
    return path


def three_captions(index):
    return [f"image {index} caption {number}" for number in range(3)]


@pytest.fixture
def source(tmp_path):
    path = write_images(tmp_path, three_captions)
    return open_source(DataConfig(root=str(path), cache_dir=str(tmp_path / "cache")), "train")


def loader(source, kind="folder", num_workers=0, text=TEXT, **options):
    text_maker = TextMaker(source, text, SEED)
    return build_loader(
        source, VIEWS, kind, seed=SEED, num_workers=num_workers, text_maker=text_maker, **options
    )


def batches(loader, first_step, count):
    with loader:
        return list(itertools.islice(loader.iterate_from(first_step), count))


def test_a_batch_has_one_of_the_captions_of_each_image(source):
    tokenizer = tokenizers.build(TEXT)
    for batch in batches(loader(source), 0, 4):
        (texts,) = batch.texts
        assert texts.ids.dtype == torch.int64 and texts.valid.dtype == torch.bool
        for row, index in enumerate(batch.indices.tolist()):
            (captions,) = source.texts(index)
            possible = torch.from_numpy(tokenizer(captions).ids)
            assert (possible == texts.ids[row]).all(1).any()
            assert torch.equal(texts.valid[row], texts.ids[row] != 0)


def test_every_epoch_draws_other_captions(source):
    ids = {}
    for batch in batches(loader(source), 0, 12):
        for row, index in enumerate(batch.indices.tolist()):
            ids.setdefault(index, []).append(tuple(batch.texts[0].ids[row].tolist()))
    counts = [len(set(captions)) for captions in ids.values()]
    assert all(len(captions) == 6 for captions in ids.values())  # two batches per epoch
    assert np.mean(counts) > 2  # 2.7 of 3 captions are expected


@pytest.mark.parametrize(("kind", "num_workers"), READERS[1:3])
def test_every_reader_gives_the_same_batches(kind, num_workers, source):
    expected = digests(loader(source), 0, 4)
    assert digests(loader(source, kind, num_workers), 0, 4) == expected


def test_the_device_cache_gives_the_same_captions(source):
    expected = batches(loader(source), 0, 4)
    for batch, other in zip(expected, batches(loader(source, "device"), 0, 4), strict=True):
        assert torch.equal(batch.texts[0].ids, other.texts[0].ids)


@pytest.mark.parametrize(("kind", "num_workers"), READERS)
def test_batches_from_any_step_equal_uninterrupted_ones(kind, num_workers, source):
    whole = digests(loader(source, kind, num_workers), 0, 5)
    assert digests(loader(source, kind, num_workers), 3, 2) == whole[3:]


def test_ranks_make_up_the_global_batch(source):
    (whole,) = batches(loader(source), 1, 1)
    shares = [batches(loader(source, rank=rank, world_size=3), 1, 1)[0] for rank in range(3)]
    ids = torch.cat([share.texts[0].ids for share in shares])
    assert torch.equal(ids, whole.texts[0].ids)


@pytest.mark.parametrize(("kind", "num_workers"), READERS)
def test_an_image_without_a_caption_is_replaced_like_an_unreadable_one(kind, num_workers, tmp_path):
    captions = [[] if index == 5 else [f"image {index}"] for index in range(NUM_IMAGES)]
    path = write_images(tmp_path, lambda index: captions[index] or [" "])
    source = open_source(DataConfig(root=str(path), cache_dir=str(tmp_path / "cache")), "train")
    with pytest.warns(UserWarning, match="5.png: it has no caption; .* takes its place"):
        both = batches(loader(source, kind, num_workers, max_replaced=0.1), 0, 2)
    tokenizer = tokenizers.build(TEXT)
    missing = tokenizer([""]).ids[0]
    rows = torch.cat([batch.texts[0].ids for batch in both])
    assert not (rows == torch.from_numpy(missing)).all(1).any()
    assert len(rows) == NUM_IMAGES


def test_class_names_are_captions(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for index in range(6):
            pixels = np.full((8, 8, 3), 40 * index, np.uint8)
            Image.fromarray(pixels).save(tmp_path / "train" / name / f"{index}.png")
    data = DataConfig(root=str(tmp_path), val="none", cache_dir=str(tmp_path / "cache"))
    text = TextConfig(captions="class_names", templates=["a {}.", "the {}."], length=LENGTH)
    source, tokenizer = open_source(data, "train"), tokenizers.build(text)
    (batch,) = batches(loader(source, text=text), 0, 1)
    for row, label in enumerate(batch.labels.tolist()):
        name = source.classes[label]
        possible = torch.from_numpy(tokenizer([f"a {name}.", f"the {name}."]).ids)
        assert (possible == batch.texts[0].ids[row]).all(1).any()


def test_images_without_captions_or_classes_are_refused(tmp_path):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    data = DataConfig(root=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    source = open_source(data, "train")
    with pytest.raises(ValueError) as error:
        TextMaker(source, TEXT)
    assert str(error.value) == (
        f"text.captions: {tmp_path} has no captions; give shards with .txt or .json, or a table "
        "with data.caption_column, or set text.captions=class_names"
    )
    with pytest.raises(ValueError) as error:
        TextMaker(source, TextConfig(captions="class_names"))
    assert str(error.value) == (
        f"text.captions: class_names needs classes, and {tmp_path} has none; put the images in "
        "one folder per class, or set text.captions=stored"
    )


def test_a_caption_in_a_store_is_requested_once(source, monkeypatch):
    requests = []
    texts = source.texts
    monkeypatch.setattr(source, "texts", lambda index: requests.append(index) or texts(index))
    batches(loader(source), 0, 1)
    assert len(requests) == len(set(requests)) == 12
