"""Small data sets in the formats of `ssl_pretrain.data.formats`, all with the same images."""

import gzip
import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

NUM_TRAIN, NUM_VAL = 48, 12
CLASSES = ["ant", "bee", "cat"]


def make_images(num_images: int, side: int = 12, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Return noise around one color per class, uint8 (n, side, side, channels)."""
    generator = np.random.default_rng(seed)
    noise = generator.integers(0, 120, (num_images, side, side, channels))
    offsets = np.stack(
        [np.roll([120, 40, 0], label)[:channels] for label in make_labels(num_images)]
    )
    return (noise + offsets[:, None, None]).clip(0, 255).astype(np.uint8)


def make_labels(num_images: int) -> np.ndarray:
    return np.arange(num_images) % 3


TRAIN, VAL = make_images(NUM_TRAIN), make_images(NUM_VAL, seed=1)
GRAY_TRAIN, GRAY_VAL = TRAIN[..., 0], VAL[..., 0]
TRAIN_LABELS, VAL_LABELS = make_labels(NUM_TRAIN), make_labels(NUM_VAL)


def write_npz(path: Path, compress: bool = False) -> Path:
    (np.savez_compressed if compress else np.savez)(
        path, x_train=TRAIN, y_train=TRAIN_LABELS, x_test=VAL, y_test=VAL_LABELS
    )
    return path


def write_npy(folder: Path) -> Path:
    """Write the four arrays, and return the folder."""
    folder.mkdir(parents=True)
    np.save(folder / "train_images.npy", TRAIN)
    np.save(folder / "train_labels.npy", TRAIN_LABELS)
    np.save(folder / "val_images.npy", VAL)
    np.save(folder / "val_labels.npy", VAL_LABELS)
    return folder


def idx_bytes(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return header + array.astype(np.uint8).tobytes()


def write_idx(folder: Path, compress: bool = True, prefix: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in {
        "train-images-idx3-ubyte": GRAY_TRAIN,
        "train-labels-idx1-ubyte": TRAIN_LABELS,
        "t10k-images-idx3-ubyte": GRAY_VAL,
        "t10k-labels-idx1-ubyte": VAL_LABELS,
    }.items():
        path = folder / f"{prefix}{name}{'.gz' if compress else ''}"
        content = idx_bytes(array)
        path.write_bytes(gzip.compress(content) if compress else content)
    return folder


CIFAR_TRAIN, CIFAR_TEST = make_images(NUM_TRAIN, 32), make_images(NUM_VAL, 32, seed=1)


def cifar100_files() -> dict[str, bytes]:
    """Return the pickles of a small CIFAR-100, by the names of the files."""
    contents = {
        split: {
            "filenames": [f"{number}.png" for number in range(len(images))],
            "fine_labels": make_labels(len(images)).tolist(),
            "coarse_labels": (make_labels(len(images)) // 2).tolist(),
            "data": images.transpose(0, 3, 1, 2).reshape(len(images), -1),
        }
        for split, images in (("train", CIFAR_TRAIN), ("test", CIFAR_TEST))
    }
    contents["meta"] = {"fine_label_names": CLASSES, "coarse_label_names": ["insect", "mammal"]}
    return {name: pickle.dumps(content, protocol=2) for name, content in contents.items()}


def cifar10_files() -> dict[str, bytes]:
    """Return the pickles of a small CIFAR-10, by the names of the files."""
    files = {}
    labels = make_labels(NUM_TRAIN)
    for number, rows in enumerate(np.array_split(np.arange(NUM_TRAIN), 5), start=1):
        files[f"data_batch_{number}"] = (CIFAR_TRAIN[rows], labels[rows])
    files["test_batch"] = (CIFAR_TEST, make_labels(NUM_VAL))
    pickles = {
        name: pickle.dumps(
            {"data": images.transpose(0, 3, 1, 2).reshape(len(images), -1), "labels": own.tolist()},
            protocol=2,
        )
        for name, (images, own) in files.items()
    }
    return pickles | {"batches.meta": pickle.dumps({"label_names": CLASSES}, protocol=2)}


STL10_TRAIN, STL10_UNLABELED = make_images(NUM_TRAIN, 96), make_images(20, 96, seed=2)
STL10_TEST = make_images(NUM_VAL, 96, seed=1)


def stl10_files() -> dict[str, bytes]:
    """Return the files of a small STL-10: channels, then columns, then rows."""
    arrays = {"train": STL10_TRAIN, "test": STL10_TEST, "unlabeled": STL10_UNLABELED}
    files = {
        f"{name}_X.bin": array.transpose(0, 3, 2, 1).tobytes() for name, array in arrays.items()
    }
    for name in ("train", "test"):
        files[f"{name}_y.bin"] = (make_labels(len(arrays[name])) + 1).astype(np.uint8).tobytes()
    return files


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def write_tar(path: Path, folder: str, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def encode(pixels: np.ndarray) -> bytes:
    """Return the pixels as PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def make_tables(datasets):
    """Return the training and the validation images as Hugging Face data sets."""
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)}
    )
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict(
                {
                    "image": [{"bytes": encode(image), "path": None} for image in images],
                    "label": labels.tolist(),
                },
                features=features,
            )
            for split, images, labels in (
                ("train", TRAIN, TRAIN_LABELS),
                ("test", VAL, VAL_LABELS),
            )
        }
    )


def write_saved(folder: Path, datasets) -> Path:
    make_tables(datasets).save_to_disk(str(folder))
    return folder


def write_parquet(folder: Path, datasets, num_shards: int = 2) -> Path:
    """Write the shards of both splits as the Hub lays them out, and return the folder."""
    (folder / "data").mkdir(parents=True)
    for split, table in make_tables(datasets).items():
        for number in range(num_shards):
            shard = table.shard(num_shards, number, contiguous=True)
            name = f"{split}-{number:05d}-of-{num_shards:05d}.parquet"
            shard.to_parquet(str(folder / "data" / name))
    return folder


def write_image_files(
    folder: Path, suffix: str, num_channels: int, maximum: int, image_type: str = "uint16"
) -> Path:
    """Write folder/<split>/<class>/<number><suffix> with noise around one level per class.

    Args:
        folder: The folder.
        suffix: .png, .npy, .tif for interleaved bands, or .pages.tif for one page per channel.
        num_channels: Channels of every image.
        maximum: Largest value of the first channel. The others have fewer.
        image_type: Type of the values.
    """
    for split, num_images, seed in (("train", NUM_TRAIN, 0), ("val", NUM_VAL, 1)):
        generator = np.random.default_rng(seed)
        for number in range(num_images):
            label = number % 3
            noise = generator.random((20, 20, num_channels)) * 0.5 + 0.25 * label
            values = (noise * maximum / np.arange(1, num_channels + 1)).astype(image_type)
            path = folder / split / CLASSES[label] / f"{number:02d}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            if suffix == ".npy":
                np.save(path, values)
            elif suffix == ".png":
                Image.fromarray(values[..., 0]).save(path)
            elif suffix == ".pages.tif":
                tifffile.imwrite(path, np.moveaxis(values, 2, 0), photometric="minisblack")
            elif num_channels == 1:
                tifffile.imwrite(path, values[..., 0], photometric="minisblack")
            else:
                tifffile.imwrite(path, values, photometric="minisblack", planarconfig="contig")
    return folder
