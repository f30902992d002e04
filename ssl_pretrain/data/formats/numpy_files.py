"""Images in .npy and .npz files, with their labels and splits."""

import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO

from ssl_pretrain.data.config import DataConfig, pixel_format
from ssl_pretrain.data.formats.array_choice import (
    IMAGE_NAMES,
    LABEL_NAMES,
    ArrayPair,
    choose_arrays,
    choose_labels,
    parse_name,
    read_labels,
)
from ssl_pretrain.data.formats.array_source import ArraySource, find_axes
from ssl_pretrain.data.formats.named_splits import WHOLE, choose_split
from ssl_pretrain.data.formats.stored_array import StoredArray, read_npy_header
from ssl_pretrain.data.image_values import MAX_CHANNELS
from ssl_pretrain.data.python_source import index_labels
from ssl_pretrain.data.split_search import split_of

MAX_FILES = 64  # a folder with more .npy holds one image per file, which is another layout
_LOCAL_HEADER_BYTES = 30  # length of a zip member's header before its name


def open_numpy(root: Path, config: DataConfig, cache_dir: Path, split: str) -> ArraySource:
    """Open a split of an .npy, an .npz, or a folder of .npy.

    Raises:
        NoSuchSplit: If there is no validation split.
        ValueError: If the arrays of images or labels are absent, ambiguous or unsuitable.
    """
    if root.suffix.lower() == ".npz":
        arrays = read_npz(root)
        pairs = choose_arrays(arrays, config.image_column, config.label_column, str(root))
    elif root.is_dir():
        arrays = {path.stem: read_npy(path) for path in list_npy(root)}
        pairs = choose_arrays(arrays, config.image_column, config.label_column, str(root))
    else:
        pairs = _choose_beside(root, config.label_column)
    pair = choose_split(pairs, split, config, str(root))
    return open_pair(pair, config, cache_dir)


def open_pair(
    pair: ArrayPair,
    config: DataConfig,
    cache_dir: Path,
    classes: list[str] | None = None,
) -> ArraySource:
    """Open images and their labels, from a copy in the cache if they are compressed.

    Args:
        pair: The arrays.
        config: Its keys `range` and `channels` are used.
        cache_dir: Folder of the copy.
        classes: Names of the classes that the labels number. If None, they are the labels.
    """
    find_axes(pair.images, config.channels)  # raises before a copy is written
    values, notes = read_labels(pair)
    name = pair.labels.name if pair.labels is not None else ""
    num_images = pair.images.shape[0]
    labels, class_names = index_labels(f"data.label_column: {name}", values, num_images, classes)
    images = pair.images.unpacked(cache_dir)
    source = ArraySource([images], labels, class_names, pixel_format(config))
    if images.path != pair.images.path:
        notes.append(f"the images of {images.name} are read from their unpacked copy {images.path}")
    source.notes = notes
    return source


def list_npy(folder: Path) -> list[Path]:
    """Return the .npy files of a folder, sorted by name."""
    return sorted(path for path in folder.glob("*.npy") if not path.name.startswith("."))


def holds_many_images(folder: Path) -> bool:
    """Return True if the .npy of a folder are arrays of many images, and False for one image each.

    Arrays of many images have usual names, such as `x_train.npy`, and there are few of them. They
    lie directly in the folder.

    Raises:
        ValueError: If the names and the shapes contradict each other.
    """
    paths = list_npy(folder)
    if not paths or len(paths) > MAX_FILES:
        return False
    shapes = {path: _shape_of(path) for path in paths}
    named = [path for path in paths if parse_name(path.stem)[0] in (*IMAGE_NAMES, "")]
    if named:
        _refuse_single_images(folder, named[0], shapes)
        return True
    # Images may also lie in folders or shards.
    has_others = any(path.is_dir() or path.suffix.lower() == ".tar" for path in folder.iterdir())
    has_other_shapes = any(shape and len(shape) not in (2, 3) for shape in shapes.values())
    if not has_others and (has_other_shapes or len(paths) == 1):
        arrays = ", ".join(f"{path.name} {shape}" for path, shape in list(shapes.items())[:5])
        largest = max(paths, key=lambda path: len(shapes[path]))
        raise ValueError(
            f"data.root: {folder} has no .npy with a usual name of images, such as images.npy, and "
            f"what it has is not one image per file ({arrays}); give the array of the images, as "
            f"in data.root={largest}"
        )
    return False


def _refuse_single_images(
    folder: Path, named: Path, shapes: Mapping[Path, tuple[int, ...]]
) -> None:
    """Raise ValueError if an array with a usual name and its neighbors look like one image each."""
    shape = shapes[named]
    content = parse_name(named.stem)[0]
    twins = [path for path in shapes if shapes[path] == shape]
    unusual = [path for path in twins if parse_name(path.stem)[0] != content]
    if unusual and _may_be_one_image(shape):
        raise ValueError(
            f"data.root: {folder} is ambiguous, because {named.name} is called like an array of "
            f"many images, and {unusual[0].name} has the same shape {shape}, which may be that of "
            f"one image; rename {named.name} if each file is one image, or give data.root={named}"
        )


def _may_be_one_image(shape: tuple[int, ...]) -> bool:
    """Return True for two axes, and for three of which the first or last may be channels."""
    if len(shape) != 3:
        return len(shape) == 2
    shortest = min(shape[0], shape[2])
    return shortest <= MAX_CHANNELS and shortest < min(shape[1], max(shape[0], shape[2]))


def _shape_of(path: Path) -> tuple[int, ...]:
    """Return the shape of an array, or an empty one if it cannot be read."""
    try:
        return read_npy(path).shape
    except (ValueError, OSError):
        return ()


def read_npy(path: Path) -> StoredArray:
    """Read the header of an .npy."""
    with path.open("rb") as file:
        return read_npy_header(file, str(path))


def _choose_beside(root: Path, label_name: str) -> dict[str, ArrayPair]:
    """Return the arrays of an .npy and of the files beside it that belong to it, by split.

    These are `y_train.npy` and `x_test.npy` for `x_train.npy`, `labels.npy` for `images.npy`, and
    `cells_labels.npy` for `cells.npy`. If no other images are beside it, `labels.npy` also belongs
    to `cells.npy`.
    """
    content, split = parse_name(root.stem)
    files = {path.stem: path for path in list_npy(root.parent)} | {root.stem: root}
    label_names = {*(f"{content}_{name}" for name in LABEL_NAMES), *LABEL_NAMES}
    contents = {parse_name(name)[0] for name in files}
    if content not in (*IMAGE_NAMES, "") and contents - {content} - label_names:
        label_names -= set(LABEL_NAMES)  # they may belong to the other images
    labels = {
        name: read_npy(path)
        for name, path in files.items()
        if parse_name(name)[0] in label_names or label_name in (name, parse_name(name)[0])
    }
    splits = {split: root.stem}
    if split_of(split) == "train":
        splits |= {
            other: name
            for name in files
            for other_content, other in [parse_name(name)]
            if other_content == content and split_of(other) in ("val", "test")
        }
    pairs = {
        name: ArrayPair(
            read_npy(files[stem]), choose_labels(labels, content, name, label_name, str(root))
        )
        for name, stem in splits.items()
    }
    return pairs if split_of(split) == "train" else {WHOLE: pairs[split]}


def read_npz(path: Path) -> dict[str, StoredArray]:
    """Return the arrays of an .npz by name, without their values.

    Raises:
        ValueError: If the file is not an .npz.
    """
    arrays = {}
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            for info in archive.infolist():
                if not info.filename.endswith(".npy"):
                    continue
                name = info.filename.removesuffix(".npy")
                arrays[name] = _read_member(archive, info, file, f"{path}[{name}]")
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"data.root: {path} is not an .npz that can be read ({error}); write it with np.savez"
        ) from None
    return arrays


def _read_member(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, file: IO[bytes], name: str
) -> StoredArray:
    """Read the header of one array, and find its position in the file."""
    path = str(archive.filename)
    with archive.open(info) as member:
        array = read_npy_header(member, path, name)
        header_bytes = member.tell()
    if info.compress_type != zipfile.ZIP_STORED:
        stream = partial(_open_member, path, info.filename, header_bytes)
        return replace(array, offset=header_bytes, open_stream=stream)
    file.seek(info.header_offset)
    local_header = file.read(_LOCAL_HEADER_BYTES)
    name_bytes = int.from_bytes(local_header[26:28], "little")
    extra_bytes = int.from_bytes(local_header[28:30], "little")
    start = info.header_offset + _LOCAL_HEADER_BYTES + name_bytes + extra_bytes
    return replace(array, offset=start + header_bytes)


@contextmanager
def _open_member(path: str, member: str, header_bytes: int) -> Iterator[IO[bytes]]:
    """Open the values of a compressed array."""
    with zipfile.ZipFile(path) as archive, archive.open(member) as file:
        file.read(header_bytes)
        yield file
