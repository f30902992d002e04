"""Write, check and describe .beton files.

The commands are `python -m ssl_pretrain.data.beton write`, `check` and `info`.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ssl_pretrain.data.beton import beton_file, beton_writer
from ssl_pretrain.data.beton.beton_manifest import Manifest
from ssl_pretrain.data.beton.check import find_problems
from ssl_pretrain.data.beton.encoder import EncodingSettings
from ssl_pretrain.data.beton.tables import RAW
from ssl_pretrain.data.pixels import WrongChannels
from ssl_pretrain.data.source_options import ROOT_HELP, add_source_options, data_config
from ssl_pretrain.data.source_report import check_images
from ssl_pretrain.data.sources import open_source
from ssl_pretrain.schema import JPEG_QUALITY, NON_NEGATIVE_INT, NUM_THREADS, POSITIVE_INT
from ssl_pretrain.schema.argument_parser import ArgumentParser
from ssl_pretrain.system import program
from ssl_pretrain.system.platform_support import available_cores

_MAX_PROBLEMS = 100  # the most problems that `check` prints
_MIN_PAGE_BYTES = 1 << 21  # FFCV's minimum

_EPILOG = """\
examples:
  python -m ssl_pretrain.data.beton write /data/imagenet /fast/imagenet/train.beton
  python -m ssl_pretrain.data.beton write /data/imagenet /fast/imagenet/val.beton --split val
  python -m ssl_pretrain.data.beton write /data/photos photos.beton --max-side 400 --workers 16
  python -m ssl_pretrain.data.beton check /fast/imagenet/train.beton
  sbatch --array=0-15 --wrap "python -m ssl_pretrain.data.beton write IMAGES FILE --shards 16"

Then train with data.root=/fast/imagenet. To continue an interrupted write, repeat the command.
The exit status is 1 if an image is unreadable, and 2 if nothing can be read or written."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    args = _parser().parse_args(arguments)
    try:
        return {"write": _write, "check": _check, "info": _info}[args.command](args)
    except KeyboardInterrupt:
        print("stopped; run the same command again to continue", file=sys.stderr)
        return 2
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog=program.usage_name("python -m ssl_pretrain.data.beton"),
        description="Convert a data set to FFCV's file format, which loads faster than one file "
        "per image. Check or describe such a file.",
        epilog=_EPILOG,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser("write", help="convert a data set to a .beton file")
    check = commands.add_parser("check", help="decode every image of a .beton file")
    info = commands.add_parser("info", help="describe a .beton file")
    num_cores = available_cores()

    write.add_argument(
        "root",
        help=f"{ROOT_HELP}; '' for --source digits, or to download CIFAR-10",
    )
    write.add_argument(
        "path",
        type=Path,
        help="the .beton file to write; if its name is train.beton or val.beton, data.root may be "
        "its folder",
    )
    add_source_options(write)
    write.add_argument(
        "--split",
        choices=("train", "val"),
        default="train",
        help="split to write (default: %(default)s)",
    )
    write.add_argument(
        "--range",
        type=float,
        nargs=2,
        default=[],
        metavar=("LOW", "HIGH"),
        help="values that become 0 and 255, as in data.range",
    )
    write.add_argument(
        "--max-side",
        type=NON_NEGATIVE_INT,
        default=EncodingSettings.max_side,
        help="longest side in pixels, or 0 to keep the size of every image (default: %(default)s)",
    )
    write.add_argument(
        "--quality",
        type=JPEG_QUALITY,
        default=EncodingSettings.quality,
        help="JPEG quality of encoded images (default: %(default)s)",
    )
    write.add_argument(
        "--page-size",
        type=POSITIVE_INT,
        default=EncodingSettings.page_size,
        help="bytes per page, a power of two (default: %(default)s)",
    )
    write.add_argument(
        "--workers",
        type=NUM_THREADS,
        default=num_cores,
        help="number of processes (default: one per available core)",
    )
    write.add_argument(
        "--shards",
        type=POSITIVE_INT,
        default=1,
        help="number of files to write, which are read as one data set (default: 1)",
    )
    write.add_argument(
        "--shard",
        type=NON_NEGATIVE_INT,
        help="write only this shard, counted from 0 (default: SLURM_ARRAY_TASK_ID, or all shards)",
    )
    for command in (check, info):
        command.add_argument("path", type=Path, help="a .beton file, or any shard of a set")
    check.add_argument(
        "--threads",
        type=NUM_THREADS,
        default=num_cores,
        help="number of decoding threads (default: one per available core)",
    )
    return parser


def _write(args: argparse.Namespace) -> int:
    if args.page_size < _MIN_PAGE_BYTES or args.page_size.bit_count() != 1:
        raise ValueError(
            f"--page-size {args.page_size}: give a power of two of at least {_MIN_PAGE_BYTES:,}, "
            "FFCV's minimum"
        )
    config = data_config(args, range=list(args.range))
    try:
        source = open_source(config, args.split)
        check_images(source)
    except WrongChannels as error:
        raise ValueError(
            f"{error.name} has {error.found} channels, and a .beton holds RGB; "
            "python -m ssl_pretrain.data.tar write keeps all channels in tar shards"
        ) from None
    settings = EncodingSettings(args.max_side, args.quality, args.page_size)
    num_unreadable = 0
    for path, start, end in _output_ranges(args, len(source)):
        start_time = time.monotonic()
        manifest = beton_writer.write(source, path, settings, args.workers, start, end)
        size, seconds = path.stat().st_size / 1e6, time.monotonic() - start_time
        print(f"{path}: {_describe_counts(manifest)}; {size:,.1f} MB, {seconds:.1f} s")
        for line in manifest.unreadable_images:
            print(f"  unreadable, left out: {line}")
        num_unreadable += len(manifest.unreadable_images)
    return 1 if num_unreadable else 0


def _output_ranges(args: argparse.Namespace, num_images: int) -> Iterator[tuple[Path, int, int]]:
    """Yield each file to write, with the index of its first image and the one after its last."""
    path, num_shards, shard = args.path, args.shards, args.shard
    if path.suffix != ".beton":
        raise ValueError(f"{path}: the file name must end in .beton")
    if num_shards == 1:
        yield path, 0, num_images
        return
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    if shard is None and task is not None:
        shard = int(task) - int(os.environ.get("SLURM_ARRAY_TASK_MIN", "0"))
    if num_shards > num_images or (shard is not None and not 0 <= shard < num_shards):
        raise ValueError(
            f"--shards {num_shards}, --shard {shard}: give 1 to {num_images:,} shards, and a shard "
            "from 0 to one less than their number"
        )
    for number in range(num_shards) if shard is None else [shard]:
        start, end = (k * num_images // num_shards for k in (number, number + 1))
        name = beton_file.shard_name(path.stem, number, num_shards)
        yield path.with_name(name), start, end


def _describe_counts(manifest: Manifest) -> str:
    encoded = f"{manifest.num_encoded:,} encoded at quality {manifest.quality}"
    if manifest.max_side:
        encoded += f" (larger than {manifest.max_side} pixels, rotated, or not a plain JPEG)"
    return (
        f"{manifest.num_samples:,} images: {manifest.num_unchanged:,} stored unchanged, "
        f"{encoded}, {manifest.num_raw:,} stored as pixels, "
        f"{len(manifest.unreadable_images):,} unreadable"
    )


def _check(args: argparse.Namespace) -> int:
    samples = beton_file.read(args.path)
    problems = find_problems(samples, args.threads)
    for problem in problems[:_MAX_PROBLEMS]:
        print(problem)
    if len(problems) > _MAX_PROBLEMS:
        print(f"... {len(problems) - _MAX_PROBLEMS:,} more")
    print(f"{args.path}: {len(samples):,} images, {len(problems):,} problems")
    return 1 if problems else 0


def _info(args: argparse.Namespace) -> int:
    samples = beton_file.read(args.path)
    sides = np.maximum(samples.height, samples.width)
    size = sum(Path(path).stat().st_size for path in samples.paths)
    num_raw, num_unlabeled = (samples.mode == RAW).sum(), (samples.label == -1).sum()
    num_classes = len(samples.manifest.classes) if samples.manifest else 0
    print(
        f"{args.path}: {len(samples):,} images in {len(samples.paths)} file(s), "
        f"{size / 1e6:,.1f} MB, {size / len(samples) / 1e3:,.1f} KB per image"
    )
    print(
        f"longer side: min {sides.min()}, median {int(np.median(sides))}, max {sides.max()} "
        f"pixels; raw: {num_raw:,}"
    )
    print(f"classes: {num_classes}, images without a label: {num_unlabeled:,}")
    if samples.manifest:
        print(_describe_counts(samples.manifest))
        print(f"fingerprint: {samples.manifest.fingerprint}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
