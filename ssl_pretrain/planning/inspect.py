"""Describe a data set and suggest a configuration.

python -m ssl_pretrain.planning.inspect /data/photos --write my.yaml
"""

import argparse
import shlex
import sys
from pathlib import Path

import numpy as np

from ssl_pretrain.data.config import DataConfig
from ssl_pretrain.data.image_source import Source
from ssl_pretrain.data.images import ImageHeader
from ssl_pretrain.data.messages import printable
from ssl_pretrain.data.source_options import ROOT_HELP, add_source_options, data_config
from ssl_pretrain.data.source_report import (
    ImageStatistics,
    check_channels,
    layout_lines,
    measure_images,
    open_with_own_channels,
    with_measured_range,
)
from ssl_pretrain.data.sources import open_source
from ssl_pretrain.planning.suggested_settings import Suggestion, describe_time
from ssl_pretrain.planning.suggestion import suggest
from ssl_pretrain.schema import NON_NEGATIVE_INT, NUM_CHANNELS, NUM_THREADS
from ssl_pretrain.schema.argument_parser import ArgumentParser
from ssl_pretrain.system import program

_SAMPLE_SIZE = 10_000
_MAX_CLASSES_SHOWN = 20
_MIN_GRAY_LEVELS = 64  # a note is printed if 16-bit images would keep fewer

_EPILOG = """\
examples:
  {command} /data/imagenet            train/<class>/*, val/<class>/*
  {command} /data/photos              images in any tree, labeled or not
  {command} photos.zip --sample 0     all images of a zip, read in place
  {command} train.csv                 a list of paths, labeled or not
  {command} pathmnist.npz             arrays of images and labels
  {command} /data/beans --label-column none       Parquet files, without their labels
  {command} /data/coco --train train2017 --val val2017
  {command} --source digits           the built-in data set
  {command} /data/photos --method dino --write my.yaml

The suggestion starts from the shipped recipe of the method. What depends on the images or on this
machine is adapted, with a reason on its line. On a CPU the training is to take a quarter of an
hour. Without --write, the description is printed as comments, so that the output is the YAML of a
run.
Exit status: 0 on success, 1 if an image cannot be read, 2 if the data set cannot be opened."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    args = _parser().parse_args(arguments)
    # A range per channel tells the number of channels.
    channels = args.channels or (len(args.range) // 2 if len(args.range) in range(4, 66, 2) else 0)
    config = data_config(
        args,
        train=args.train,
        val=args.val,
        range=list(args.range),
        channels=channels or DataConfig.channels,
    )
    try:
        if args.write is not None and args.write.exists() and not args.force:
            raise ValueError(
                f"--write: {args.write} exists; give another name, or --force to overwrite it"
            )
        if channels:
            source = open_source(config, "train")
            check_channels(source)
        else:
            config, source = open_with_own_channels(config)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    is_printed_as_yaml = args.write is None

    def describe(*lines: str) -> None:
        prefix = "# " if is_printed_as_yaml else ""
        print(*(f"{prefix}{line}" for line in lines), sep="\n", flush=True)

    describe(*layout_lines(config, source), *_class_lines(source, args.all_classes))
    if not source.has_images:
        describe(*_text_lines(source))
        return 0
    statistics = measure_images(source, args.sample, args.threads)
    describe(*_statistics_lines(statistics, len(source)))
    has_unreadable = bool(statistics.unreadable)
    ranged = with_measured_range(source, statistics)
    if ranged is not source:
        # The suggested mean and std must be measured with the suggested range.
        source = ranged
        describe("measured again with the range suggested below")
        statistics = measure_images(source, args.sample, args.threads)
        has_unreadable = bool(statistics.unreadable)
    try:
        suggestion = suggest(
            config, source, method=args.method, backbone=args.backbone, statistics=statistics
        )
    except ValueError as error:
        print(f"no configuration is suggested: {error}", file=sys.stderr)
        return int(has_unreadable) if is_printed_as_yaml else 2
    if is_printed_as_yaml:
        print(f"\n# a starting point; --write my.yaml writes it to a file\n{suggestion.to_yaml()}")
    else:
        _write_suggestion(suggestion, args.write)
    return 1 if has_unreadable else 0


def _write_suggestion(suggestion: Suggestion, path: Path) -> None:
    """Write the suggested configuration to a file, and print its time and the next command."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{suggestion.to_yaml()}\n", encoding="utf-8")
    print(f"\n{path}: a configuration with a reason on each line that was chosen")
    print(f"expected: {describe_time(suggestion.expected_seconds)} of training on this machine")
    print(f"next: {program.command('pretrain')} {shlex.quote(str(path))}")


def _parser() -> argparse.ArgumentParser:
    command = program.usage_name("python -m ssl_pretrain.planning.inspect")
    parser = ArgumentParser(
        prog=command,
        description="Count classes, sizes, pixel formats and bad files of a data set, measure its "
        "colors, and suggest a configuration.",
        epilog=_EPILOG.format(command=command),
    )
    parser.add_argument(
        "root",
        nargs="?",
        default="",
        help=f"{ROOT_HELP}; not needed for the digits",
    )
    parser.add_argument(
        "--train",
        default="",
        help="the training images: a path in root, an absolute path, or . for all of root"
        " (default: found by name)",
    )
    parser.add_argument(
        "--val",
        default="",
        help="the validation images, or 'none' (default: found by name)",
    )
    add_source_options(parser)
    parser.add_argument(
        "--sample",
        type=NON_NEGATIVE_INT,
        default=_SAMPLE_SIZE,
        help="images to read, evenly spaced; 0 reads all (default: %(default)s)",
    )
    parser.add_argument(
        "--range",
        type=float,
        nargs="+",
        default=[],
        metavar="VALUE",
        help="read images of more than 8 bits with this data.range: LOW HIGH, or two numbers "
        "for every channel in turn",
    )
    parser.add_argument(
        "--channels",
        type=NUM_CHANNELS,
        metavar="N",
        help="read images of N channels, from 1 to 32 (default: found in the files)",
    )
    parser.add_argument(
        "--threads",
        type=NUM_THREADS,
        default=4,
        help="threads that read and decode (default: %(default)s)",
    )
    parser.add_argument(
        "--all-classes",
        action="store_true",
        help=f"list every class, not only {_MAX_CLASSES_SHOWN}",
    )
    parser.add_argument(
        "--method",
        default="simclr",
        help="method of the suggested configuration (default: %(default)s)",
    )
    parser.add_argument(
        "--backbone", metavar="NAME", help="network of the suggestion (default: chosen)"
    )
    parser.add_argument(
        "--write", type=Path, metavar="YAML", help="write the suggested configuration to a file"
    )
    parser.add_argument("--force", action="store_true", help="overwrite the file of --write")
    return parser


def _text_lines(source: Source) -> list[str]:
    """Return lines with the first texts and the recipes that take them."""
    texts = " | ".join(alternatives[0] for alternatives in source.texts(0))
    return [
        f"first texts: {printable(texts)}",
        "the recipes simcse_wiki (texts) and simcse_nli (groups of 2 or 3 texts) take them",
    ]


def _class_lines(source: Source, all_classes: bool) -> list[str]:
    """Return lines with the images per class.

    The smallest class comes first, and the middle of a long list is left out. With `all_classes`,
    every class is listed in label order.
    """
    if not source.classes:
        return []
    counts = np.bincount(source.labels[source.labels >= 0], minlength=len(source.classes))
    order = np.arange(len(counts)) if all_classes else np.argsort(counts, kind="stable")
    lines = [f"  {counts[label]:>9,}  {printable(source.classes[label])}" for label in order]
    num_hidden = len(lines) - _MAX_CLASSES_SHOWN
    if num_hidden > 0 and not all_classes:
        half = _MAX_CLASSES_SHOWN // 2
        lines[half:-half] = [f"        ...  {num_hidden:,} classes (--all-classes lists them)"]
    return [f"images per class: {_min_median_max(counts)}", *lines]


def _min_median_max(values: np.ndarray) -> str:
    return f"min {values.min():,}, median {int(np.median(values)):,}, max {values.max():,}"


def _format_channels(values: np.ndarray) -> str:
    """Return one number per channel, separated by commas."""
    return ", ".join(f"{value:.4f}" for value in values)


def _statistics_lines(statistics: ImageStatistics, num_images: int) -> list[str]:
    """Return lines with the measurements and the unreadable images."""
    num_read = len(statistics.sizes) + len(statistics.unreadable)
    sample = " (evenly spaced in the list; --sample 0 reads all)" if num_read < num_images else ""
    lines = [f"read {num_read:,} of {num_images:,} images{sample}"]
    if statistics.sizes:
        widths, heights = np.array(statistics.sizes).T
        for name, sides in (("width", widths), ("height", heights)):
            lines.append(f"  {name:<7} {_min_median_max(sides)} pixels")
        modes = [f"{mode} {count:,}" for mode, count in statistics.modes.most_common()]
        lines.append(f"  modes   {', '.join(modes)}")
    lines += _channel_lines(statistics)
    if statistics.num_channels:
        names = "red, green, blue" if statistics.num_channels == 3 else "per channel"
        unit = f"({names}, in [0, 1]; each image has equal weight)"
        lines.append(f"  mean    {_format_channels(statistics.mean)} {unit}")
        lines.append(f"  std     {_format_channels(statistics.std)} {unit}")
    if statistics.ranges:
        limits = list(zip(statistics.value_range[::2], statistics.value_range[1::2]))
        per_channel = ", per channel" if len(limits) > 1 else ""
        lines.append(
            f"  values  {'; '.join(f'{low:g} to {high:g}' for low, high in limits)} in "
            f"{len(statistics.ranges):,} images wider than 8 bits (excluding the lowest and "
            f"highest 0.1 %{per_channel})"
        )
        if statistics.num_channels and statistics.num_gray_levels < _MIN_GRAY_LEVELS:
            lines.append(
                "          without data.range, 16-bit images would keep only "
                f"{statistics.num_gray_levels} of 256 gray levels"
            )
    if statistics.num_animated:
        lines.append(
            f"  frames  {statistics.num_animated:,} images have several frames; only the first is "
            "read"
        )
    lines.append(f"  bad     {len(statistics.unreadable):,}")
    return lines + [f"    {printable(message)}" for message in statistics.unreadable]


def _channel_lines(statistics: ImageStatistics) -> list[str]:
    """Return a line with the channels of the views, and one per other number in the files."""
    wanted, lines = statistics.num_channels, []
    total = sum(statistics.stored_channels.values())
    for (num_channels, has_alpha), count in statistics.stored_channels.most_common():
        header = ImageHeader("", 0, 0, 1, None, num_channels, has_alpha)
        if header.num_stored == wanted:
            continue
        if not header.can_become(wanted):
            consequence = f"which cannot become {wanted}, so they are unreadable"
        elif has_alpha:
            consequence = "the last one alpha, which is composited on black"
        elif num_channels == 1:
            consequence = "gray, which is repeated"
        else:
            consequence = "color, which becomes gray"
        lines.append(
            f"          {count:,} of {total:,} images have {header.num_stored} "
            f"channel{'s' if header.num_stored > 1 else ''}, {consequence}"
        )
    return [f"  channels {wanted}", *lines] if total else []


if __name__ == "__main__":
    sys.exit(main())
