"""Open a split of a file or folder of texts.

    source: texts     root: wiki1m_for_simcse.txt    one sentence per line
                      root: nli_for_simcse.csv       columns of texts, also .tsv, .jsonl, .parquet
                      root: /data/texts              train.tsv and dev.tsv, or with data.train

The validation texts are a file that `data.val` names, relative to the folder, or in a folder the
file that is named after a validation split.
"""

from pathlib import Path

from ssl_pretrain.data.config import DataConfig
from ssl_pretrain.data.file_dataset import SplitName
from ssl_pretrain.data.formats import table_files
from ssl_pretrain.data.image_source import NoSuchSplit, Source
from ssl_pretrain.data.messages import abbreviate
from ssl_pretrain.data.split_search import split_of
from ssl_pretrain.data.texts.text_formats import SUFFIXES, find_text_format
from ssl_pretrain.data.texts.text_source import TextFile, TextsInFiles
from ssl_pretrain.data.texts.text_tables import open_text_table

_ALL_SUFFIXES = (*SUFFIXES, *table_files.SUFFIXES)
_REMEDY = f"give a file of texts ({', '.join(_ALL_SUFFIXES)}) or a folder with train.txt"


def open_texts(config: DataConfig, split: SplitName, cache_dir: Path) -> Source:
    """Open the texts of a split.

    Raises:
        NoSuchSplit: If there are no validation texts.
        ValueError: If the file is absent, of another kind or damaged.
    """
    path = _find_file(config, split)
    if path.suffix.lower() not in _ALL_SUFFIXES:
        raise ValueError(f"data.root: {path} is a file of an unsupported kind; {_REMEDY}")
    if path.suffix.lower() in table_files.SUFFIXES:
        return open_text_table(path, config, cache_dir)
    text_format, has_header, note = find_text_format(path, config)
    source = TextsInFiles(str(path), [TextFile(path, text_format, has_header)])
    source.notes = [*([note] if note else []), *source.notes]
    return source


def _find_file(config: DataConfig, split: SplitName) -> Path:
    """Return the existing file of a split."""
    name = config.train if split == "train" else config.val
    root = Path(config.root).expanduser()
    if split == "val" and name == "none":
        raise NoSuchSplit("data.val: there are no validation texts, because data.val is none")
    if not config.root and not (name and Path(name).expanduser().is_absolute()):
        raise ValueError(f"data.root: no path is set; {_REMEDY}")
    if not name and root.is_dir():
        return _find_in_folder(root, split)
    if not name and split == "val":
        raise NoSuchSplit(
            f"data.val: {root} is a single file; name the validation texts, as in data.val=dev.tsv"
        )
    path = (root if root.is_dir() else root.parent) / Path(name).expanduser() if name else root
    if not path.is_file():
        key = split if name else "root"
        raise ValueError(f"data.{key}: {path} does not exist; {_REMEDY}")
    return path


def _find_in_folder(root: Path, split: SplitName) -> Path:
    """Return the file of a folder that is named after a split. Its only file is for training."""
    files = sorted(path for path in root.iterdir() if path.suffix.lower() in _ALL_SUFFIXES)
    for kind in ["train"] if split == "train" else ["val", "test"]:
        matches = [path for path in files if split_of(path.stem) == kind]
        if len(matches) > 1:
            raise ValueError(
                f"data.{split}: {root} contains {abbreviate([path.name for path in matches])}; "
                f"choose one, as in data.{split}={matches[0].name}"
            )
        if matches:
            return matches[0]
    if split == "val":
        raise NoSuchSplit(
            f"data.val: {root} has no file named after a split for validation, such as dev.tsv; "
            "name one in data.val"
        )
    if len(files) != 1:
        contents = abbreviate([path.name for path in files]) or "no file of texts"
        raise ValueError(
            f"data.train: {root} contains {contents}; name the training texts, as in "
            "data.train=train.txt"
        )
    return files[0]
