"""Images in the IDX files of MNIST, Fashion-MNIST and EMNIST, plain or compressed with gzip."""

import gzip
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, cast

import numpy as np

from ssl_pretrain.data.config import DataConfig
from ssl_pretrain.data.formats.array_choice import ArrayPair
from ssl_pretrain.data.formats.array_source import ArraySource
from ssl_pretrain.data.formats.named_splits import choose_split
from ssl_pretrain.data.formats.numpy_files import open_pair
from ssl_pretrain.data.formats.stored_array import StoredArray
from ssl_pretrain.data.messages import abbreviate

# train-images-idx3-ubyte, t10k-labels-idx1-ubyte.gz, emnist-letters-train-images-idx3-ubyte
_NAME = re.compile(
    r"(?P<prefix>.*[-_.])?(?P<split>train|t10k|test|val)[-_.](?P<content>images|labels)"
    r"[-_.]idx\d[-_.]\w+(?P<gzip>\.gz)?"
)
_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_FASHION_CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)


def find_idx_folder(root: Path) -> Path | None:
    """Return the folder with the IDX files, which is the root or torchvision's subfolder `raw`."""
    for folder in (root, root / "raw", *sorted(root.glob("*/raw"))):
        if folder.is_dir() and any(is_idx_images(path) for path in folder.iterdir()):
            return folder
    return None


def is_idx_images(path: Path) -> bool:
    """Return True if a file has the name of IDX images."""
    match = _NAME.fullmatch(path.name)
    return match is not None and match["content"] == "images"


def open_idx(root: Path, config: DataConfig, cache_dir: Path, split: str) -> ArraySource:
    """Open a split of the IDX files in a folder, or of those with the same prefix as a file.

    Raises:
        NoSuchSplit: If there are no test images.
        ValueError: If a file is damaged, or the folder contains several data sets.
    """
    folder = root if root.is_dir() else root.parent
    files = {
        (match["prefix"] or "", match["split"], match["content"]): path
        for path in sorted(folder.iterdir(), reverse=True)  # a plain file replaces its .gz
        if (match := _NAME.fullmatch(path.name))
    }
    prefixes = sorted({prefix for prefix, _, content in files if content == "images"})
    if not root.is_dir():
        match = _NAME.fullmatch(root.name)
        assert match is not None, "only files with such a name are opened"
        prefixes = [match["prefix"] or ""]
        files[prefixes[0], match["split"], "images"] = root
    elif len(prefixes) > 1:
        first = min(path for key, path in files.items() if key[1:] == ("train", "images"))
        raise ValueError(
            f"data.root: {root} contains {len(prefixes)} data sets "
            f"({abbreviate([prefix.rstrip('-_.') for prefix in prefixes])}); give the training "
            f"images of one, as in data.root={first}"
        )
    splits = {
        {"t10k": "test"}.get(name, name): (images, files.get((prefix, name, "labels")))
        for (prefix, name, content), images in files.items()
        if prefix == prefixes[0] and content == "images"
    }
    images, labels = choose_split(splits, split, config, str(root))
    if config.label_column == "none":
        labels = None
    pair = ArrayPair(read_idx(images), None if labels is None else read_idx(labels))
    is_fashion = any("fashion" in name.lower() for name in folder.resolve().parts[-3:])
    classes = list(_FASHION_CLASSES) if is_fashion and labels is not None else None
    return open_pair(pair, config, cache_dir, classes)


def read_idx(path: Path) -> StoredArray:
    """Read the header of an IDX file.

    Raises:
        ValueError: If the file is not IDX.
    """
    is_compressed = path.suffix == ".gz"
    opener = gzip.open if is_compressed else open
    try:
        with opener(path, "rb") as file:
            magic = file.read(4)
            is_idx = len(magic) == 4 and magic[:2] == b"\0\0" and magic[2] in _TYPES
            lengths = file.read(4 * magic[3]) if is_idx else b""
    except (OSError, EOFError) as error:
        raise ValueError(f"data.root: {path} cannot be read ({error}); copy it again") from None
    if not is_idx or len(lengths) < 4 * magic[3]:
        raise ValueError(f"data.root: {path} does not begin like an IDX file; copy it again")
    shape = tuple(np.frombuffer(lengths, ">u4").tolist())
    offset = 4 + len(lengths)
    stream = partial(_open_gzip, path, offset) if is_compressed else None
    return StoredArray(
        str(path), str(path), shape, np.dtype(_TYPES[magic[2]]), offset, open_stream=stream
    )


@contextmanager
def _open_gzip(path: Path, offset: int) -> Iterator[IO[bytes]]:
    with gzip.open(path, "rb") as file:
        file.read(offset)
        yield cast(IO[bytes], file)
