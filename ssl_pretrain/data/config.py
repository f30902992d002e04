"""Configuration of the images and of how they are read."""

import math
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypedDict

from ssl_pretrain.data.pixels import PixelFormat
from ssl_pretrain.schema import DIMENSIONLESS, setting

BUILT_IN_SOURCES = ("digits", "cifar10")  # can be named in place of a path
TEXT_SOURCES = ("texts", "wordnet")
MAX_TEXTS = 3  # a sentence, its positive and a hard negative
NAMED_SOURCES = (
    *("digits", "cifar10", "cifar100", "stl10", "folder", "huggingface"),
    *TEXT_SOURCES,
)


@dataclass
class DataConfig:
    """Configuration of the images and of how they are read."""

    source: (
        Literal[
            "digits", "cifar10", "cifar100", "stl10", "folder", "huggingface", "texts", "wordnet"
        ]
        | str
    ) = setting(
        "folder",
        "Kind of data set. digits: the digits of scikit-learn, without a download. cifar10, "
        "cifar100, stl10: the published archives. folder: what root names, which is recognized "
        "by its files. huggingface: root is a path or a name of the Hugging Face Hub. "
        "texts: sentences or pairs of sentences without images. wordnet: the definitions and "
        "examples of WordNet. package.module:function: a function that returns the images of "
        "'train' or 'val'.",
    )
    args: dict[str, Any] = setting(
        {}, "Arguments of the function that source names, or of datasets.load_dataset."
    )
    root: str = setting(
        "",
        "Path of the data: images in a folder or .zip, a list of files, a .beton, tar shards "
        "(train-{000..146}.tar or s3://bucket/shards), or arrays and tables (.npy, .npz, IDX, "
        ".parquet, .arrow). For texts, a file (.txt, .csv, .tsv, .jsonl, .parquet) or a folder of "
        "them. For wordnet, the folder of its files, by default /usr/share/wordnet.",
        on_resume="free",
    )
    train: str = setting(
        "",
        "Training images: a folder, list, .zip, .beton or other file, absolute or relative to "
        "root, or the name of a split. A dot means root itself. If empty, the split is found by "
        "its name.",
        on_resume="free",
    )
    val: str = setting(
        "",
        "Validation images, given like train. The value none means that there are none. "
        "If empty, the split is found by its name.",
        on_resume="free",
    )
    image_column: str = setting(
        "",
        "Column of a table, or array of an .npz, that contains the images. If empty, it is found "
        "by its type and name.",
        on_resume="free",
    )
    label_column: str = setting(
        "",
        "Column or array that contains the labels. The value none means that there are none. "
        "If empty, it is found by its type and name.",
        on_resume="free",
    )
    caption_column: str = setting(
        "",
        "Column of a table, or of a Hugging Face data set, that contains the captions. The value "
        "none means that there are none. If empty, it is found by its name.",
        on_resume="free",
    )
    text_columns: list[str] = setting(
        [],
        "Columns of the source texts: one for sentences, two for pairs, three for pairs with a "
        "hard negative. If empty, they are found by their usual names, such as sent0, sent1 and "
        "hard_neg. For wordnet, one to three of example, definition, words and entry, by default "
        "example and definition.",
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
        "with FFCV's decoder. folder: in worker processes. auto: threads for a .beton and tar "
        "shards, else folder. The run prints its choice and the reason.",
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
        "Values [low, high] of images of more than 8 bits that become 0 and 255, for all channels "
        "or for each one in turn. If empty, they are 0 and 65535.",
        minimum=-1e12,
        maximum=1e12,
        unit="pixel values",
    )
    channels: int = setting(
        3,
        "Channels of every image. 1 converts color to gray, 3 repeats gray. For any other number, "
        "the files must have that many.",
        minimum=1,
        maximum=32,
        unit="channels",
    )
    cache_dir: str = setting(
        "",
        "Folder for cached lists of files, indexes and shards. If empty, it is "
        "~/.cache/ssl_pretrain.",
        on_resume="free",
    )
    remote_cache_gb: float = setting(
        0.0,
        "Space in cache_dir for whole copies of remote shards. 0 keeps none, and every image is "
        "requested by its range.",
        on_resume="free",
        minimum=0,
        unit="GB (10^9 bytes)",
    )


class Location(TypedDict, total=False):
    """The settings that say where images are."""

    source: str
    root: str


def locate(data: str | Path) -> Location:
    """Return the settings `source` and `root` of images at a path, or of a built-in data set."""
    if str(data) in BUILT_IN_SOURCES and not Path(data).exists():
        return {"source": str(data)}
    return {"source": "folder", "root": str(data)}


def short_name(source: str, root: str) -> str:
    """Return a short name of the images with these settings: that of the path, or the source."""
    return Path(root).name if root and source in ("", "folder", "texts") else source


def pixel_format(config: DataConfig) -> PixelFormat:
    """Return the number of channels, and the range of the values that become 0 and 255."""
    return PixelFormat(config.channels, tuple(map(float, config.range)) or None)


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
    if config.args and ":" not in config.source and config.source != "huggingface":
        raise ValueError(
            f"data.args: {config.source} takes no arguments; leave it out, or set data.source to "
            "huggingface or package.module:function"
        )
    if config.source == "huggingface" and not config.root:
        raise ValueError(
            "data.root: no data set is named; give a name of the Hub, as in "
            "data.root=uoft-cs/cifar10, or a path"
        )
    _check_text_settings(config)
    if not 0 <= config.max_replaced <= 1:
        raise ValueError(
            f"data.max_replaced: {config.max_replaced} must be a share between 0 and 1, such as "
            "0.01"
        )
    values = config.range
    is_finite = all(isinstance(value, int | float) and math.isfinite(value) for value in values)
    is_ordered = is_finite and all(low < high for low, high in zip(values[::2], values[1::2]))
    if values and (len(values) not in (2, 2 * config.channels) or not is_ordered):
        per_channel = f", or two per channel ({2 * config.channels})" if config.channels > 1 else ""
        raise ValueError(
            f"data.range: {list(values)} must be two numbers, the lower one first, such as "
            f"[0, 4095]{per_channel}"
        )


def _check_text_settings(config: DataConfig) -> None:
    """Raise ValueError for settings of texts without texts, and for those of images with texts."""
    has_texts = config.source in TEXT_SOURCES
    if config.text_columns and not has_texts:
        raise ValueError(
            f"data.text_columns: {config.source} has no texts; leave it out, or set data.source to "
            "texts or wordnet"
        )
    if len(config.text_columns) > MAX_TEXTS:
        raise ValueError(
            f"data.text_columns: {config.text_columns} are {len(config.text_columns)} columns; "
            "give one for sentences, two for pairs, or three for pairs with a hard negative"
        )
    if config.image_column and has_texts:
        raise ValueError(
            f"data.image_column: {config.source} has no images; leave it out, or name the columns "
            "of the texts in data.text_columns"
        )
