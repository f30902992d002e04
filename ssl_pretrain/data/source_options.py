"""Options of the commands that read a data set: its kind, and its columns."""

import argparse
from typing import Any

from ssl_pretrain.data.config import NAMED_SOURCES, DataConfig

ROOT_HELP = (
    "a folder, a .zip, a .beton, a list of files (.csv, .txt), arrays or tables (.npy, .npz, IDX, "
    ".parquet, .arrow), or tar shards, also in a store"
)


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """Add --source and the options of columns, as in `data.source` and so on."""
    *names, last = NAMED_SOURCES
    parser.add_argument(
        "--source",
        default=DataConfig.source,
        help=f"{', '.join(names)} or {last}, as in data.source (default: %(default)s)",
    )
    parser.add_argument(
        "--image-column",
        default="",
        metavar="NAME",
        help="the column or array with the images (default: found by type and name)",
    )
    parser.add_argument(
        "--label-column",
        default="",
        metavar="NAME",
        help="the column or array with the labels, or 'none' (default: found by type and name)",
    )
    parser.add_argument(
        "--caption-column",
        default="",
        metavar="NAME",
        help="the column with the captions, or 'none' (default: found by name)",
    )


def data_config(args: argparse.Namespace, **others: Any) -> DataConfig:
    """Return the configuration that the options and the argument `root` describe.

    Args:
        args: Parsed arguments of a parser with these options.
        others: Other keys of the section `data`.
    """
    return DataConfig(
        source=args.source,
        root=args.root,
        image_column=args.image_column,
        label_column=args.label_column,
        caption_column=args.caption_column,
        **others,
    )
