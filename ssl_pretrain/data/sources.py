"""Open a data set: image files, a .beton, arrays, tables, Python objects or a well-known data set.

The class of an image is its first folder, as in torchvision's ImageFolder. Images outside the class
folders have no label (-1). If there is at most one folder, no image has a label. Only evaluations
and supervised methods need labels.

    source: digits                                   1,797 embedded images, no download
    source: cifar10   root: "" | folder | .zip       train/<class>/, test/<class>/; "" downloads
    source: folder    root: /data/imagenet           train/<class>/, val/<class>/
                      root: /data/photos             no splits: all images are for training
                      root: /data/sample.zip         either layout, read in place
                      root: /data/train.csv          a list of paths, with or without labels
                      root: /data/{000..146}.tar     shards in WebDataset's layout, also by URL
                      root: /data/train.beton        written by `ssl_pretrain.data.beton`; or a
                                                     folder with train.beton and val.beton
                      root: /data/pathmnist.npz      arrays and tables: see the folder `formats`
    source: cifar100  root: "" | archive | folder    the published files; "" downloads
    source: stl10     root: "" | archive | folder
    source: huggingface  root: owner/name            a data set of the Hugging Face Hub
    source: texts     root: wiki1m.txt | folder      sentences and pairs: see `texts.open_texts`
    source: wordnet   root: "" | folder              definitions and examples: see `texts.wordnet`
    source: package.module:function                  images of a Python object: function(split)
"""

import os
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from ssl_pretrain import rng
from ssl_pretrain.data import python_objects
from ssl_pretrain.data.beton import beton_file
from ssl_pretrain.data.beton.beton_source import Beton
from ssl_pretrain.data.caption_texts import NO_CAPTIONS
from ssl_pretrain.data.config import DataConfig, check, pixel_format
from ssl_pretrain.data.file_dataset import FileDataSet, SplitName
from ssl_pretrain.data.file_types import TABLE_SUFFIXES
from ssl_pretrain.data.formats.find_format import find_format
from ssl_pretrain.data.image_source import Source
from ssl_pretrain.data.named_datasets import Digits, pack_cifar10
from ssl_pretrain.data.pixels import check_conversion
from ssl_pretrain.data.split_search import split_of
from ssl_pretrain.data.tar.tar_data_set import open_tar_split
from ssl_pretrain.data.texts.open_texts import open_texts
from ssl_pretrain.data.texts.wordnet import open_wordnet
from ssl_pretrain.system import user_objects

_ROOT_REMEDY = (
    "give a folder, a .zip, a .beton, tar shards, a .parquet, an .npz, or a list of files (.csv, "
    ".tsv, .txt)"
)
_UNSUPPORTED_TABLES = (
    *(".feather", ".xlsx", ".xls", ".ods"),
    *(".json", ".jsonl", ".pkl", ".h5", ".mat"),
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
    if config.caption_column == NO_CAPTIONS:
        source = source.without_texts()
    elif config.caption_column and split == "train" and not source.num_texts:
        raise _no_columns("caption_column", config)
    return _choose_subset(source, config.subset) if split == "train" else source


def _open_all(config: DataConfig, split: SplitName, classes: list[str] | None) -> Source:
    """Open all images of a split, without `data.subset`."""
    if config.source in ("cifar10", "cifar100", "stl10"):
        check_conversion(f"data.source: {config.source}", 3, config.channels)
    if config.source == "digits":
        return Digits(split, config.channels)
    if ":" in config.source:
        return _open_python(config, split, classes)
    if config.source == "wordnet":
        return open_wordnet(config, split)
    if config.source == "texts":
        source = open_texts(config, split, _cache_dir(config))
        return source if classes is None else source.with_classes(classes)
    if (path := _beton_path(config, split)) is not None:
        return Beton(beton_file.read(path), config.channels)
    # CIFAR's and STL-10's archives are tar files, too, and so are looked for first.
    cache_dir = _cache_dir(config)
    if (open_split := find_format(config, cache_dir, split)) is not None:
        source = open_split()
        if split == "val" and classes is None:
            classes = _open_all(config, "train", None).classes
        return source if classes is None else source.with_classes(classes)
    if config.source == "folder":
        shards = open_tar_split(config, cache_dir, split, classes)
        if shards is not None:
            _refuse_columns(config)
            if split == "train" and config.caption_column not in ("", NO_CAPTIONS):
                raise _no_columns("caption_column", config)
            return shards
    train_beton = _beton_path(config, "train")
    data_set = _open_files(config, has_train_beton=train_beton is not None)
    splits = data_set.splits
    if split == "train":
        if config.source in ("cifar10", "cifar100") and splits.train is None:
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

    def open_split(name: str) -> Source:
        return python_objects.open_split(
            *(function, config.source, name, config.args, pixel_format(config)),
            caption_column=config.caption_column,
        )

    source = open_split(split)
    if split == "train":
        return source
    if classes is None:
        classes = open_split("train").classes
    return source.with_classes(classes)


def _open_files(config: DataConfig, has_train_beton: bool) -> FileDataSet:
    """Find the splits of a data set of image files."""
    cache_dir = _cache_dir(config)
    _refuse_columns(config)
    root = _find_root(config, cache_dir)
    train, val = config.train, config.val
    if config.source in ("cifar10", "cifar100", "stl10"):
        train, val = train or "train", val or "test"
    if has_train_beton:  # other splits may be folders next to the .beton
        root, train = root if root.is_dir() else root.parent, ""
    return FileDataSet(root, train, val, cache_dir, pixel_format(config), config.caption_column)


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


def _refuse_columns(config: DataConfig) -> None:
    for key in ("image_column", "label_column"):
        if getattr(config, key):
            raise _no_columns(key, config)


def _no_columns(key: str, config: DataConfig) -> ValueError:
    """Return the error for a name of a column in a data set that has no columns."""
    return ValueError(
        f"data.{key}: {config.root or config.train or config.source} has no columns; leave it out"
    )


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


def _cache_dir(config: DataConfig) -> Path:
    """Return `data.cache_dir`, the user's folder for caches, or without a home no folder at all."""
    if config.cache_dir:
        return Path(config.cache_dir).expanduser()
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
