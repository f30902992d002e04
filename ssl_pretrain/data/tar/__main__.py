"""Write tar shards, or make the indexes of existing ones.

The commands are `python -m ssl_pretrain.data.tar write` and `index`.
"""

import argparse
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

from ssl_pretrain.data.file_dataset import SplitName
from ssl_pretrain.data.image_source import NoSuchSplit, Source
from ssl_pretrain.data.messages import printable
from ssl_pretrain.data.pixels import WrongChannels
from ssl_pretrain.data.source_options import ROOT_HELP, add_source_options, data_config
from ssl_pretrain.data.source_report import describe_counts
from ssl_pretrain.data.sources import DataConfig, open_source
from ssl_pretrain.data.tar.tar_source import TarShards
from ssl_pretrain.data.tar.tar_writer import ShardSize, write_shards
from ssl_pretrain.schema import POSITIVE_INT
from ssl_pretrain.schema.argument_parser import ArgumentParser
from ssl_pretrain.system import program

_DEFAULT_BYTES = 10**9
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}

_EPILOG = """\
examples:
  {command} write /data/imagenet /fast/shards
  {command} write /data/imagenet /fast/shards --split val
  {command} write train.beton shards --images-per-shard 1000
  {command} index 's3://bucket/imagenet-train-{{000000..000146}}.tar' --cache-dir /scratch/cache

Then train with data.root=/fast/shards. To continue an interrupted write, repeat the command.
The exit status is 1 if an image is unreadable, and 2 if nothing can be read or written."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    args = _parser().parse_args(arguments)
    try:
        return {"write": _write, "index": _index}[args.command](args)
    except KeyboardInterrupt:
        print("stopped; run the same command again to continue", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    command = program.usage_name("python -m ssl_pretrain.data.tar")
    parser = ArgumentParser(
        prog=command,
        description="Write the images of a data set to tar shards in WebDataset's layout, or make "
        "the indexes of existing shards.",
        epilog=_EPILOG.format(command=command),
    )
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser("write", help="write a data set to tar shards")
    index = commands.add_parser("index", help="make the indexes of shards before a run")
    write.add_argument(
        "root",
        help=f"{ROOT_HELP}; '' for --source digits, or to download CIFAR-10",
    )
    write.add_argument("folder", type=Path, help="folder of the shards")
    add_source_options(write)
    write.add_argument(
        "--split",
        choices=("train", "val"),
        default="train",
        help="split to write (default: %(default)s)",
    )
    size = write.add_mutually_exclusive_group()
    size.add_argument(
        "--shard-size",
        type=parse_size,
        default=_DEFAULT_BYTES,
        metavar="BYTES",
        help="largest size of a shard, such as 500MB (default: 1GB)",
    )
    size.add_argument("--images-per-shard", type=POSITIVE_INT, help="images per shard")
    index.add_argument("root", help="a folder, a .tar or a pattern, also by URL")
    index.add_argument("--train", default="", help="the training shards, as in data.train")
    index.add_argument("--val", default="", help="the validation shards, as in data.val")
    index.add_argument("--cache-dir", default="", help="as in data.cache_dir")
    return parser


def parse_size(text: str) -> int:
    """Return a number of bytes from a text such as "1GB" or "500M".

    Raises:
        argparse.ArgumentTypeError: If it is not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip().upper())
    if match is None or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; give one such as 1GB or 500MB")
    return int(float(match[1]) * _UNITS[match[2]])


def _write(args: argparse.Namespace) -> int:
    source = _open_source(data_config(args), args.split)
    limits = ShardSize(num_bytes=args.shard_size)
    if args.images_per_shard:
        limits = ShardSize(num_images=args.images_per_shard)
    start_time = time.monotonic()
    num_shards = num_images = num_bytes = num_unreadable = 0
    for shard in write_shards(source, args.folder, args.split, limits):
        num_shards, num_images = num_shards + 1, num_images + shard.num_images
        num_bytes += shard.path.stat().st_size
        num_unreadable += len(shard.unreadable)
        for line in shard.unreadable:
            print(f"  unreadable, left out: {printable(line)}")
    seconds = time.monotonic() - start_time
    print(
        f"{args.folder}: {num_images:,} {args.split} images in {num_shards:,} shards, "
        f"{num_bytes / 1e6:,.1f} MB, {seconds:.1f} s; {num_unreadable:,} unreadable"
    )
    return 1 if num_unreadable else 0


def _open_source(config: DataConfig, split: SplitName) -> Source:
    """Open a split in the number of channels that its images have."""
    try:
        return open_source(config, split)
    except WrongChannels as error:  # an array, whose shape is known
        return open_source(replace(config, channels=error.found), split)


def _index(args: argparse.Namespace) -> int:
    config = DataConfig(root=args.root, train=args.train, val=args.val, cache_dir=args.cache_dir)
    start_time = time.monotonic()
    for split in ("train", "val"):
        try:
            source = open_source(config, split)
        except NoSuchSplit:
            continue
        if not isinstance(source, TarShards):
            raise ValueError(f"{args.root} does not consist of tar shards, so it needs no index")
        seconds = time.monotonic() - start_time
        print(
            f"{split}: {describe_counts(source)}, in {len(source.shards):,} shards, {seconds:.1f} s"
        )
        for note in source.notes:
            print(f"  {printable(note)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
