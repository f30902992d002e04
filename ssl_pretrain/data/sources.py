"""Where images come from: scikit-learn's digits, CIFAR-10, or any folder, zip or list of files.

A class-per-folder tree (ImageNet's layout) is one whose images all lie in <class>/<file>, with two classes or more;
in any other tree the images have no labels (-1), and only what needs labels or a validation part says so.

    source: digits                                   1,797 embedded images, nothing to download
    source: cifar10   root: "" | folder | .zip       train/<class>/, test/<class>/; "" downloads
    source: folder    root: /data/imagenet           train/<class>/, val/<class>/
                      root: /data/photos             no train/ in it: everything below is for training
                      root: /data/sample.zip         either layout, read in place
                      root: /data/train.csv          lines of path or path,label
                      root: /data/train.beton        written by `python -m ssl_pretrain.data.beton write`,
                                                     or a folder with train.beton and val.beton, or with their shards
"""

import copy
import hashlib
import importlib.util
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ssl_pretrain import draws
from ssl_pretrain.data import beton_file, cifar10, listing, parts
from ssl_pretrain.data.beton_file import Samples
from ssl_pretrain.data.images import UnreadableImage, decode
from ssl_pretrain.data.listing import Listing

_DIGITS_PER_CLASS = 50  # held out; 10 classes
_KINDS = "give a folder, a .zip, a .beton, or a list of files (.csv, .txt)"


@dataclass
class DataConfig:
    source: Literal["digits", "cifar10", "folder"] = "folder"
    root: str = ""               # a folder, a .zip, a list of files, or a .beton
    train: str = "train"         # sub-folder or list file in root; where root has no train/, root itself
    val: str = "val"             # the same for validation; cifar10 has test/
    subset: int = 0              # use this many training images, a fixed random choice; 0: all
    num_workers: int = 4         # per rank: threads (ffcv) or processes (folder) that decode and crop; 0: one thread, or no process
    loader: Literal["auto", "ffcv", "folder"] = "auto"       # auto: ffcv for a .beton where FFCV is installed; the run says which and why
    cache: Literal["none", "device"] = "none"                # device: all images uploaded once, as for CIFAR-10; cropped there
    order: Literal["random", "quasi_random"] = "random"      # quasi_random: mostly in the order of the disk, for more data than memory
    quasi_random_window: int = 16384                         # images mixed with each other in that order; they have to fit into memory
    cache_dir: str = ""          # for lists of files; "": ~/.cache/ssl_pretrain


class Source:
    """Images by number, 0 to len - 1, in one fixed order. Small to pickle: every loader worker gets a copy.

    labels: int64 (n,), an index into `classes`, -1 for none. where: the folder or file, for messages.
    """

    def __init__(self, where: str, labels: np.ndarray, classes: list[str]):
        self.where = where
        self.labels = labels.astype(np.int64)
        self.classes = classes

    def __len__(self) -> int:
        return len(self.labels)

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def read(self, index: int) -> np.ndarray:
        """RGB pixels, uint8 (height, width, 3). Raises UnreadableImage, which names the file."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """The file, for messages."""
        raise NotImplementedError

    def take(self, indices: np.ndarray) -> "Source":
        """These images alone, in this order."""
        raise NotImplementedError

    def check_present(self) -> None:
        """Raises FileNotFoundError if the whole folder or file has gone, so that no image of it is worth trying."""

    @property
    def fingerprint(self) -> str:
        """Which images with which labels in which order, as 16 hexadecimal digits; not their pixels."""
        digest = hashlib.sha256(self._identity())
        digest.update(self.labels.tobytes())
        digest.update("\n".join(self.classes).encode(errors="surrogateescape"))
        return digest.hexdigest()[:16]

    def _identity(self) -> bytes:
        raise NotImplementedError


class Digits(Source):
    """Scikit-learn's 1,797 handwritten digits, 8x8: 16 grey levels spread over 0 to 255. 1,297 train, 500 val (50 of each)."""

    def __init__(self, split: str):
        from sklearn.datasets import load_digits  # a second to import; the other sources need none of it

        digits = load_digits()
        mixed = draws.permutation(0, 0, len(digits.target), draws.Purpose.SPLIT)
        held_out = np.concatenate([mixed[digits.target[mixed] == digit][:_DIGITS_PER_CLASS] for digit in range(10)])
        self._numbers = np.sort(held_out if split == "val" else np.setdiff1d(mixed, held_out))
        super().__init__("scikit-learn's digits", digits.target[self._numbers], [str(digit) for digit in range(10)])
        grey = np.rint(digits.images[self._numbers] * (255 / 16)).astype(np.uint8)
        self._pixels = np.repeat(grey[..., None], 3, axis=3)

    def read(self, index: int) -> np.ndarray:
        return self._pixels[index]

    def name(self, index: int) -> str:
        return f"digits/{self._numbers[index]}"

    def take(self, indices: np.ndarray) -> "Digits":
        taken = copy.copy(self)
        taken.labels, taken._numbers, taken._pixels = self.labels[indices], self._numbers[indices], self._pixels[indices]
        return taken

    def _identity(self) -> bytes:
        return b"digits" + self._numbers.tobytes()


class Files(Source):
    """Image files in a folder, or in a zip that is read in place."""

    def __init__(self, where: str, files: Listing, labels: np.ndarray, classes: list[str]):
        super().__init__(where, labels, classes)
        self.files = files
        self._zip: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_zip": None}  # an open file belongs to its process

    def read(self, index: int) -> np.ndarray:
        name = self.name(index)
        return decode(self.content(index), name)

    def content(self, index: int) -> bytes:
        """The file's bytes as they are stored. Raises UnreadableImage."""
        try:
            return self._from_zip(index) if len(self.files.spans) else Path(self.files.root, self.files.path(index)).read_bytes()
        except (OSError, zlib.error) as error:
            raise UnreadableImage(f"{self.name(index)}: {getattr(error, 'strerror', None) or error}") from error

    def name(self, index: int) -> str:
        return os.path.join(self.files.root, self.files.within, self.files.path(index))

    def take(self, indices: np.ndarray) -> "Files":
        return Files(self.where, self.files.take(indices), self.labels[indices], self.classes)

    def check_present(self) -> None:
        if not os.path.exists(self.files.root):
            raise FileNotFoundError(f"data.root: {self.files.root} is gone; it was there when the run began")

    def _from_zip(self, index: int) -> bytes:
        if self._zip is None:
            self._zip = os.open(self.files.root, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        offset, size, method = (int(number) for number in self.files.spans[index])
        local = os.pread(self._zip, 30, offset)  # the local header: its name and extra field may differ in length from the directory's
        start = offset + 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
        stored = os.pread(self._zip, size, start)
        if local[:4] != b"PK\3\4" or len(stored) != size:
            raise OSError("the zip is damaged here, or was replaced")
        return zlib.decompress(stored, -15) if method else stored

    def _identity(self) -> bytes:
        return self.files.packed.tobytes() + self.files.ends.tobytes()


class Beton(Source):
    """A .beton file, or a set of its shards. Read here without FFCV, one image at a time; `compiled` reads it fast."""

    def __init__(self, samples: Samples):
        classes = samples.manifest.get("classes")
        if classes is None:    # of FFCV's own writer, which keeps no names
            classes = [str(label) for label in range(int(samples.label.max(initial=-1)) + 1)]
        super().__init__(samples.paths[0], samples.label, classes)
        self.samples = samples
        self._chosen = b""

    def read(self, index: int) -> np.ndarray:
        stored = self.content(index)
        if self.samples.mode[index] == beton_file.RAW:
            return np.frombuffer(stored, np.uint8).reshape(self.samples.height[index], self.samples.width[index], 3).copy()
        return decode(stored, self.name(index))

    def content(self, index: int) -> bytes:
        """The image's bytes as they are stored. Raises UnreadableImage."""
        try:
            return beton_file.content(self.samples, index)
        except (OSError, EOFError) as error:
            raise UnreadableImage(f"{self.name(index)}: {getattr(error, 'strerror', None) or error}") from error

    def name(self, index: int) -> str:
        return self.samples.name(index)

    def take(self, indices: np.ndarray) -> "Beton":
        taken = Beton(self.samples.take(indices))
        taken._chosen = self._chosen + indices.astype(np.int64).tobytes()
        return taken

    def check_present(self) -> None:
        for path in self.samples.paths:
            if not os.path.exists(path):
                raise FileNotFoundError(f"data.root: {path} is gone; it was there when the run began")

    @property
    def fingerprint(self) -> str:
        """That of the images it was written from, so that a run may go on from their folder; of its own entries without a manifest."""
        written_from = self.samples.manifest.get("fingerprint")
        return written_from if written_from and not self._chosen else super().fingerprint

    def _identity(self) -> bytes:
        samples = self.samples
        entries = samples.length.tobytes() + samples.place.tobytes() + samples.file.tobytes()
        return str(samples.manifest.get("fingerprint")).encode() + self._chosen + entries


class NoSuchSplit(ValueError):
    """The data set has no folder or list of that name."""


def open_source(config: DataConfig, split: Literal["train", "val"]) -> Source:
    """The images of one part. Class numbers are those of the training part, in both.

    Raises:
        ValueError: the folder is absent, empty, or has no such part; names the key, the value and a remedy.
    """
    if split not in ("train", "val"):
        raise ValueError(f"split: {split!r} is not a part of a data set; choose one of: train, val")
    if config.source not in ("digits", "cifar10", "folder"):
        raise ValueError(f"data.source: {config.source!r} is not a source; choose one of: digits, cifar10, folder")
    if config.source == "digits":
        source: Source = Digits(split)
        return _subset(source, config.subset) if split == "train" else source
    stored = _stored(config, split)
    if stored is not None:
        beton = Beton(beton_file.read(stored))
        return _subset(beton, config.subset) if split == "train" else beton
    cache = Path(config.cache_dir).expanduser() if config.cache_dir else _user_cache()
    root = _root(config, cache)
    if split == "train":
        where, files, written = _train(config, root, cache)
        return _subset(Files(where, files, *parts.labels(where, files, written, None)), config.subset)
    name = "test" if config.source == "cifar10" else config.val
    found = parts.find(root if root.suffix != ".beton" else root.parent, name, cache)
    if found is None:
        raise NoSuchSplit(
            f"data.val: {root} has no folder or list {name!r}; name the one that holds the validation images,"
            " or leave out what needs a validation part"
        )
    where, files, written = found
    _check_not_empty(where, files)
    return Files(where, files, *parts.labels(where, files, written, _classes(config, root, cache)))


def _user_cache() -> Path:
    """Folder for lists of files. A user without a home gets one that cannot be written to, and no lists are kept."""
    home = os.path.expanduser("~")
    return Path(home if os.path.isabs(home) else os.devnull) / ".cache" / "ssl_pretrain"


def _stored(config: DataConfig, split: str) -> Path | None:
    """The .beton of a part: `root` itself, or what lies in it or beside it under the part's name."""
    if not config.root:
        return None
    root = Path(config.root).expanduser()
    if split == "train" and root.suffix.lower() == ".beton":
        return root
    names = [config.train] if split == "train" else ["test", "val"] if config.source == "cifar10" else [config.val]
    found = [beton_file.find(root if root.is_dir() else root.parent, name) for name in names if _prefers_stored(config, root, name)]
    return next((path for path in found if path is not None), None)


def _prefers_stored(config: DataConfig, root: Path, part: str) -> bool:
    """A folder of images beside the .beton is taken where FFCV is absent, or where the config asks for folders."""
    if not (root / part).is_dir() or config.loader == "ffcv":
        return root.is_dir() or root.suffix.lower() == ".beton"
    return config.loader == "auto" and importlib.util.find_spec("ffcv") is not None


def _classes(config: DataConfig, root: Path, cache: Path) -> list[str]:
    """Those of the training part, whose numbers the validation part has too."""
    stored = _stored(config, "train")
    if stored is not None:
        return Beton(beton_file.read(stored)).classes
    where, files, written = _train(config, root, cache)
    return parts.labels(where, files, written, None)[1]


def require_labels(source: Source, what: str) -> None:
    """Nothing if every image has a label; else ValueError saying that `what` needs them and how to give them."""
    missing = int((source.labels < 0).sum())
    if missing:
        number = "no" if missing == len(source) else f"{len(source) - missing} of {len(source)}"
        raise ValueError(
            f"data.root: {what} needs labels, and {source.where} has {number} labelled images;"
            " put the images in one folder per class (<class>/<file>), or list them in a CSV as path,label"
        )


def _root(config: DataConfig, cache: Path) -> Path:
    root = Path(config.root).expanduser()
    if config.source == "cifar10" and (not config.root or (root / "cifar-10-batches-py").is_dir()):
        return cifar10.packed(config.root, cache)
    if not config.root:
        raise ValueError(f"data.root: not set; {_KINDS}, as in data.root=/data/imagenet")
    if not root.exists():
        raise ValueError(f"data.root: {root} does not exist; {_KINDS}")
    if root.is_file() and root.suffix.lower() not in (".zip", ".csv", ".txt", ".beton"):
        raise ValueError(f"data.root: {root} is a file of a kind that is not read; {_KINDS}")
    return root


def _train(config: DataConfig, root: Path, cache: Path) -> tuple[str, Listing, list[str] | None]:
    is_list = root.is_file() and root.suffix.lower() != ".zip"
    found = None if is_list else parts.find(root, config.train, cache)
    if found is None and config.source == "cifar10":
        raise ValueError(f"data.root: {root} has no folder 'train'; CIFAR-10 is train/<class>/ and test/<class>/, in a folder or a .zip")
    if found is None and config.train != DataConfig.train and not is_list:
        raise ValueError(f"data.train: {root} has no folder or list {config.train!r}; name the one that holds the training images")
    where, files, written = found or parts.whole(root, config.val, cache)
    _check_not_empty(where, files)
    return where, files, written


def _check_not_empty(where: str, files: Listing) -> None:
    if not len(files):
        raise ValueError(f"data.root: {where} holds no image; looked at every depth for {' '.join(listing.SUFFIXES)}")


def _subset(source: Source, size: int) -> Source:
    """The same choice in every run, so that runs of different seeds see the same images."""
    if not 0 <= size <= len(source):
        raise ValueError(f"data.subset: {size} of {len(source)} training images; give a number from 1 to {len(source)}, or 0 for all")
    return source.take(np.sort(draws.permutation(0, 0, len(source), draws.Purpose.SUBSET)[:size])) if size else source
