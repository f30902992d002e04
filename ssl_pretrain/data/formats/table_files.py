"""Parquet and Arrow files, data sets from `Dataset.save_to_disk`, and those of the Hub."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssl_pretrain.data.config import DataConfig, pixel_format
from ssl_pretrain.data.formats.hugging_face import open_table
from ssl_pretrain.data.formats.named_splits import WHOLE, choose_split
from ssl_pretrain.data.image_source import Source
from ssl_pretrain.data.messages import abbreviate
from ssl_pretrain.data.split_search import split_of
from ssl_pretrain.system import optional_packages
from ssl_pretrain.system.error_text import first_line

SUFFIXES: tuple[str, ...] = (".parquet", ".arrow")
_MAX_DEPTH = 2  # folders below the root that are searched for shards
_HELD_OUT = ("val", "test")
_SAVED_MARKERS = ("dataset_dict.json", "state.json")


def open_tables(root: Path, config: DataConfig, cache_dir: Path, split: str) -> Source:
    """Open a split of a file, of a folder of shards, or of a saved data set.

    Raises:
        NoSuchSplit: If there is no validation split.
        ValueError: If `datasets` is not installed, a file is damaged, or the splits or columns are
            ambiguous.
    """
    require_datasets(str(root))
    if root.is_dir() and is_saved(root):
        available = _load_saved(root)
        table = choose_split(available, split, config, str(root))
    else:
        shards = choose_split(find_shards(root), split, config, str(root))
        table = load_shards(shards, cache_dir)
    return open_table(
        table,
        str(root),
        config.image_column,
        config.label_column,
        pixel_format(config),
        location=root,
        caption_column=config.caption_column,
    )


def open_hub(config: DataConfig, split: str) -> Source:
    """Open a split of a data set of the Hugging Face Hub, which is downloaded once.

    Raises:
        NoSuchSplit: If there is no validation split.
        ValueError: If the data set cannot be loaded.
    """
    require_datasets("data sets of the Hub")
    import datasets

    try:
        loaded = datasets.load_dataset(
            config.root, cache_dir=config.cache_dir or None, **config.args
        )
    except Exception as error:  # the library and its network code raise many kinds of errors
        reason = first_line(error)
        raise ValueError(
            f"data.root: {config.root} cannot be loaded from the Hugging Face Hub ({reason}); "
            "check the name (owner/name) and the network, or download it elsewhere and give the "
            "folder of its Parquet files"
        ) from error
    if isinstance(loaded, datasets.IterableDataset | datasets.IterableDatasetDict):
        raise ValueError(
            f"data.args: {config.root} is loaded as a stream, which has no order to resume from; "
            "leave out streaming"
        )
    available = dict(loaded) if hasattr(loaded, "keys") else {WHOLE: loaded}
    table = choose_split(available, split, config, config.root)
    return open_table(
        table,
        config.root,
        config.image_column,
        config.label_column,
        pixel_format(config),
        caption_column=config.caption_column,
    )


def is_saved(folder: Path) -> bool:
    """Return True if `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote the folder."""
    return any((folder / name).is_file() for name in _SAVED_MARKERS)


def has_shards(folder: Path) -> bool:
    """Return True if a folder contains Parquet or Arrow files, at most two folders deep."""
    for path, names, files in os.walk(folder, followlinks=True):
        is_deepest = len(Path(path).relative_to(folder).parts) == _MAX_DEPTH
        names[:] = [] if is_deepest else [name for name in names if not name.startswith(".")]
        if any(name.lower().endswith(SUFFIXES) and not name.startswith(".") for name in files):
            return True
    return False


def find_shards(root: Path) -> dict[str, list[Path]]:
    """Return the files of each split, by its name.

    The split of a file is the first word of its name, as in `train-00000-of-00004.parquet`, or the
    name of its folder, as in `train/0000.parquet`.

    Raises:
        ValueError: If only some files have a split, or a split has files in several folders.
    """
    if root.is_file():
        stem = root.name.split("-")[0].split(".")[0]
        siblings = sorted(path for path in root.parent.iterdir() if path.suffix == root.suffix)
        is_shard = "-of-" in root.name
        if split_of(stem) != "train" or is_shard:
            return {WHOLE: [root]}
        held_out = {path.stem: [path] for path in siblings if split_of(path.stem) in _HELD_OUT}
        return {stem: [root]} | held_out
    splits: dict[str, list[Path]] = {}
    for path in _walk(root):
        splits.setdefault(_split_of_path(path, root), []).append(path)
    if WHOLE in splits and len(splits) > 1:
        names = [str(path.relative_to(root)) for path in splits[WHOLE]]
        raise ValueError(
            f"data.root: {root} has the splits {', '.join(filter(None, splits))}, and other files "
            f"without a split ({abbreviate(names)}); move them, or give one file as data.root"
        )
    for split, paths in splits.items():
        folders = sorted({str(path.parent.relative_to(root)) for path in paths})
        if len(folders) > 1:
            raise ValueError(
                f"data.root: {root} has files of the split {split or 'train'} in several folders "
                f"({abbreviate(folders)}), as data sets with several configurations do; give one "
                f"of them, as in data.root={root / folders[0]}"
            )
    return splits


def _walk(folder: Path) -> list[Path]:
    """Return the Parquet or Arrow files below a folder, at most two folders deep, sorted."""
    paths = [
        path
        for pattern in ("*", "*/*", "*/*/*")
        for path in folder.glob(pattern)
        if path.suffix.lower() in SUFFIXES and path.is_file()
    ]
    visible = (
        path
        for path in paths
        if not any(name.startswith(".") for name in path.relative_to(folder).parts)
    )
    return sorted(visible)


def _split_of_path(path: Path, root: Path) -> str:
    """Return the split that a file or its folder is named after, or `WHOLE`."""
    word = path.name.replace("_", "-").split("-")[0].split(".")[0]
    folders = reversed(path.relative_to(root).parts[:-1])
    return next((name for name in (word, *folders) if split_of(name)), WHOLE)


def _load_saved(root: Path) -> dict[str, Any]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(root))
    except Exception as error:  # the library raises many kinds of errors for damaged files
        raise ValueError(f"data.root: {root} cannot be loaded ({error}); save it again") from error
    return dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {WHOLE: loaded}


def load_shards(paths: Sequence[Path], cache_dir: Path) -> Any:
    """Return the rows of all files. Parquet is unpacked to Arrow once, in the cache folder."""
    import datasets

    try:
        if all(path.suffix.lower() == ".arrow" for path in paths):
            tables = [datasets.Dataset.from_file(str(path)) for path in paths]
            return datasets.concatenate_datasets(tables) if len(tables) > 1 else tables[0]
        return datasets.load_dataset(
            "parquet",
            data_files=[os.path.abspath(path) for path in paths],
            split="train",  # the library's name for files without a split
            cache_dir=str(cache_dir / "datasets"),
        )
    except Exception as error:  # the library and pyarrow raise many kinds of errors
        cause = error.__cause__ or error
        files = abbreviate([str(path) for path in paths], num_shown=2)
        raise ValueError(f"data.root: {files} cannot be read ({cause}); copy it again") from error


def require_datasets(what: str) -> None:
    """Raise ValueError unless the library that reads Parquet and Arrow is installed."""
    optional_packages.require(f"data.root: {what}", "datasets", "data")
