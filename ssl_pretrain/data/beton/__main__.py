"""FFCV files: `python -m ssl_pretrain.data.beton write | check | info`."""

import argparse
import os
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ssl_pretrain.data import progress_report
from ssl_pretrain.data.beton import file as beton_file
from ssl_pretrain.data.beton import writer as beton_writer
from ssl_pretrain.data.beton.file import Samples
from ssl_pretrain.data.beton.writer import Settings
from ssl_pretrain.data.native import decode
from ssl_pretrain.data.sources import DataConfig, check_range, open_source
from ssl_pretrain.schema import COUNT, FROM_ZERO, QUALITY, THREADS

_SHOWN = 100  # problems

_EPILOG = """\
examples:
  python -m ssl_pretrain.data.beton write /data/imagenet /fast/imagenet/train.beton
  python -m ssl_pretrain.data.beton write /data/imagenet /fast/imagenet/val.beton --part val
  python -m ssl_pretrain.data.beton write /data/imagenet /fast/imagenet/train.beton --max-side 400 --workers 16
  python -m ssl_pretrain.data.beton check /fast/imagenet/train.beton
  sbatch --array=0-15 --wrap "python -m ssl_pretrain.data.beton write /data/imagenet /fast/imagenet/train.beton --shards 16"
then train with data.root=/fast/imagenet. Stopped, the same write goes on where it was.
Exit status: 0; 1 if an image is bad; 2 if nothing can be read or written."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ssl_pretrain.data.beton",
        description="Writes a data set into FFCV's file format, which is read faster than single files; checks and describes such a file.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write", help="any source -> a .beton")
    writing.add_argument(
        "root",
        help="a folder, a .zip, a list of files, or another .beton; '' for digits and to download CIFAR-10",
    )
    writing.add_argument(
        "path",
        type=Path,
        help="the .beton to write; name it train.beton or val.beton, and data.root is its folder",
    )
    writing.add_argument(
        "--source", default="folder", help="digits, cifar10 or folder (default: folder)"
    )
    writing.add_argument(
        "--part", choices=("train", "val"), default="train", help="(default: train)"
    )
    writing.add_argument(
        "--range",
        type=float,
        nargs=2,
        default=[],
        metavar=("LOW", "HIGH"),
        help="data.range: the values that become 0 and 255",
    )
    writing.add_argument(
        "--max-side",
        type=FROM_ZERO,
        default=Settings.max_side,
        help="larger images are made so; 0: none is (default: %(default)s)",
    )
    writing.add_argument(
        "--quality",
        type=QUALITY,
        default=Settings.quality,
        help="of the JPEGs that are made (default: %(default)s)",
    )
    writing.add_argument(
        "--page-size",
        type=COUNT,
        default=Settings.page_size,
        help="bytes, a power of two (default: %(default)s)",
    )
    writing.add_argument(
        "--workers",
        type=THREADS,
        default=len(os.sched_getaffinity(0)),
        help="processes (default: %(default)s, the cores here)",
    )
    writing.add_argument(
        "--shards", type=COUNT, default=1, help="write so many files, read as one (default: 1)"
    )
    writing.add_argument(
        "--shard",
        type=FROM_ZERO,
        help="only this one, from 0; default: SLURM_ARRAY_TASK_ID, else all",
    )
    for name, text in (
        ("check", "decodes every image of a .beton"),
        ("info", "what a .beton holds"),
    ):
        reading = commands.add_parser(name, help=text)
        reading.add_argument("path", type=Path, help="a .beton; of a set of shards, any")
        if name == "check":
            reading.add_argument(
                "--threads",
                type=THREADS,
                default=len(os.sched_getaffinity(0)),
                help="(default: %(default)s, the cores here)",
            )
    given = parser.parse_args(arguments)
    try:
        return {"write": _write, "check": _check, "info": _info}[given.command](given)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 2
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _write(given: argparse.Namespace) -> int:
    if (
        not 1 <= given.quality <= 100
        or given.max_side < 0
        or given.page_size < 1 << 21
        or given.page_size & (given.page_size - 1)
    ):
        raise ValueError(
            "--quality is 1 to 100, --max-side at least 0, --page-size a power of two of at least 2,097,152 (FFCV's own least)"
        )
    decode.library()  # or a message, before hours of work
    source = open_source(
        DataConfig(source=given.source, root=given.root, range=list(given.range)), given.part
    )
    check_range(source)
    settings = Settings(given.max_side, given.quality, given.page_size)
    num_bad = 0
    for path, first, end in _outputs(given, len(source)):
        began = time.monotonic()
        manifest = beton_writer.write(source, path, settings, given.workers, first, end)
        print(
            f"{path}: {_counts(manifest)}; {path.stat().st_size / 1e6:,.1f} MB, {time.monotonic() - began:.1f} s"
        )
        print(
            *(f"  bad, left out: {line}" for line in manifest["bad"]),
            sep="\n",
            end="\n" if manifest["bad"] else "",
        )
        num_bad += len(manifest["bad"])
    return 1 if num_bad else 0


def _outputs(given: argparse.Namespace, n: int) -> Iterator[tuple[Path, int, int]]:
    """(file, first image, end) of the file, or of the shards to write here."""
    if given.path.suffix != ".beton":
        raise ValueError(f"{given.path}: name the file .beton")
    if given.shards == 1:
        yield given.path, 0, n
        return
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    if given.shard is None and task is not None:
        given.shard = int(task) - int(os.environ.get("SLURM_ARRAY_TASK_MIN", "0"))
    if not (1 <= given.shards <= n and (given.shard is None or 0 <= given.shard < given.shards)):
        raise ValueError(
            f"--shards {given.shards}, --shard {given.shard}: give 1 to {n:,} shards, and a shard from 0 to their number less one"
        )
    for number in range(given.shards) if given.shard is None else [given.shard]:
        path = given.path.with_name(beton_file.shard_name(given.path.stem, number, given.shards))
        yield path, number * n // given.shards, (number + 1) * n // given.shards


def _counts(manifest: dict[str, Any]) -> str:
    made = f"{manifest['encoded']:,} encoded at quality {manifest['quality']}"
    if manifest["max_side"]:
        made += f" (larger than {manifest['max_side']} pixels, turned, or no plain JPEG)"
    return (
        f"{manifest['num_samples']:,} images: {manifest['kept']:,} kept as they were, {made}, {manifest['raw']:,} stored as pixels, "
        f"{len(manifest['bad']):,} bad"
    )


def _check(given: argparse.Namespace) -> int:
    samples = beton_file.read(given.path)
    bad = problems(samples, given.threads)
    print(
        *bad[:_SHOWN],
        *([f"... {len(bad) - _SHOWN:,} more"] if len(bad) > _SHOWN else []),
        sep="\n",
        end="\n" if bad else "",
    )
    print(f"{given.path}: {len(samples):,} images, {len(bad):,} problems")
    return 1 if bad else 0


def problems(samples: Samples, num_threads: int = 1) -> list[str]:
    """Everything wrong with the stored images, found by decoding each of them and comparing their checksums with the manifest's."""
    local = threading.local()
    handles = [os.open(path, os.O_RDONLY) for path in samples.paths]
    stored = decode.Stored(
        np.array(handles, np.int32),
        samples.file,
        samples.place,
        samples.length,
        samples.mode,
        samples.height,
        samples.width,
    )
    functions, decoders = decode.functions(decode.library()), []

    def examine(index: int) -> tuple[int, int]:
        if not hasattr(local, "decoder"):
            local.decoder, local.scratch = decode.Decoder(), decode.scratch_for(samples, [])
            decoders.append(local.decoder)
        became = decode.decode(functions, stored, index, local.decoder.handle, local.scratch)
        return int(became), zlib.crc32(local.scratch.compressed[: samples.length[index]])

    reasons = decode.REASONS | {
        decode.CUT: "the file ends before the image does, or cannot be read"
    }
    try:
        with ThreadPoolExecutor(max(1, num_threads)) as pool:
            results = list(
                progress_report.report(
                    pool.map(examine, range(len(samples))), len(samples), "checked"
                )
            )
    finally:
        for decoder in decoders:
            decoder.close()
        for handle in handles:
            os.close(handle)
    found = [
        f"{samples.name(index)}: {reasons[became]}"
        for index, (became, _) in enumerate(results)
        if became != decode.DONE
    ]
    crcs = np.array([crc for _, crc in results], np.uint32)
    for number, path in enumerate(samples.paths):
        manifest = beton_file.manifest_of(Path(path))
        if not manifest:
            found.append(
                f"{path}: has no manifest ({beton_file.manifest_path(Path(path)).name}): no class names, and nothing to compare with"
            )
        elif zlib.crc32(crcs[samples.file == number].tobytes()) != manifest["crc32"]:
            found.append(
                f"{path}: its bytes are not those that were written (the manifest's crc32 differs)"
            )
    return found


def _info(given: argparse.Namespace) -> int:
    samples = beton_file.read(given.path)
    manifest = samples.manifest
    sizes = np.maximum(samples.height, samples.width)
    total = sum(Path(path).stat().st_size for path in samples.paths)
    labelled = Counter(samples.label.tolist())
    mean = total / len(samples) / 1e3
    print(
        f"{given.path}: {len(samples):,} images in {len(samples.paths)} file(s), {total / 1e6:,.1f} MB, {mean:,.1f} KB an image"
    )
    print(
        f"longer side: min {sizes.min()}, median {int(np.median(sizes))}, max {sizes.max()} pixels; raw: {int((samples.mode == 1).sum()):,}"
    )
    print(
        f"classes: {len(manifest.get('classes', []))}, images without a label: {labelled.get(-1, 0):,}"
    )
    if manifest:
        print(_counts(manifest))
        print(f"fingerprint: {manifest['fingerprint']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
