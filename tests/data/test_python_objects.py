"""Images that are Python objects: arrays, torch data sets and Hugging Face data sets."""

import numpy as np
import pytest
import torch
from PIL import Image
from reading import read_all
from torch.utils.data import Dataset, Subset, TensorDataset

from ssl_pretrain.data.image_source import NoSuchSplit
from ssl_pretrain.data.python_objects import open_object
from ssl_pretrain.data.sources import DataConfig, open_source

IMAGES = np.random.default_rng(0).integers(0, 256, (12, 6, 8, 3)).astype(np.uint8)
LABELS = np.arange(12) % 3


class Pairs(Dataset):
    classes = ("cat", "dog", "eel")

    def __len__(self):
        return len(IMAGES)

    def __getitem__(self, index):
        return Image.fromarray(IMAGES[index]), int(LABELS[index])


@pytest.mark.parametrize(
    "data",
    [
        IMAGES,
        IMAGES.astype(np.int64),
        IMAGES.astype(np.float32) / 255,
        IMAGES.transpose(0, 3, 1, 2),
        torch.from_numpy(IMAGES).permute(0, 3, 1, 2),
        TensorDataset(torch.from_numpy(IMAGES).permute(0, 3, 1, 2).float() / 255),
        [Image.fromarray(image) for image in IMAGES],
        Pairs(),
    ],
    ids=["uint8", "int64", "floats", "channels first", "tensor", "tensors", "PIL", "pairs"],
)
def test_every_form_of_the_same_images_gives_the_same_pixels(data):
    assert np.array_equal(read_all(open_object(data)), IMAGES)


def test_gray_images_become_rgb():
    gray = IMAGES[..., 0]
    expected = np.repeat(gray[..., None], 3, axis=3)
    for data in (gray, gray[..., None], torch.from_numpy(gray)[:, None]):
        assert np.array_equal(read_all(open_object(data)), expected)


def test_labels_come_from_pairs_attributes_and_a_second_array():
    for data in (Pairs(), (IMAGES, LABELS), (torch.from_numpy(IMAGES), torch.from_numpy(LABELS))):
        source = open_object(data)
        assert source.labels.tolist() == LABELS.tolist()
    assert open_object(Pairs()).classes == ["cat", "dog", "eel"]
    assert open_object(IMAGES).labels.tolist() == [-1] * 12


def test_stored_labels_are_used_without_reading_an_image():
    class Stored(Pairs):
        targets = LABELS.tolist()
        num_reads = 0

        def __getitem__(self, index):
            Stored.num_reads += 1
            return super().__getitem__(index)

    source = open_object(Subset(Stored(), [5, 4, 3]))
    assert source.labels.tolist() == [2, 1, 0] and source.classes == ["cat", "dog", "eel"]
    assert np.array_equal(source.read(0), IMAGES[5])
    assert Stored.num_reads < 20  # the probe reads 8 images twice, and the first item once more


def test_names_and_sparse_numbers_become_classes():
    source = open_object((IMAGES, ["b", "a", None, *"abababa", "b", "a"]))
    assert source.classes == ["a", "b"] and source.labels.tolist()[:4] == [1, 0, -1, 0]
    source = open_object((IMAGES, [700, 5, -1, *[5] * 9]))
    assert source.classes == ["5", "700"] and source.labels.tolist()[:3] == [1, 0, -1]


def test_a_validation_label_means_the_class_of_the_training_split():
    val = open_object((IMAGES, ["b", "c", *"bbbbbbbbbb"])).with_classes(["a", "b"])
    assert val.classes == ["a", "b", "c"] and val.labels.tolist()[:3] == [1, 2, 1]
    numbered = open_object((IMAGES, [1, 0, *[1] * 10])).with_classes(["a", "b"])
    assert numbered.classes == ["a", "b"] and numbered.labels.tolist()[:3] == [1, 0, 1]


def test_a_hugging_face_data_set_has_images_and_labels():
    datasets = pytest.importorskip("datasets", reason="the extra `data` is not installed")
    features = datasets.Features(
        {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["x", "y", "z"])}
    )
    columns = {"picture": [Image.fromarray(image) for image in IMAGES], "kind": LABELS.tolist()}
    data = datasets.Dataset.from_dict(columns, features=features)
    source = open_object(data)
    assert np.array_equal(read_all(source), IMAGES)
    assert source.classes == ["x", "y", "z"] and source.labels.tolist() == LABELS.tolist()
    with pytest.raises(ValueError) as error:
        open_object(datasets.DatasetDict(train=data, test=data))
    assert str(error.value) == (
        "data: this Hugging Face dataset has several splits (train, test); give one of them, such "
        "as data['train'], and another as val"
    )
    with pytest.raises(ValueError, match="is a stream without a length; load it with streaming=F"):
        open_object(data.to_iterable_dataset())
    with pytest.raises(ValueError) as error:
        open_object(data.remove_columns("picture"))
    assert str(error.value) == (
        "data: no column of this Hugging Face dataset contains images (kind); cast one with "
        "dataset.cast_column('image', datasets.Image())"
    )


def test_a_changed_image_changes_the_fingerprint_and_the_same_images_do_not():
    changed = IMAGES.copy()
    changed[7, 0, 0] ^= 1
    assert open_object(IMAGES).fingerprint == open_object(IMAGES.copy()).fingerprint
    assert open_object(IMAGES).fingerprint != open_object(changed).fingerprint
    assert open_object(IMAGES).fingerprint != open_object(IMAGES[::-1]).fingerprint


class Random(Pairs):
    def __getitem__(self, index):
        return IMAGES[index] * np.random.randint(0, 2)


class Broken(Pairs):
    def __getitem__(self, index):
        raise KeyError("row 3")


IMAGE_FORMS = (
    "a PIL image, a path, an array (height, width, channels) or (height, width), or a tensor "
    "(channels, height, width), with integers from 0 to 255 or floats from 0 to 1"
)
SHAPES = "(n, height, width, 3), (n, 3, height, width) or (n, height, width)"
SCALE = (
    "scale them to integers from 0 to 255 or to floats from 0 to 1, before any normalization, or "
    "set data.range to their lowest and highest values"
)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (IMAGES[0, 0], f"data has the shape (8, 3); give {SHAPES}"),
        (IMAGES.astype(np.int32) * 300, f"data has int32 values from 0 to 76500; {SCALE}"),
        (IMAGES.astype(np.float32), f"data has float32 values from 0 to 255; {SCALE}"),
        (IMAGES.astype("U3"), f"data has <U3 values; {SCALE}"),
        ([1, 2], f"data[0] is of type int, not an image; give {IMAGE_FORMS}"),
        ([{"x": 1}], "data[0] has the keys x; call the image 'image'"),
        ([], "data contains no image; give one with images"),
        (
            {"train": IMAGES},
            "data: an object of type dict is not a data set; give a path, an array, a torch "
            "Dataset with a length, or a Hugging Face dataset",
        ),
        (Broken(), "data[0]: KeyError: 'row 3'"),
        (
            (IMAGES, LABELS[:5]),
            "data: there are 5 labels for 12 images; give one label per image",
        ),
        (
            (IMAGES, LABELS / 2),
            "data: label 0.0 is neither an integer nor a name; give the index or the name of a "
            "class, or images without labels",
        ),
    ],
)
def test_an_object_without_usable_images_is_refused_with_the_remedy(data, message):
    with pytest.raises(ValueError) as error:
        open_object(data)
    assert str(error.value) == message


def test_random_images_are_refused_because_a_run_could_not_resume():
    np.random.seed(1)
    with pytest.raises(ValueError, match="changes each time it is read; remove the random transf"):
        open_object(Random())


def test_a_function_in_a_module_gives_the_images_of_each_split(tmp_path, monkeypatch):
    (tmp_path / "my_images.py").write_text(
        "import numpy as np\n"
        "def load(split, count=4):\n"
        "    if split == 'train':\n"
        "        return np.zeros((count, 5, 5, 3), np.uint8), ['a', 'b'] * (count // 2)\n"
        "def nothing(split):\n    return None\n"
        "def broken(split):\n    raise OSError('no database')\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    config = DataConfig(source="my_images:load", args={"count": 6})
    source = open_source(config, "train")
    assert len(source) == 6 and source.classes == ["a", "b"]
    with pytest.raises(NoSuchSplit, match="my_images:load has no validation images"):
        open_source(config, "val")
    for reference, message in {
        "my_images:nothing": "data.source: my_images:nothing('train') returns None; return the "
        "images",
        "my_images:broken": "data.source: my_images:broken('train') fails: OSError: no database",
        "my_images:number": "data.source: my_images:number is of type int, not a function; give a "
        "function that returns the images of 'train' or 'val'",
        "my_images:absent": f"data.source: 'my_images:absent': {tmp_path}/my_images.py has no "
        "'absent'; give the name of a function or class in it, as package.module:function",
        "absent:load": f"data.source: there is no module 'absent' in {tmp_path} or the Python "
        "path; start in the folder that contains it, or add that folder to PYTHONPATH",
        "object:data": "data.source: 'object:data' was an object of the program that started this "
        "run; call ssl_pretrain there, or put it into a module and give its function as "
        "package.module:function",
    }.items():
        with pytest.raises(ValueError) as error:
            open_source(DataConfig(source=reference), "train")
        assert str(error.value) == message


def test_arguments_are_only_for_a_function():
    with pytest.raises(ValueError) as error:
        open_source(DataConfig(source="digits", args={"count": 6}), "train")
    assert str(error.value) == (
        "data.args: digits takes no arguments; leave it out, or set data.source to "
        "huggingface or package.module:function"
    )
