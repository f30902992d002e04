"""Where images come from: scikit-learn's digits, CIFAR-10, or any folder, zip or list of files.

The class of an image is its first folder, as torchvision's ImageFolder has it. An image beside the class folders has no
label (-1); so have all images where there is one folder or none. Only evaluations and supervised methods need labels.

    source: digits                                   1,797 embedded images, nothing to download
    source: cifar10   root: "" | folder | .zip       train/<class>/, test/<class>/; "" downloads
    source: folder    root: /data/imagenet           train/<class>/, val/<class>/
                      root: /data/photos             nothing in it looks like a split: everything below is for training
                      root: /data/sample.zip         either layout, read in place
                      root: /data/train.csv          a list of paths, with labels or without
                      root: /data/train.beton        written by `python -m ssl_pretrain.data.beton write`,
                                                     or a folder with train.beton and val.beton, or with their shards
"""

import copy
import errno
import hashlib
import importlib.util
import math
import os
import stat
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ssl_pretrain import rng
from ssl_pretrain.data import cifar10, labels, listing, splits
from ssl_pretrain.data.beton import file as beton_file
from ssl_pretrain.data.beton.file import Samples
from ssl_pretrain.data.file_lists import role
from ssl_pretrain.data.images import MAX_BYTES, Range, UnreadableImage, decode, inspect
from ssl_pretrain.data.listing import Listing, Span
from ssl_pretrain.schema import setting

_DIGITS_PER_CLASS = 50  # held out; 10 classes
_RATIO = 200  # most that a deflated member may grow, if it grows beyond _LARGE bytes
_LARGE = 1 << 28
_WIDE_ENOUGH = 0.25  # share of the 16-bit values that have to be in use, where data.range says nothing: 14 bits
_MEASURED = 32  # images whose values are looked at when a source of 16-bit images is opened
_KINDS = "give a folder, a .zip, a .beton, or a list of files (.csv, .tsv, .txt)"
_SHOWN = 8  # reasons to leave files out that are named
_TABLES_NOT_READ = (
    ".parquet",
    ".feather",
    ".xlsx",
    ".xls",
    ".ods",
    ".json",
    ".jsonl",
    ".pkl",
    ".npy",
    ".npz",
    ".h5",
    ".mat",
)


@dataclass
class DataConfig:
    """The images and how they are read."""

    source: Literal["digits", "cifar10", "folder"] = setting(
        "folder",
        "Kind of data set. digits: scikit-learn's, no download. cifar10: its archive. "
        "folder: images in a folder, a .zip, a list of files or a .beton.",
    )
    root: str = setting(
        "", "Path of the data: a folder, a .zip, a list of files or a .beton.", on_resume="free"
    )
    train: str = setting(
        "",
        "Training images: a folder, list, .zip or .beton, absolute or relative to root. "
        ".: root itself. Empty: found by its name.",
        on_resume="free",
    )
    val: str = setting(
        "",
        "Validation images, given like train. none: there are none. Empty: found by its name.",
        on_resume="free",
    )
    subset: int = setting(0, "Number of training images to use, chosen at random once. 0: all.")
    num_workers: int = setting(
        4,
        "Threads (ffcv) or processes (folder) per rank that decode and crop. "
        "0: one thread, or no extra process.",
        on_resume="free",
    )
    loader: Literal["auto", "ffcv", "folder"] = setting(
        "auto",
        "Decoder of the images. auto: ffcv for a .beton if FFCV is installed. "
        "The run prints its choice and the reason.",
        on_resume="free",
    )
    cache: Literal["none", "device"] = setting(
        "none", "device: upload all images once and crop them on the device, as for CIFAR-10."
    )
    order: Literal["random", "quasi_random"] = setting(
        "random",
        "Order of the images. quasi_random: mostly the order on disk, for data larger than memory.",
    )
    quasi_random_window: int = setting(
        16384, "Images shuffled with each other by quasi_random. They must fit in memory."
    )
    max_replaced: float = setting(
        0.01,
        "Share of an epoch's images that may be unreadable and replaced by others. "
        "The run stops above it.",
        on_resume="free",
        maximum=1,
    )
    range: list[float] = setting(
        [],
        "[low, high] of 16-bit gray and float images, mapped to 0 and 255. []: 0 to 65535.",
        minimum=-1e12,
        maximum=1e12,
    )
    cache_dir: str = setting(
        "",
        "Folder for caches of file lists. Empty: ~/.cache/ssl_pretrain.",
        on_resume="free",
    )


def check(config: DataConfig) -> None:
    """Raise ValueError, naming the key, if a value can only be a mistake."""
    if not 0 <= config.max_replaced <= 1:
        raise ValueError(
            f"data.max_replaced: {config.max_replaced} must be a share between 0 and 1, such as 0.01"
        )
    finite = all(isinstance(value, int | float) and math.isfinite(value) for value in config.range)
    if config.range and (
        len(config.range) != 2 or not finite or config.range[0] >= config.range[1]
    ):
        raise ValueError(
            f"data.range: {list(config.range)} must be two numbers, the lower one first, such as [0, 4095]"
        )


class Source:
    """Images by number, 0 to len - 1, in one fixed order. Small to pickle: every loader worker gets a copy.

    labels: int64 (n,), an index into `classes`, -1 for none. where: the folder or file, for messages.
    """

    def __init__(self, where: str, labels: np.ndarray, classes: list[str]):
        self.where = where
        self.labels = labels.astype(np.int64)
        self.classes = classes
        self.notes: list[str] = []  # how the layout was read, and what was left out

    def __len__(self) -> int:
        return len(self.labels)

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def read(self, index: int) -> np.ndarray:
        """Return RGB pixels, uint8 (height, width, 3). Raises UnreadableImage, which names the file."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """Return the name of the image's file, for messages."""
        raise NotImplementedError

    def take(self, indices: np.ndarray) -> "Source":
        """Return a source of these images alone, in this order."""
        raise NotImplementedError

    def check_present(self) -> None:
        """Raise FileNotFoundError if the whole folder or file is gone, so that no image of it is worth trying."""

    @property
    def fingerprint(self) -> str:
        """Digest of the images' paths, labels and order, as 16 hexadecimal digits. Pixels are no part of it."""
        digest = hashlib.sha256(self._identity())
        digest.update(self.labels.tobytes())
        digest.update("\n".join(self.classes).encode(errors="surrogateescape"))
        return digest.hexdigest()[:16]

    def _identity(self) -> bytes:
        raise NotImplementedError


class Digits(Source):
    """Scikit-learn's 1,797 handwritten digits, 8x8: 16 grey levels spread over 0 to 255. 1,297 train, 500 val (50 of each)."""

    def __init__(self, split: str):
        from sklearn.datasets import (
            load_digits,  # a second to import; the other sources need none of it
        )

        digits = load_digits()
        mixed = rng.permutation(0, 0, len(digits.target), rng.Purpose.SPLIT)
        held_out = np.concatenate(
            [mixed[digits.target[mixed] == digit][:_DIGITS_PER_CLASS] for digit in range(10)]
        )
        self._numbers = np.sort(held_out if split == "val" else np.setdiff1d(mixed, held_out))
        super().__init__(
            "scikit-learn's digits",
            digits.target[self._numbers],
            [str(digit) for digit in range(10)],
        )
        grey = np.rint(digits.images[self._numbers] * (255 / 16)).astype(np.uint8)
        self._pixels = np.repeat(grey[..., None], 3, axis=3)

    def read(self, index: int) -> np.ndarray:
        return self._pixels[index]

    def name(self, index: int) -> str:
        return f"digits/{self._numbers[index]}"

    def take(self, indices: np.ndarray) -> "Digits":
        taken = copy.copy(self)
        taken.labels, taken._numbers, taken._pixels = (
            self.labels[indices],
            self._numbers[indices],
            self._pixels[indices],
        )
        return taken

    def _identity(self) -> bytes:
        return b"digits" + self._numbers.tobytes()


class Files(Source):
    """Image files in a folder, or in a zip that is read in place."""

    def __init__(
        self,
        where: str,
        files: Listing,
        labels: np.ndarray,
        classes: list[str],
        values: Range | None = None,
    ):
        super().__init__(where, labels, classes)
        self.files = files
        self.values = values  # `data.range`
        self._zip: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_zip": None}  # an open file belongs to its process

    def read(self, index: int) -> np.ndarray:
        return decode(self.content(index), self.name(index), self.values)

    def content(self, index: int) -> bytes:
        """The file's bytes as they are stored. Raises UnreadableImage."""
        try:
            return (
                self._from_zip(index)
                if len(self.files.spans)
                else _read_regular(os.path.join(self.files.root, self.files.path(index)))
            )
        except (OSError, zlib.error) as error:
            raise UnreadableImage(
                f"{self.name(index)}: {getattr(error, 'strerror', None) or error}"
            ) from error

    def name(self, index: int) -> str:
        return os.path.join(self.files.root, self.files.within, self.files.path(index))

    def take(self, indices: np.ndarray) -> "Files":
        return Files(
            self.where, self.files.take(indices), self.labels[indices], self.classes, self.values
        )

    def check_present(self) -> None:
        if not os.path.exists(self.files.root):
            raise FileNotFoundError(
                f"data.root: {self.files.root} is gone; it was there when the run began"
            )

    def _from_zip(self, index: int) -> bytes:
        if self._zip is None:
            self._zip = os.open(self.files.root, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        span = Span(*(int(number) for number in self.files.spans[index]))
        local = os.pread(
            self._zip, 30, span.offset
        )  # its name and extra field may differ in length from the directory's
        start = (
            span.offset
            + 30
            + int.from_bytes(local[26:28], "little")
            + int.from_bytes(local[28:30], "little")
        )
        stored = os.pread(self._zip, min(span.stored, MAX_BYTES), start)
        if local[:4] != b"PK\3\4" or len(stored) != span.stored:
            raise OSError("the zip is damaged here, or was replaced")
        if span.size > MAX_BYTES or span.size > max(_LARGE, _RATIO * span.stored):
            raise OSError(
                f"the zip says that it grows from {span.stored:,} to {span.size:,} bytes, more than an image does"
            )
        content = _inflated(stored, span.size) if span.method else stored
        if len(content) != span.size:
            raise OSError(
                f"the zip says that it has {span.size:,} bytes, and it has {'more' if len(content) > span.size else 'fewer'}"
            )
        if zlib.crc32(content) != span.crc:
            raise OSError("its checksum in the zip differs; the zip is damaged")
        return content

    def _identity(self) -> bytes:
        return self.files.packed.tobytes() + self.files.ends.tobytes()


def _inflated(stored: bytes, size: int) -> bytes:
    """Inflate a member of a zip to at most one byte more than its size, which is enough to tell that it is too long."""
    return zlib.decompressobj(-15).decompress(stored, size + 1)


class Beton(Source):
    """A .beton file, or a set of its shards. Read here without FFCV, one image at a time; `compiled` reads it fast."""

    def __init__(self, samples: Samples):
        classes = samples.manifest.get("classes")
        if classes is None:  # of FFCV's own writer, which keeps no names
            classes = [str(label) for label in range(int(samples.label.max(initial=-1)) + 1)]
        super().__init__(samples.paths[0], samples.label, classes)
        self.samples = samples
        self._chosen = b""

    def read(self, index: int) -> np.ndarray:
        stored = self.content(index)
        if self.samples.mode[index] == beton_file.RAW:
            return (
                np.frombuffer(stored, np.uint8)
                .reshape(self.samples.height[index], self.samples.width[index], 3)
                .copy()
            )
        pixels = decode(stored, self.name(index), jpeg=True)
        expected = (int(self.samples.height[index]), int(self.samples.width[index]))
        if pixels.shape[:2] != expected:
            raise UnreadableImage(f"{self.name(index)}: the JPEG has another size than its entry")
        return pixels

    def content(self, index: int) -> bytes:
        """The image's bytes as they are stored. Raises UnreadableImage."""
        try:
            return beton_file.content(self.samples, index)
        except (OSError, EOFError) as error:
            raise UnreadableImage(
                f"{self.name(index)}: {getattr(error, 'strerror', None) or error}"
            ) from error

    def name(self, index: int) -> str:
        return self.samples.name(index)

    def take(self, indices: np.ndarray) -> "Beton":
        taken = Beton(self.samples.take(indices))
        taken._chosen = self._chosen + indices.astype(np.int64).tobytes()
        return taken

    def check_present(self) -> None:
        beton_file.check_present(self.samples)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the source images, so that a run may go on from their folder. Without a manifest, of the file's own entries."""
        written_from = self.samples.manifest.get("fingerprint")
        return written_from if written_from and not self._chosen else super().fingerprint

    def _identity(self) -> bytes:
        samples = self.samples
        entries = samples.length.tobytes() + samples.place.tobytes() + samples.file.tobytes()
        return str(samples.manifest.get("fingerprint")).encode() + self._chosen + entries


class NoSuchSplit(ValueError):
    """The data set has no folder or list of that name."""


def open_source(
    config: DataConfig, split: Literal["train", "val"], classes: list[str] | None = None
) -> Source:
    """The images of one split. Class numbers are those of the training split, in both.

    Args:
        config: The data set.
        split: Which of its splits.
        classes: Classes of the training split, if it is open already.

    Raises:
        ValueError: the folder is absent, empty, or has no such split; names the key, the value and a remedy.
    """
    if split not in ("train", "val"):
        raise ValueError(
            f"split: {split!r} is not a split of a data set; choose one of: train, val"
        )
    check(config)
    if config.source not in ("digits", "cifar10", "folder"):
        raise ValueError(
            f"data.source: {config.source!r} is not a source; choose one of: digits, cifar10, folder"
        )
    if config.source == "digits":
        source: Source = Digits(split)
        return _subset(source, config.subset) if split == "train" else source
    stored = _stored(config, split)
    if stored is not None:
        beton = Beton(beton_file.read(stored))
        return _subset(beton, config.subset) if split == "train" else beton
    opened = _Opened(config, classes)
    return (
        _subset(opened.files("train"), config.subset) if split == "train" else opened.files("val")
    )


def layout_lines(config: DataConfig, train: Source) -> list[str]:
    """Lines for the start of a run: which folder is which split, how many images and labels, and what was left out.

    Args:
        config: The data set.
        train: Its training images, opened.
    """
    notes = list(train.notes)
    try:
        val = open_source(config, "val", train.classes)
        validation = f"{val.where}: {counts(val)}"
        notes += [note for note in val.notes if note not in notes] + _overlap(train, val)
    except (ValueError, OSError) as error:
        validation = f"none ({error})"
    lines = [f"training {train.where}: {counts(train)}; validation {validation}", *notes]
    return [printable(f"data: {line}") for line in lines]


def printable(text: str) -> str:
    """The text with control characters, and bytes of file names that are no text, as escapes such as \\x1b."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


def _overlap(train: Source, val: Source) -> list[str]:
    """A note where validation images are training images too. Looked for where one split's folder is in the other's, or the same."""
    if not isinstance(train, Files) or not isinstance(val, Files):
        return []
    roots = [
        os.path.join(os.path.realpath(source.files.root), source.files.within, "")
        for source in (train, val)
    ]
    if not roots[0].startswith(roots[1]) and not roots[1].startswith(roots[0]):
        return []
    held_out = {roots[1] + path for path in val.files.paths()}
    shared = sorted(held_out.intersection(roots[0] + path for path in train.files.paths()))
    return (
        [
            f"{len(shared):,} of {len(val):,} validation images are training images too (first: {shared[0]})"
        ]
        if shared
        else []
    )


def counts(source: Source) -> str:
    """Describe a source: its number of images, of classes and of images without a label."""
    images = f"{len(source):,} image" + ("s" if len(source) != 1 else "")
    missing = int((source.labels < 0).sum())
    if missing == len(source):
        return f"{images}, no labels"
    present = np.unique(source.labels[source.labels >= 0])
    names = ", ".join(source.classes[label] for label in present[:3]) + (
        ", ..." if len(present) > 3 else ""
    )
    of_all = f" of {len(source.classes):,}" if len(present) < len(source.classes) else ""
    kinds = "class" if len(present) == 1 and not of_all else "classes"
    return f"{images}, {len(present):,}{of_all} {kinds} ({names})" + (
        f", {missing:,} without a label" if missing else ""
    )


class _Opened:
    """A data set of image files: its root, its splits, and their labels."""

    def __init__(self, config: DataConfig, classes: list[str] | None = None):
        self.config, self.known = config, classes
        self.cache = Path(config.cache_dir).expanduser() if config.cache_dir else _user_cache()
        self.root = _root(config, self.cache)
        names = ("train", "test") if config.source == "cifar10" else ("", "")
        train, val = config.train or names[0], config.val or names[1]
        if _is_stored(
            config, "train"
        ):  # beside a .beton for training lie the folders of other splits
            self.root = self.root if self.root.is_dir() else self.root.parent
            train = ""
        self.splits = splits.locate(self.root, train, val, self.cache)

    def files(self, split: Literal["train", "val"]) -> Files:
        """The images of a split with their labels."""
        place = self.splits.train if split == "train" else self.splits.val
        if place is None:
            raise (ValueError if split == "train" or self.splits.train_error else NoSuchSplit)(
                self._absent(split)
            )
        role = "train" if split == "train" else self.splits.val_role
        key = f"data.{split}" if place.path != self.root or place.within else "data.root"
        content = splits.content(place, role, self.cache, key, self.root)
        where = place.where
        if not len(content.files):
            raise ValueError(_empty(where, content.files))
        classes = None if split == "train" else self._classes()
        root = splits.tree(self.root, self.cache)
        tree = splits.tree(place.path, self.cache)
        tree = tree if not place.within else splits.inner(tree, place.within)
        labelled = labels.assign(
            where, content, classes, labels.table_names(where, role), tree, root
        )
        source = Files(
            where, content.files, labelled.numbers, labelled.classes, _values(self.config)
        )
        source.notes = [
            *(self.splits.notes if split == "train" else ()),
            *content.notes,
            *labelled.notes,
            *_left_out(content.files),
        ]
        return source

    def _absent(self, split: str) -> str:
        if split == "train" and self.config.source == "cifar10":
            return f"data.root: {self.root} has no folder 'train'; CIFAR-10 is train/<class>/ and test/<class>/, in a folder or a .zip"
        if self.splits.train_error and (split == "train" or not _is_stored(self.config, "train")):
            return self.splits.train_error
        return self.splits.val_error

    def _classes(self) -> list[str]:
        """Classes of the training split, whose numbers the validation split has too."""
        if self.known is not None:
            return self.known
        stored = _stored(self.config, "train")
        if stored is not None:
            return Beton(beton_file.read(stored)).classes
        return self.files("train").classes


def _left_out(files: Listing) -> list[str]:
    """A note on what is not read, the most frequent reason first."""
    reasons = sorted(files.left_out, key=lambda each: -each.count)
    shown = [f"{each.count:,} {each.reason} (first: {each.first})" for each in reasons[:_SHOWN]]
    more = sum(each.count for each in reasons[_SHOWN:])
    return (
        [f"left out in {files.root}: {', '.join(shown)}" + (f", and {more:,} more" if more else "")]
        if shown
        else []
    )


def _empty(where: str, files: Listing) -> str:
    return "; ".join(
        [f"data.root: {where} holds no image that Pillow decodes, at any depth", *_left_out(files)]
    )


def _read_regular(path: str) -> bytes:
    """Return the bytes of a regular file. Raises OSError, also for a pipe or a device, which could be read without end."""
    handle = os.open(
        path,
        os.O_RDONLY
        | getattr(os, "O_CLOEXEC", 0)
        | getattr(os, "O_NONBLOCK", 0)
        | getattr(os, "O_BINARY", 0),
    )
    with os.fdopen(handle, "rb") as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        if status.st_size > MAX_BYTES:
            raise OSError(errno.EFBIG, f"{status.st_size:,} bytes are more than an image has")
        return file.read()


def _values(config: DataConfig) -> Range | None:
    return (float(config.range[0]), float(config.range[1])) if config.range else None


def check_range(source: Source) -> None:
    """Raise ValueError if the 16-bit images of a source would become a few dark levels, because `data.range` is not set.

    Some images are looked at, evenly spaced in the source. Those of 8 bits and floats are passed over.
    """
    if not isinstance(source, Files) or source.values is not None:
        return
    files = source
    used = []
    for index in (
        np.linspace(0, len(files) - 1, min(_MEASURED, len(files))).astype(np.int64).tolist()
    ):
        try:
            stored = inspect(files.content(index), files.name(index))
        except UnreadableImage:
            continue
        if stored.low is not None and stored.high is not None and stored.mode != "F":
            used.append((stored.low, stored.high))
    if not used:
        return
    low, high = min(low for low, _ in used), max(high for _, high in used)
    if high - low >= _WIDE_ENOUGH * 65536:
        return
    levels = max(1, round((high - low) / 257))
    raise ValueError(
        f"data.range: not set, and the 16-bit images of {files.where} use values from {low:,.0f} to {high:,.0f} ({len(used)} of them "
        f"measured), which would leave {levels} of 256 gray levels; give the values that are to be black and white, such as "
        f"data.range=[{low:.0f},{high:.0f}] (python -m ssl_pretrain.data.inspect measures them), or data.range=[0,65535] to leave them as "
        "they are"
    )


def _user_cache() -> Path:
    """Folder for lists of files. A user without a home gets one that cannot be written to, and no lists are kept."""
    home = os.path.expanduser("~")
    return Path(home if os.path.isabs(home) else os.devnull) / ".cache" / "ssl_pretrain"


def _stored(config: DataConfig, split: str) -> Path | None:
    """The .beton of a split: `root` itself, what `data.train` or `data.val` names, or what lies in root under the split's name."""
    named = config.train if split == "train" else config.val
    if named.lower().endswith(".beton"):
        return _folder_of(config) / Path(named).expanduser()
    if not config.root:
        return None
    root = Path(config.root).expanduser()
    if split == "train" and root.suffix.lower() == ".beton":
        return root
    if named:
        names = [named] if named == os.path.basename(named) else []
    elif split == "train":
        names = ["train"]
    else:
        names = ["test", "val"] if config.source == "cifar10" else ["val", "test"]
    found = [
        _beton(_folder_of(config), name) for name in names if _prefers_stored(config, root, name)
    ]
    return next((path for path in found if path is not None), None)


def _beton(folder: Path, name: str) -> Path | None:
    """The .beton of a split by its name, or by another usual spelling of it."""
    exact = beton_file.find(folder, name)
    if exact is not None or role(name) is None:
        return exact
    spellings = sorted({path.name.split(".")[0].split("-0")[0] for path in folder.glob("*.beton")})
    found = [beton_file.find(folder, stem) for stem in spellings if role(stem) == role(name)]
    return next((path for path in found if path is not None), None)


def _folder_of(config: DataConfig) -> Path:
    root = Path(config.root).expanduser()
    return root if root.is_dir() else root.parent


def _is_stored(config: DataConfig, split: str) -> bool:
    return _stored(config, split) is not None


def _prefers_stored(config: DataConfig, root: Path, name: str) -> bool:
    """Return True if a split's .beton is read.

    A folder of images beside it is read instead where FFCV is absent or the configuration asks for folders.
    """
    folders = (
        [each for each in root.iterdir() if role(each.name) == role(name) and each.is_dir()]
        if root.is_dir() and role(name)
        else []
    )
    if not (folders or (root / name).is_dir()) or config.loader == "ffcv":
        return root.is_dir() or root.suffix.lower() == ".beton"
    return config.loader == "auto" and importlib.util.find_spec("ffcv") is not None


def require_labels(source: Source, what: str) -> None:
    """Raise ValueError unless every image has a label. The message says that `what` needs labels and how to give them."""
    missing = np.flatnonzero(source.labels < 0)
    if len(missing):
        number = (
            "no"
            if len(missing) == len(source)
            else f"{len(source) - len(missing)} of {len(source)}"
        )
        first = (
            ""
            if len(missing) == len(source)
            else f" (the first without a label: {source.name(int(missing[0]))})"
        )
        raise ValueError(
            f"data.root: {what} needs labels, and {source.where} has {number} labelled images{first};"
            " put the images in one folder per class (<class>/<file>), or list them in a CSV as path,label"
        )


def _root(config: DataConfig, cache: Path) -> Path:
    root = Path(config.root).expanduser()
    if config.source == "cifar10" and (not config.root or (root / "cifar-10-batches-py").is_dir()):
        return cifar10.packed(config.root, cache)
    if not config.root and os.path.isabs(os.path.expanduser(config.train)):
        return Path(config.train).expanduser()
    if not config.root:
        raise ValueError(f"data.root: not set; {_KINDS}, as in data.root=/data/imagenet")
    if not root.exists():
        raise ValueError(f"data.root: {root} does not exist; {_KINDS}")
    if root.suffix.lower() in _TABLES_NOT_READ and root.is_file():
        raise ValueError(
            f"data.root: {root} is a table of a kind that is not read; save it as .csv, with the columns path and label"
        )
    if not root.is_dir() and (
        not root.is_file() or root.suffix.lower() not in (".zip", *listing.TABLES, ".beton")
    ):
        raise ValueError(f"data.root: {root} is a file of a kind that is not read; {_KINDS}")
    return root


def _subset(source: Source, size: int) -> Source:
    """Choose `size` images, the same ones in every run, so that runs of different seeds see the same images. 0 takes all."""
    if not 0 <= size <= len(source):
        raise ValueError(
            f"data.subset: {size} of {len(source)} training images; give a number from 1 to {len(source)}, or 0 for all"
        )
    return (
        source.take(np.sort(rng.permutation(0, 0, len(source), rng.Purpose.SUBSET)[:size]))
        if size
        else source
    )
