"""Open a data set: the embedded digits, CIFAR-10, or any folder, zip, list of files or .beton.

The class of an image is its first folder, as in torchvision's ImageFolder. Images outside the class
folders have no label (-1). If there is at most one folder, no image has a label. Only evaluations
and supervised methods need labels.

    source: digits                                   1,797 embedded images, no download
    source: cifar10   root: "" | folder | .zip       train/<class>/, test/<class>/; "" downloads
    source: folder    root: /data/imagenet           train/<class>/, val/<class>/
                      root: /data/photos             no splits: all images are for training
                      root: /data/sample.zip         either layout, read in place
                      root: /data/train.csv          a list of paths, with or without labels
                      root: /data/train.beton        written by `ssl_pretrain.data.beton`; or a
                                                     folder with train.beton and val.beton
    source: package.module:function                  images of a Python object: function(split)
"""

import math
import os
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ssl_pretrain import rng
from ssl_pretrain.data import python_objects
from ssl_pretrain.data.beton import beton_file
from ssl_pretrain.data.beton.beton_source import Beton
from ssl_pretrain.data.file_dataset import FileDataSet, SplitName
from ssl_pretrain.data.file_types import TABLE_SUFFIXES
from ssl_pretrain.data.image_source import Source
from ssl_pretrain.data.named_datasets import Digits, pack_cifar10
from ssl_pretrain.data.python_source import PythonSource
from ssl_pretrain.data.split_search import split_of
from ssl_pretrain.schema import DIMENSIONLESS, setting
from ssl_pretrain.system import user_objects

NAMED_SOURCES = ("digits", "cifar10", "folder")
_ROOT_REMEDY = "give a folder, a .zip, a .beton, or a list of files (.csv, .tsv, .txt)"
_UNSUPPORTED_TABLES = (
    *(".parquet", ".feather", ".xlsx", ".xls", ".ods"),
    *(".json", ".jsonl", ".pkl", ".npy", ".npz", ".h5", ".mat"),
)


@dataclass
class DataConfig:
    """Configuration of the images and of how they are read."""

    source: Literal["digits", "cifar10", "folder"] | str = setting(
        "folder",
        "Kind of data set. digits: the digits of scikit-learn, without a download. cifar10: the "
        "archive of CIFAR-10. folder: images in a folder, a .zip, a list of files or a .beton. "
        "package.module:function: a function that returns the images of 'train' or 'val'.",
    )
    args: dict[str, Any] = setting({}, "Arguments of the function that source names.")
    root: str = setting(
        "", "Path of the data: a folder, a .zip, a list of files or a .beton.", on_resume="free"
    )
    train: str = setting(
        "",
        "Training images: a folder, list, .zip or .beton, absolute or relative to root. "
        "A dot means root itself. If empty, the split is found by its name.",
        on_resume="free",
    )
    val: str = setting(
        "",
        "Validation images, given like train. The value none means that there are none. "
        "If empty, the split is found by its name.",
        on_resume="free",
    )
    subset: int = setting(
        0, "Number of training images to use, chosen at random. 0 uses all.", unit="images"
    )
    num_workers: int = setting(
        4,
        "Threads (threads, ffcv) or processes (folder) per rank that decode and crop. "
        "0 means one thread, or no extra process.",
        on_resume="free",
        unit="threads or processes",
    )
    loader: Literal["auto", "threads", "ffcv", "folder"] = setting(
        "auto",
        "How images are read. threads: decode and crop in threads. ffcv: the same for a .beton, "
        "with FFCV's decoder. folder: in worker processes. auto: threads for a .beton, else "
        "folder. The run prints its choice and the reason.",
        on_resume="free",
    )
    cache: Literal["none", "device"] = setting(
        "none",
        "Cache of decoded images. device: upload all images once and crop them on the device, as "
        "for CIFAR-10.",
    )
    order: Literal["random", "quasi_random"] = setting(
        "random",
        "Order of the images. quasi_random: mostly the order on disk, for data larger than memory.",
    )
    quasi_random_window: int = setting(
        16384,
        "Number of images that quasi_random shuffles with each other. They must fit in memory.",
        unit="images",
    )
    max_replaced: float = setting(
        0.01,
        "Largest share of an epoch's images that may be unreadable and replaced by others. "
        "If it is exceeded, the run stops.",
        on_resume="free",
        maximum=1,
        unit=DIMENSIONLESS,
    )
    range: list[float] = setting(
        [],
        "Values [low, high] of 16-bit gray and float images that become 0 and 255. "
        "If empty, they are 0 and 65535.",
        minimum=-1e12,
        maximum=1e12,
        unit="pixel values",
    )
    cache_dir: str = setting(
        "",
        "Folder for cached lists of files. If empty, it is ~/.cache/ssl_pretrain.",
        on_resume="free",
    )


def check(config: DataConfig) -> None:
    """Check the values of a configuration.

    Raises:
        ValueError: If a value is invalid. The message names the key.
    """
    if config.source not in NAMED_SOURCES and ":" not in config.source:
        close = get_close_matches(config.source, NAMED_SOURCES, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"data.source: {config.source!r} is not known.{hint} Choose one of: "
            f"{', '.join(NAMED_SOURCES)}, or give package.module:function"
        )
    if config.args and ":" not in config.source:
        raise ValueError(
            f"data.args: {config.source} takes no arguments; leave it out, or set data.source to "
            "package.module:function"
        )
    if not 0 <= config.max_replaced <= 1:
        raise ValueError(
            f"data.max_replaced: {config.max_replaced} must be a share between 0 and 1, such as "
            "0.01"
        )
    values = config.range
    is_finite = all(isinstance(value, int | float) and math.isfinite(value) for value in values)
    if values and (len(values) != 2 or not is_finite or values[0] >= values[1]):
        raise ValueError(
            f"data.range: {list(values)} must be two numbers, the lower one first, such as "
            "[0, 4095]"
        )


def open_source(config: DataConfig, split: SplitName, classes: list[str] | None = None) -> Source:
    """Open the images of one split. Both splits have the classes of the training split.

    Args:
        config: Configuration of the data set.
        split: "train" or "val".
        classes: Classes of the training split, which saves opening it for "val".

    Returns:
        The images, and for "train" only `data.subset` of them.

    Raises:
        NoSuchSplit: If the data set has no validation split.
        ValueError: If the data set is absent, empty or ambiguous.
    """
    if split not in ("train", "val"):
        raise ValueError(
            f"split: {split!r} is not a split of a data set; choose one of: train, val"
        )
    check(config)
    source = _open_all(config, split, classes)
    return _choose_subset(source, config.subset) if split == "train" else source


def _open_all(config: DataConfig, split: SplitName, classes: list[str] | None) -> Source:
    """Open all images of a split, without `data.subset`."""
    if config.source == "digits":
        return Digits(split)
    if ":" in config.source:
        return _open_python(config, split, classes)
    if (path := _beton_path(config, split)) is not None:
        return Beton(beton_file.read(path))
    train_beton = _beton_path(config, "train")
    data_set = _open_files(config, has_train_beton=train_beton is not None)
    splits = data_set.splits
    if split == "train":
        if config.source == "cifar10" and splits.train is None:
            raise ValueError(
                f"data.root: {data_set.root} has no folder 'train'; give a folder or a .zip that "
                "contains train/<class>/ and test/<class>/"
            )
        return data_set.open_split("train", None)
    if classes is None and train_beton is not None:
        classes = Beton(beton_file.read(train_beton)).classes
    elif classes is None and (splits.val is not None or splits.train_error):
        classes = data_set.open_split("train", None).classes
    return data_set.open_split("val", classes)


def _open_python(config: DataConfig, split: SplitName, classes: list[str] | None) -> Source:
    """Open the images that the user's function returns."""
    function = user_objects.find_object(config.source, "data.source")
    source = python_objects.open_split(function, config.source, split, config.args)
    if split == "train" or not isinstance(source, PythonSource):
        return source
    if classes is None:
        train = python_objects.open_split(function, config.source, "train", config.args)
        classes = train.classes
    return source.with_classes(classes)


def _open_files(config: DataConfig, has_train_beton: bool) -> FileDataSet:
    """Find the splits of a data set of image files."""
    cache_dir = Path(config.cache_dir).expanduser() if config.cache_dir else _user_cache_dir()
    root = _find_root(config, cache_dir)
    train, val = config.train, config.val
    if config.source == "cifar10":
        train, val = train or "train", val or "test"
    if has_train_beton:  # other splits may be folders next to the .beton
        root, train = root if root.is_dir() else root.parent, ""
    value_range = (float(config.range[0]), float(config.range[1])) if config.range else None
    return FileDataSet(root, train, val, cache_dir, value_range)


def _missing_root_message(root: Path) -> str:
    """Return the message about a path that does not exist, with the most likely remedy."""
    problem = f"data.root: {root} does not exist"
    if root.parts and root.parts[0].endswith(":") and len(root.parts[0]) > 2:  # https:, s3:, hf:
        return f"{problem}; a URL is not read, so download the images and give their folder"
    neighbors = [path.name for path in root.parent.iterdir()] if root.parent.is_dir() else []
    nearest = get_close_matches(root.name, neighbors, n=1)
    if not nearest:
        return f"{problem}; {_ROOT_REMEDY}"
    remedy = _ROOT_REMEDY[0].upper() + _ROOT_REMEDY[1:]
    return f"{problem}. Did you mean {str(root.parent / nearest[0])!r}? {remedy}"


def _find_root(config: DataConfig, cache_dir: Path) -> Path:
    """Return the existing folder or file of the data set."""
    root = Path(config.root).expanduser()
    train = Path(config.train).expanduser()
    if config.source == "cifar10" and (not config.root or (root / "cifar-10-batches-py").is_dir()):
        return pack_cifar10(config.root, cache_dir)
    if not config.root and train.is_absolute():
        return train
    if not config.root:
        raise ValueError(
            f"data.root: no path is set; {_ROOT_REMEDY}, as in data.root=/data/imagenet"
        )
    if not root.exists():
        raise ValueError(_missing_root_message(root))
    suffix = root.suffix.lower()
    if suffix in _UNSUPPORTED_TABLES and root.is_file():
        raise ValueError(
            f"data.root: {root} is a table of an unsupported kind; save it as .csv, with the "
            "columns path and label"
        )
    is_readable_file = root.is_file() and suffix in (".zip", ".beton", *TABLE_SUFFIXES)
    if not root.is_dir() and not is_readable_file:
        raise ValueError(f"data.root: {root} is a file of an unsupported kind; {_ROOT_REMEDY}")
    return root


def _user_cache_dir() -> Path:
    """Return the user's folder for caches, or a path that cannot be written without a home."""
    home = os.path.expanduser("~")
    return Path(home if os.path.isabs(home) else os.devnull) / ".cache" / "ssl_pretrain"


def _beton_path(config: DataConfig, split: SplitName) -> Path | None:
    """Return the .beton of a split, or None if the split is read from image files.

    The .beton is the file that `data.train` or `data.val` names, `data.root` itself, or a file with
    the name of the split beside the images.
    """
    name = config.train if split == "train" else config.val
    root = Path(config.root).expanduser()
    folder = root if root.is_dir() else root.parent
    if name.lower().endswith(".beton"):
        return folder / Path(name).expanduser()
    if not config.root:
        return None
    if split == "train" and root.suffix.lower() == ".beton":
        return root
    if name:
        names = [name] if name == os.path.basename(name) else []
    elif split == "train":
        names = ["train"]
    else:
        names = ["test", "val"] if config.source == "cifar10" else ["val", "test"]
    for name in names:
        path = beton_file.find_beton(folder, name)
        if path is not None and _prefers_beton(config.loader, root, name):
            return path
    return None


def _prefers_beton(loader: str, root: Path, name: str) -> bool:
    """Return True if the .beton of a split is preferred to a folder of its images.

    If both exist, the folder is only read with `data.loader=folder`.

    Args:
        loader: The setting `data.loader`.
        root: The setting `data.root`.
        name: Name of the .beton without its suffix, such as "val".
    """
    if not root.is_dir():
        return root.suffix.lower() == ".beton"
    split = split_of(name)
    names = [path.name for path in root.iterdir() if path.is_dir()]
    has_folder = name in names or any(split_of(other) == split for other in names if split)
    return not has_folder or loader != "folder"


def _choose_subset(source: Source, num_images: int) -> Source:
    """Return a random subset of the images, the same for every seed of the run. 0 means all."""
    if not 0 <= num_images <= len(source):
        raise ValueError(
            f"data.subset: {num_images} is not a possible number of training images; give a number "
            f"from 1 to {len(source)}, or 0 for all"
        )
    if not num_images:
        return source
    order = rng.permutation(0, 0, len(source), rng.Purpose.SUBSET)
    return source.take(np.sort(order[:num_images]))
