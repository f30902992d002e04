"""Describe a data set and suggest a configuration: `python -m ssl_pretrain.data.inspect /data/photos`."""

import argparse
import json
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from ssl_pretrain.data import progress_report
from ssl_pretrain.data.images import UnreadableImage
from ssl_pretrain.data.images import inspect as inspect_file
from ssl_pretrain.data.sources import (
    DataConfig,
    Files,
    Source,
    layout_lines,
    open_source,
    printable,
)
from ssl_pretrain.schema import FROM_ZERO, THREADS

_SAMPLE = 10_000
_SHOWN = 20  # lines of a long table
_SIZES = (16, 32, 64, 96, 128, 160, 224)

_EPILOG = """\
examples:
  python -m ssl_pretrain.data.inspect /data/imagenet            train/<class>/*, val/<class>/*
  python -m ssl_pretrain.data.inspect /data/photos              any tree of images, labels or not
  python -m ssl_pretrain.data.inspect photos.zip --sample 0     a zip, read in place; every image
  python -m ssl_pretrain.data.inspect train.csv                 a list of paths, with labels or without
  python -m ssl_pretrain.data.inspect /data/coco --train train2017 --val val2017
  python -m ssl_pretrain.data.inspect --source digits           the embedded data set

The configuration at the end is a start, not an optimum: each line says why. Save it as YAML and train with
  torchrun --nproc-per-node 8 -m ssl_pretrain.train my.yaml
Exit status: 0; 1 if an image that was read is bad; 2 if the data set cannot be opened."""


@dataclass
class Findings:
    """Measurements of the images that were read."""

    sizes: list[tuple[int, int]] = field(default_factory=list)  # (width, height) as stored
    modes: Counter[str] = field(default_factory=Counter)  # Pillow's names
    wide: list[tuple[float, float]] = field(
        default_factory=list
    )  # values in use, of each image wider than 8 bits
    frames: int = 0  # images of several frames, of which the first is read
    bad: list[str] = field(default_factory=list)  # file: reason
    mean: np.ndarray = field(
        default_factory=lambda: np.zeros(3)
    )  # of pixels in [0, 1], each image weighing the same
    std: np.ndarray = field(default_factory=lambda: np.ones(3))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ssl_pretrain.data.inspect",
        description="Counts classes, sizes, pixel formats and bad files of a data set, measures its colours, and suggests a configuration.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "root",
        nargs="?",
        default="",
        help="a folder, a .zip, a .beton or a list (.txt, .csv); none for the digits",
    )
    parser.add_argument(
        "--train",
        default="",
        help="where the training images are, in root or absolute; .: all of root (default: by name)",
    )
    parser.add_argument("--val", default="", help="the same for validation; none: there is none")
    parser.add_argument(
        "--source", default="folder", help="digits, cifar10 or folder (default: folder)"
    )
    parser.add_argument(
        "--sample",
        type=FROM_ZERO,
        default=_SAMPLE,
        help=f"images to read, evenly spaced; 0: all (default: {_SAMPLE})",
    )
    parser.add_argument(
        "--range",
        type=float,
        nargs=2,
        default=[],
        metavar=("LOW", "HIGH"),
        help="read 16-bit images by this data.range",
    )
    parser.add_argument(
        "--threads", type=THREADS, default=4, help="that read and decode (default: 4)"
    )
    parser.add_argument(
        "--all-classes", action="store_true", help=f"list every class, not only {_SHOWN} of them"
    )
    given = parser.parse_args(arguments)
    config = DataConfig(
        source=given.source,
        root=given.root,
        train=given.train,
        val=given.val,
        range=list(given.range),
    )
    try:
        source = open_source(config, "train")
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(*layout_lines(config, source), sep="\n")
    print(*_classes(source, given.all_classes), sep="\n")
    findings = examine(source, given.sample, given.threads)
    print(*_report(findings, len(source)), sep="\n")
    num_bad = len(findings.bad)
    if findings.wide and not config.range and isinstance(source, Files):
        source.values = _measured(
            findings
        )  # the mean and deviation of the suggestion are those by the range that it proposes
        print("\nmeasured again with the range that is proposed below")
        findings = examine(source, given.sample, given.threads)
    if findings.sizes:
        print("\n" + suggestion(config, source, findings))
    return 1 if num_bad else 0


def examine(source: Source, sample: int = 0, num_threads: int = 4) -> Findings:
    """Read `sample` images (0: all), evenly spaced in the source, and report progress on stderr."""
    chosen = np.arange(len(source))
    if 0 < sample < len(source):
        chosen = np.linspace(0, len(source) - 1, sample).astype(
            np.int64
        )  # evenly through the sorted list, so through the classes
    findings = Findings()
    total, total_of_squares = np.zeros(3), np.zeros(3)

    def read(index: int) -> tuple[str, int, int, np.ndarray, np.ndarray] | str:
        try:
            if isinstance(source, Files):
                found = inspect_file(source.content(index), source.name(index))
                stored = found[:3]
                findings.frames += found.frames > 1
                if found.low is not None and found.high is not None:
                    findings.wide.append((found.low, found.high))
            pixels = source.read(index)
            if not isinstance(source, Files):
                stored = ("RGB", pixels.shape[1], pixels.shape[0])
        except UnreadableImage as error:
            return str(error)
        values = pixels.reshape(-1, 3).astype(np.float32) / 255
        return (
            *stored,
            values.mean(0, dtype=np.float64),
            np.square(values).mean(0, dtype=np.float64),
        )

    with ThreadPoolExecutor(num_threads) as pool:
        for result in progress_report.report(pool.map(read, chosen.tolist()), len(chosen), "read"):
            if isinstance(result, str):
                findings.bad.append(result)
                continue
            mode, width, height, mean, mean_of_squares = result
            findings.modes[mode] += 1
            findings.sizes.append((width, height))
            total += mean
            total_of_squares += mean_of_squares
    if findings.sizes:
        findings.mean = total / len(findings.sizes)
        findings.std = np.sqrt(
            np.maximum(total_of_squares / len(findings.sizes) - findings.mean**2, 0)
        )
    return findings


def suggestion(config: DataConfig, source: Source, findings: Findings) -> str:
    """Return a YAML that `ssl_pretrain.config` loads: SimCLR, with a comment that says why for each choice."""
    n = len(source)
    side = int(np.median([min(size) for size in findings.sizes]))
    size = max([_SIZES[0], *(option for option in _SIZES if option <= 1.15 * side)])
    size_reason = f"the shorter sides have a median of {side} pixels"
    if size > side:
        size_reason += f"; with fewer than {_SIZES[0]} a backbone has nothing to stride over"
    small = size <= 64
    batch = min(n, 2 ** int(np.log2(max(n / 4, 1))), 512 if small else 1024)
    epochs = int(np.clip(round(40e6 / n, -2), 100, 800))
    if small:
        backbone, stem, stem_reason = (
            "resnet18",
            "small",
            "no stride at the entrance, which small images cannot afford",
        )
        base_lr, scaling, lr_reason = (
            "1.0",
            "linear",
            "SimCLR's for CIFAR-10, as its temperature, weight decay and colours",
        )
        temperature, weight_decay, strength, hue, blur = "0.5", "0.0001", "0.4", "0.1", "0.0"
    else:
        backbone, stem, stem_reason = "resnet50", "imagenet", "SimCLR's"
        base_lr, scaling, lr_reason = (
            "0.075",
            "sqrt",
            "SimCLR's for batches below 4,096, as its temperature, weight decay and colours",
        )
        temperature, weight_decay, strength, hue, blur = "0.1", "0.000001", "0.8", "0.2", "0.5"
    return f"""\
# a start: save as my.yaml
method:
  name: simclr
  temperature: {temperature}
backbone:
  name: {backbone}
  stem: {stem}    # {stem_reason}
data:
  source: {config.source}
  root: {json.dumps(config.root)}{_split_keys(config)}
{_range(config, findings)}  num_workers: {
        0 if config.source == "digits" else config.num_workers
    }    # processes of each rank{
        "; none: the images are tiny and in memory"
        if config.source == "digits"
        else "; as many as cores per GPU"
    }
views:
  mean: [{_three(findings.mean)}]    # measured on {
        len(findings.sizes):,} images; SimCLR itself feeds pixels in [0, 1]
  std: [{_three(findings.std)}]
  crops:
    global:
      size: {size}    # {size_reason}
      flip: 0.5    # 0 if left and right matter, as in digits and text
      jitter: 0.8
      brightness: {strength}
      contrast: {strength}
      saturation: {strength}
      hue: {hue}
      grayscale: 0.2    # 0 if colour alone tells images apart
      blur: {blur}
optim:
  name: lars
  base_lr: {base_lr}    # {lr_reason}
  lr_scaling: {scaling}
  weight_decay: {weight_decay}
global_batch_size: {batch}    # {
        n // batch
    } steps an epoch; its other images are what each one is told apart from
epochs: {epochs}    # {
        epochs
        * n:,} images seen; ImageNet's 100 epochs are 128,000,000, CIFAR-10's 800 are 40,000,000"""


def _split_keys(config: DataConfig) -> str:
    given = {"train": config.train, "val": config.val}
    return "".join(f"\n  {key}: {json.dumps(value)}" for key, value in given.items() if value)


def _range(config: DataConfig, findings: Findings) -> str:
    """The line of `data.range`, where images are wider than 8 bits."""
    if not findings.wide:
        return ""
    low, high = config.range or _measured(findings)
    return f"  range: [{low:g}, {high:g}]    # the values that become 0 and 255, without the thousandth at either end\n"


def _measured(findings: Findings) -> tuple[float, float]:
    """The range of values in use; one of a single value is widened, so that it is a range."""
    low, high = min(low for low, _ in findings.wide), max(high for _, high in findings.wide)
    return (low, high) if low < high else (low, low + 1)


def _values(findings: Findings) -> list[str]:
    """Lines on the values of images wider than 8 bits, and on what becomes of them."""
    if not findings.wide:
        return []
    low, high = _measured(findings)
    lines = [
        f"  values  {low:g} to {high:g} in {len(findings.wide):,} images wider than 8 bits (without the thousandth at either end)"
    ]
    if (high - low) / 257 < 64:
        lines.append(
            f"          without data.range, {max(1, round((high - low) / 257))} of 256 gray levels would be left of 16-bit images"
        )
    return lines


def _three(values: np.ndarray) -> str:
    return ", ".join(f"{value:.4f}" for value in values)


def _classes(source: Source, all_classes: bool) -> list[str]:
    if not source.classes:
        return []
    counts = np.bincount(source.labels[source.labels >= 0], minlength=len(source.classes))
    ordered = sorted(range(len(counts)), key=lambda label: (counts[label], label))
    lines = [
        f"  {counts[label]:>9,}  {printable(source.classes[label])}"
        for label in (range(len(counts)) if all_classes else ordered)
    ]
    if len(lines) > _SHOWN and not all_classes:
        lines = [
            *lines[: _SHOWN // 2],
            f"        ...  {len(lines) - _SHOWN:,} classes (--all-classes lists them)",
            *lines[-_SHOWN // 2 :],
        ]
    return [
        f"images per class: min {counts.min():,}, median {int(np.median(counts)):,}, max {counts.max():,}",
        *lines,
    ]


def _report(findings: Findings, n: int) -> list[str]:
    num_read = len(findings.sizes) + len(findings.bad)
    lines = [
        f"read {num_read:,} of {n:,} images"
        + (" (evenly spaced in the list; --sample 0 reads all)" if num_read < n else "")
    ]
    if findings.sizes:
        sizes = np.array(findings.sizes)
        for name, values in (("width", sizes[:, 0]), ("height", sizes[:, 1])):
            lines.append(
                f"  {name:<7} min {values.min():,}, median {int(np.median(values)):,}, max {values.max():,} pixels"
            )
        lines.append(
            "  modes   "
            + ", ".join(f"{mode} {count:,}" for mode, count in findings.modes.most_common())
        )
        for name, values in (("mean", findings.mean), ("std", findings.std)):
            lines.append(
                f"  {name:<7} {_three(values)} (red, green, blue, in [0, 1]; each image weighs the same)"
            )
    lines += _values(findings)
    if findings.frames:
        lines.append(
            f"  frames  {findings.frames:,} images have several frames, of which the first is read"
        )
    lines.append(f"  bad     {len(findings.bad):,}")
    return lines + [f"    {printable(message)}" for message in findings.bad]


if __name__ == "__main__":
    sys.exit(main())
