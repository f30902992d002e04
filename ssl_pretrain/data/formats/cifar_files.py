"""CIFAR-10 and CIFAR-100 in the Python version of their authors, whose files are pickles.

The pickles are read once, by an unpickler that knows NumPy's arrays and nothing else. Later runs
read an uncompressed .npz in the cache folder.
"""

import io
import pickle
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from ssl_pretrain.data.config import DataConfig
from ssl_pretrain.data.formats.array_choice import NO_LABELS
from ssl_pretrain.data.formats.array_source import ArraySource
from ssl_pretrain.data.formats.named_splits import choose_split
from ssl_pretrain.data.formats.numpy_files import read_npz
from ssl_pretrain.data.formats.published_archives import (
    ARCHIVES,
    CIFAR10_BATCHES,
    read_members,
    stamp_file,
)
from ssl_pretrain.data.formats.unpacking import unpack_once
from ssl_pretrain.data.pixels import PixelFormat
from ssl_pretrain.data.python_source import index_labels

_SIDE = 32
# Columns of labels, each with the list of class names in the meta file. The first is the default.
_LABELS = {
    "cifar10": {"label": "label_names"},
    "cifar100": {"fine_label": "fine_label_names", "coarse_label": "coarse_label_names"},
}
_BATCHES: dict[str, dict[str, tuple[str, ...]]] = {
    "cifar10": {"train": CIFAR10_BATCHES, "test": ("test_batch",)},
    "cifar100": {"train": ("train",), "test": ("test",)},
}
_META = {"cifar10": "batches.meta", "cifar100": "meta"}


def open_cifar(
    path: Path, name: str, config: DataConfig, cache_dir: Path, split: str
) -> ArraySource:
    """Open a split of the archive of CIFAR-10 or CIFAR-100, or of its unpacked folder.

    Args:
        path: The archive or the folder.
        name: "cifar10" or "cifar100".
        config: Its key `label_column` may be `coarse_label` for the 20 classes of CIFAR-100.
        cache_dir: Folder of the unpacked copy.
        split: "train" or "val".

    Raises:
        NoSuchSplit: If `data.val` is none.
        ValueError: If the files are damaged or are not those of the data set.
    """
    columns = list(_LABELS[name])
    column = config.label_column or columns[0]
    if column not in (*columns, NO_LABELS):
        raise ValueError(
            f"data.label_column: {path} has no labels {column!r}; choose one of: "
            f"{', '.join([*columns, NO_LABELS])}"
        )
    write = partial(_write_npz, path, name)
    copy = unpack_once(stamp_file(path, name), name, ".npz", cache_dir, write)
    arrays = read_npz(copy)
    chosen = choose_split({"train": "train", "test": "test"}, split, config, str(path))
    labels, classes = None, None
    if column != NO_LABELS:
        labels = arrays[f"{chosen}_{column}"].load()
        classes = arrays[f"{column}_names"].load().tolist()
    images = replace(arrays[f"{chosen}_images"], name=f"{path}[{chosen}]")
    indices, class_names = index_labels(str(path), labels, images.shape[0], classes)
    pixel_format = PixelFormat(config.channels)
    source = ArraySource([images], indices, class_names, pixel_format, axes="CHW")
    source.notes = [f"the images of {path} are read from their unpacked copy {copy}"]
    return source


def _write_npz(path: Path, name: str, file: IO[bytes]) -> None:
    """Write the images, labels and class names of both splits, from the pickles."""
    pickles = {member: load_pickle(stream, path) for member, stream, _ in read_members(path, name)}
    missing = [member for member in ARCHIVES[name].members if member not in pickles]
    if missing:
        raise ValueError(
            f"data.root: {path} lacks the files {', '.join(missing)}; download it again"
        )
    arrays: dict[str, np.ndarray] = {}
    for split, batches in _BATCHES[name].items():
        values = [np.asarray(pickles[batch]["data"], np.uint8) for batch in batches]
        arrays[f"{split}_images"] = np.concatenate(values).reshape(-1, 3, _SIDE, _SIDE)
        for column in _LABELS[name]:
            labels = [label for batch in batches for label in pickles[batch][f"{column}s"]]
            arrays[f"{split}_{column}"] = np.array(labels, np.int64)
    for column, names in _LABELS[name].items():
        arrays[f"{column}_names"] = np.array(pickles[_META[name]][names])
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as npz:
        for array_name, array in arrays.items():
            with npz.open(f"{array_name}.npy", "w") as target:
                np.lib.format.write_array(target, array, allow_pickle=False)


def load_pickle(stream: IO[bytes], path: Path) -> dict[str, Any]:
    """Load a pickle of dicts, lists, numbers, text and NumPy arrays.

    Raises:
        ValueError: If the pickle contains anything else, because it could then run any program.
    """
    try:
        return dict(_ArrayUnpickler(io.BytesIO(stream.read()), encoding="latin1").load())
    except _Forbidden as error:
        raise ValueError(
            f"data.root: {path} contains a pickle that calls {error}, which the files of CIFAR do "
            "not; it could run any program and is not read; download the archive again"
        ) from None


class _Forbidden(Exception):
    """A pickle asks for a function that is not part of NumPy's arrays."""


class _ArrayUnpickler(pickle.Unpickler):
    """Loads NumPy arrays and Python's plain types."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a function that a pickled array needs, and refuse all others."""
        core = module.replace("numpy._core", "numpy.core")
        if (core, name) == ("numpy.core.multiarray", "_reconstruct"):
            return np._core.multiarray._reconstruct  # type: ignore[attr-defined]
        if (core, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):  # bytes in pickles of protocol 2
            return _encode_latin1
        raise _Forbidden(f"{module}.{name}")


def _encode_latin1(text: str, encoding: str) -> bytes:
    assert encoding == "latin1", "pickle writes bytes in this encoding"
    return text.encode("latin1")
