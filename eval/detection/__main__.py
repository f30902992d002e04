"""`python -m ssl_pretrain.eval.detection RUN`: the command."""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssl_pretrain import rng
from ssl_pretrain.distributed import process_group
from ssl_pretrain.eval import command_line, results, runs
from ssl_pretrain.eval.detection import annotations as images
from ssl_pretrain.eval.detection import detectors, detectron2, metrics, training
from ssl_pretrain.eval.detection.annotations import Images
from ssl_pretrain.eval.detection.training import PROTOCOLS, Protocol
from ssl_pretrain.eval.results import Row
from ssl_pretrain.eval.runs import Run
from ssl_pretrain.models import backbones
from ssl_pretrain.schema import COUNT, FROM_ZERO

HELP = f"""Detection, or instance segmentation, by torchvision's Faster and Mask R-CNN on a run's backbone, trained further.

Average precision in percent from the pretrained backbone and from a random one, mean and deviation over seeds. The protocols:
{", ".join(PROTOCOLS)} (MoCo's, and one for CPUs); each of their values has an option. The numbers and the protocol are
printed and kept in RUN/eval/detection.json.

    python -m ssl_pretrain.eval.detection runs/bccd --voc bccd_voc.zip --protocol small --seeds 0 1 2
    torchrun --nproc-per-node 8 -m ssl_pretrain.eval.detection runs/moco --voc VOC2007 VOC2012 --test-voc VOC2007 --protocol voc_c4
    torchrun --nproc-per-node 8 -m ssl_pretrain.eval.detection runs/moco --coco train.json val.json --folders train2017 val2017 --protocol coco_fpn_1x
    python -m ssl_pretrain.eval.detection runs/moco --export-detectron2 moco.pkl     # for Detectron2's own training"""


def parser() -> argparse.ArgumentParser:
    made = command_line.parser("ssl_pretrain.eval.detection", HELP, {})
    made.add_argument(
        "--voc",
        nargs="+",
        default=[],
        metavar="ROOT",
        help="folders or zips in Pascal VOC's layout, trained on together",
    )
    made.add_argument("--test-voc", metavar="ROOT", help="tested on (default: the first of --voc)")
    made.add_argument(
        "--splits",
        nargs=2,
        default=["trainval", "test"],
        metavar=("TRAIN", "TEST"),
        help="lists of ImageSets/Main",
    )
    made.add_argument(
        "--coco", nargs=2, default=[], metavar=("TRAIN", "TEST"), help="annotations in COCO's JSON"
    )
    made.add_argument(
        "--folders",
        nargs=2,
        default=["", ""],
        metavar=("TRAIN", "TEST"),
        help="of the images of --coco",
    )
    made.add_argument(
        "--classes",
        nargs="+",
        default=[],
        metavar="NAME",
        help="in the order of their labels (default: those found, sorted)",
    )
    made.add_argument("--protocol", choices=list(PROTOCOLS), default="small")
    made.add_argument(
        "--init",
        nargs="+",
        choices=["random", "pretrained"],
        default=["random", "pretrained"],
        help="backbones compared",
    )
    made.add_argument("--seeds", nargs="+", type=FROM_ZERO, default=[0])
    made.add_argument(
        "--subset",
        type=FROM_ZERO,
        default=0,
        metavar="N",
        help="train and test on the first N training images: to see it overfit",
    )
    made.add_argument(
        "--export-detectron2",
        type=Path,
        metavar="FILE.pkl",
        help="write the backbone for Detectron2 and train nothing",
    )
    for setting in (
        "steps",
        "warmup_steps",
        "batch",
        "lr",
        "metric",
        "norm",
        "precise_batches",
        "max_side",
    ):
        kind = next(
            type(getattr(PROTOCOLS["small"], field.name))
            for field in fields(Protocol)
            if field.name == setting
        )
        made.add_argument(
            f"--{setting.replace('_', '-')}",
            type=kind,
            help=f"of the protocol (small: {getattr(PROTOCOLS['small'], setting)})",
        )
    made.add_argument(
        "--short-sides",
        nargs="+",
        type=COUNT,
        metavar="PIXELS",
        help="of the protocol; in evaluation the last",
    )
    return made


def main(arguments: list[str]) -> None:
    options = parser().parse_intermixed_args(arguments)
    device = process_group.start()
    try:
        run = runs.load_run(
            options.run,
            options.checkpoint,
            options.overrides,
            options.device if options.device != "auto" else str(device),
        )
        model: Any = run.backbone
        detectors.check(model.model, run.config.backbone.name)
        if options.export_detectron2:
            count = detectron2.export(model.model, options.export_detectron2)
            normalization = detectron2.pixels(run.config.views.mean, run.config.views.std)
            config = f"In its config:\nINPUT.FORMAT RGB\n{normalization}"
            print(
                f"{options.export_detectron2}: {count} arrays, a pickle as Detectron2 reads it. {config}"
            )
            return
        train, test = data(options)
        result = evaluate(run, train, test, protocol_of(options), options.init, options.seeds)
        if process_group.is_main():
            print(
                f"\n{results.text(result)}\n\n{result['seconds']:.0f} s; kept in {run.path / 'eval/detection.json'}"
            )
    finally:
        process_group.stop()


def protocol_of(options: argparse.Namespace) -> Protocol:
    given = {field.name: getattr(options, field.name, None) for field in fields(Protocol)}
    changed: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in given.items()
        if value is not None
    }
    return replace(PROTOCOLS[options.protocol], **changed)


def data(options: argparse.Namespace) -> tuple[Images, Images]:
    """(training, test) images. Raises ValueError where none are given, or they do not fit each other."""
    if bool(options.voc) == bool(options.coco):
        raise ValueError(
            "give the images: --voc ROOT [ROOT ...], or --coco TRAIN.json TEST.json with --folders TRAIN TEST"
        )
    if options.coco:
        train = images.coco(options.coco[0], options.folders[0], options.classes)
        test = images.coco(options.coco[1], options.folders[1], train.classes)
    else:
        first = images.voc(options.voc[0], options.splits[0], options.classes)
        train = images.joined(
            [
                first,
                *(images.voc(root, options.splits[0], first.classes) for root in options.voc[1:]),
            ]
        )
        test = images.voc(options.test_voc or options.voc[0], options.splits[1], train.classes)
    if options.subset:
        train = train.for_training().take(range(options.subset))
        return train, train
    return train, test


def evaluate(
    run: Run, train: Images, test: Images, protocol: Protocol, inits: list[str], seeds: list[int]
) -> dict[str, Any]:
    """Average precision of detectors trained from each backbone with each seed; see HELP. Kept in RUN/eval/detection.json.

    Raises:
        ValueError: masks are asked for and the annotations have none, or what `training.train` and the metric raise.
    """
    began = time.monotonic()
    if protocol.masks and not all(each.segments or not len(each) for each in train.objects):
        raise ValueError(
            f"{train.where}: has boxes without segmentation, which masks are learned from; take a protocol without masks"
        )
    rows = []
    for init in inits:
        found, losses = [], []
        for seed in seeds:
            results.print_progress(f"{init} backbone, seed {seed}: {len(train)} training images")
            numbers, curve = one(run, train, test, protocol, init, seed)
            results.print_progress(
                f"{init} backbone, seed {seed}: "
                + ", ".join(f"{name} {value:.1f}" for name, value in numbers.items())
            )
            found.append(numbers)
            losses.append(curve)
        mean = {name: float(np.mean([numbers[name] for numbers in found])) for name in found[0]}
        spread = (
            {name: float(np.std([numbers[name] for numbers in found], ddof=1)) for name in mean}
            if len(seeds) > 1
            else {}
        )
        ends = f"loss {np.mean([c[:20] for c in losses]):.2f} in the first 20 steps, {np.mean([c[-20:] for c in losses]):.2f} in the last"
        rows.append(Row(init, mean, spread, {"AP": ends}))
    return results.save(
        run.path,
        "detection",
        described(run, train, test, protocol, seeds),
        rows,
        run.about(),
        time.monotonic() - began,
        "AP, %",
    )


def one(
    run: Run, train: Images, test: Images, protocol: Protocol, init: str, seed: int
) -> tuple[dict[str, float], list[float]]:
    """(average precision, loss of every step) of one detector."""
    torch.manual_seed(
        rng.seed_of(seed, 0, 0)
    )  # of the detector's own layers, the same for both backbones
    model: Any = copy.deepcopy(run.backbone)
    if init == "random":
        model = backbones.build(replace(run.config.backbone, init="random"), run.view_size)
        torch.manual_seed(rng.seed_of(seed, 0, 0))
    views = run.config.views
    detector = detectors.build(
        model.model, len(train.classes), protocol.architecture, masks=protocol.masks, mean=views.mean, std=views.std,
        short_sides=protocol.short_sides, max_side=protocol.max_side, smallest_anchor=protocol.smallest_anchor,
        pyramid_channels=protocol.pyramid_channels, head_dim=protocol.head_dim, convolutions=protocol.convolutions,
        proposals=protocol.proposals, regions=protocol.regions,
    ).to(run.device)  # fmt: skip
    detector = detectors.with_norm(
        detector, protocol.norm, protocol.batch // process_group.world_size()
    )
    losses = training.train(
        detector, train, protocol, seed, run.device, run.config.data.num_workers
    )
    found, sizes = training.answers(detector, test, run.device)
    return metrics.average_precision(
        protocol.metric, test.objects, found, test.classes, sizes
    ), losses


def described(
    run: Run, train: Images, test: Images, protocol: Protocol, seeds: list[int]
) -> dict[str, Any]:
    kind = "Mask R-CNN" if protocol.masks else "Faster R-CNN"
    drops = " and ".join(str(round(drop * protocol.steps)) for drop in protocol.drops)
    sides = (
        f"{protocol.short_sides[0]} to {protocol.short_sides[-1]}"
        if len(protocol.short_sides) > 1
        else str(protocol.short_sides[0])
    )
    return {
        "network": f"{run.network} of {run.checkpoint_path.name}, {run.config.backbone.name}, trained further; random: drawn by the seed",
        "detector": f"torchvision's {kind}, {protocol.architecture.upper()}, batch norm: {protocol.norm}, recalibrated on "
        f"{protocol.precise_batches} batches; its regions are cut without Detectron2's half-pixel offset",
        "training": f"{protocol.steps} steps of {protocol.batch} images, SGD, learning rate {protocol.lr:g}, a tenth from steps {drops}, "
        f"warm-up {protocol.warmup_steps}, short side {sides} pixels, flips",
        "images": f"{train.where}: {len(train)} training; {test.where}: {len(test)} test; classes: {', '.join(train.classes)}",
        "metric": f"{protocol.metric}; AP: mean over overlaps 0.5 to 0.95; boxes marked difficult or crowd are not counted",
        "seeds": f"{', '.join(map(str, seeds))}; ± is the deviation over them"
        if len(seeds) > 1
        else str(seeds[0]),
    }


if __name__ == "__main__":
    command_line.execute(main, "ssl_pretrain.eval.detection")
