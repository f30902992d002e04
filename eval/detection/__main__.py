"""Train a detector on a run's backbone: `python -m ssl_pretrain.eval.detection RUN`."""

import argparse
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ssl_pretrain.data.config import pixel_format
from ssl_pretrain.distributed import process_group
from ssl_pretrain.eval import command_line, runs
from ssl_pretrain.eval.detection import backbone_comparison, detectors, detectron2, metrics
from ssl_pretrain.eval.detection.annotation_files import load_coco, load_voc
from ssl_pretrain.eval.detection.annotations import AnnotatedImages, concatenate
from ssl_pretrain.eval.detection.published_protocols import PROTOCOLS, Protocol
from ssl_pretrain.schema import NON_NEGATIVE_INT, POSITIVE_INT

HELP = f"""\
Train torchvision's Faster or Mask R-CNN on a run's backbone, for detection or segmentation.

The backbone is fine-tuned with the detector. The result is the average precision in percent with
the pretrained backbone and with a random one, as mean and standard deviation over seeds. The
protocols are {", ".join(PROTOCOLS)}.
They are MoCo's, plus a small one for CPUs. Options override single values of a protocol. The result
and the protocol are printed and saved to RUN/eval/detection.json.

    python -m ssl_pretrain.eval.detection runs/bccd --voc bccd_voc.zip --seeds 0 1 2
    torchrun --nproc-per-node 8 -m ssl_pretrain.eval.detection runs/moco --protocol voc_c4 \\
        --voc VOC2007 VOC2012 --test-voc VOC2007
    torchrun --nproc-per-node 8 -m ssl_pretrain.eval.detection runs/moco --protocol coco_fpn_1x \\
        --coco train.json val.json --folders train2017 val2017

To train with Detectron2 instead, export the backbone:

    python -m ssl_pretrain.eval.detection runs/moco --export-detectron2 moco.pkl"""
TRAIN_TEST = ("TRAIN", "TEST")
INITS = ["random", "pretrained"]
OPTIONS: dict[str, dict[str, Any]] = {
    "--voc": {
        "nargs": "+",
        "default": [],
        "metavar": "ROOT",
        "help": "one or more folders or zips in Pascal VOC's layout, combined for training",
    },
    "--test-voc": {
        "metavar": "ROOT",
        "help": "folder or zip to test on (default: the first of --voc)",
    },
    "--splits": {
        "nargs": 2,
        "default": ["trainval", "test"],
        "metavar": TRAIN_TEST,
        "help": "image lists in ImageSets/Main (default: trainval test)",
    },
    "--coco": {
        "nargs": 2,
        "default": [],
        "metavar": TRAIN_TEST,
        "help": "annotation files in COCO's JSON format",
    },
    "--folders": {
        "nargs": 2,
        "default": ["", ""],
        "metavar": TRAIN_TEST,
        "help": "folders with the images of --coco",
    },
    "--classes": {
        "nargs": "+",
        "default": [],
        "metavar": "NAME",
        "help": "class names in label order (default: all annotated classes, sorted)",
    },
    "--protocol": {
        "choices": list(PROTOCOLS),
        "default": "small",
        "help": "protocol to start from; other options override its values (default: small)",
    },
    "--init": {
        "nargs": "+",
        "choices": INITS,
        "default": INITS,
        "help": "backbones to compare (default: both)",
    },
    "--seeds": {
        "nargs": "+",
        "type": NON_NEGATIVE_INT,
        "default": [0],
        "help": "train one detector per seed and backbone (default: 0)",
    },
    "--subset": {
        "type": NON_NEGATIVE_INT,
        "default": 0,
        "metavar": "N",
        "help": "train and test on the first N training images, as a check that training works",
    },
    "--export-detectron2": {
        "type": Path,
        "metavar": "FILE.pkl",
        "help": "write the backbone for Detectron2 without training",
    },
    "--short-sides": {
        "nargs": "+",
        "type": POSITIVE_INT,
        "metavar": "PIXELS",
        "help": "short sides that training images are resized to; test images use the last one",
    },
}
PROTOCOL_OPTIONS = {  # option: (field of Protocol that it overrides, help)
    "--steps": ("num_steps", "optimizer steps"),
    "--warmup-steps": ("warmup_steps", "steps of linear learning rate warm-up"),
    "--batch": ("global_batch_size", "images per step over all ranks"),
    "--lr": ("lr", "learning rate after warm-up"),
    "--metric": ("metric", "definition of average precision: voc07, voc12 or coco"),
    "--norm": (
        "norm",
        "batch norm statistics in training: of all ranks (sync), of each rank (batch), or frozen",
    ),
    "--precise-batches": (
        "num_precise_bn_batches",
        "batches that recompute the batch norm statistics for testing; 0 uses running averages",
    ),
    "--max-side": ("max_side", "longest side of an image in pixels"),
}


def build_parser() -> argparse.ArgumentParser:
    """Build the parser, with an option for each entry of `PROTOCOL_OPTIONS`."""
    small, options = PROTOCOLS["small"], dict(OPTIONS)
    for option, (field, description) in PROTOCOL_OPTIONS.items():
        default = getattr(small, field)
        options[option] = {
            "dest": field,
            "metavar": option.removeprefix("--").replace("-", "_").upper(),
            "type": type(default),
            "help": f"{description} (small: {default})",
        }
    return command_line.build_parser("ssl_pretrain.eval.detection", HELP, options)


def main(arguments: list[str]) -> None:
    """Train and test the detectors, or export the backbone for Detectron2."""
    options = build_parser().parse_intermixed_args(arguments)
    rank_device = process_group.start()
    try:
        device = str(rank_device) if options.device == "auto" else options.device
        run = runs.load_run(options.run, options.checkpoint, options.overrides, device)
        model: Any = run.backbone
        detectors.check_backbone(model.model, run.config.backbone.name)
        if options.export_detectron2:
            detectron2.check_channels(run.config.data.channels)
            num_arrays = detectron2.export(model.model, options.export_detectron2)
            print(
                f"{options.export_detectron2}: wrote {num_arrays} arrays for Detectron2. "
                "Add these lines to its config:\nINPUT.FORMAT RGB\n"
                f"{detectron2.pixel_config(run.config.views.mean, run.config.views.std)}"
            )
            return
        protocol = choose_protocol(options)
        metrics.require_packages(protocol.metric, protocol.predicts_masks)
        train, test = (
            images.read_as(pixel_format(run.config.data)) for images in load_images(options)
        )
        result = backbone_comparison.compare(
            run, train, test, protocol, options.init, options.seeds
        )
        if process_group.is_main():
            command_line.print_result(result, run, is_verbose=options.verbose)
    finally:
        process_group.stop()


def choose_protocol(options: argparse.Namespace) -> Protocol:
    """Return the chosen protocol with the values that the options override."""
    values = {field.name: getattr(options, field.name, None) for field in fields(Protocol)}
    changes: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in values.items()
        if value is not None
    }
    return replace(PROTOCOLS[options.protocol], **changes)


def load_images(options: argparse.Namespace) -> tuple[AnnotatedImages, AnnotatedImages]:
    """Load the training and test images.

    Raises:
        ValueError: Unless exactly one of --voc and --coco is given, or if the training and test
            images have different classes.
    """
    if bool(options.voc) == bool(options.coco):
        raise ValueError(
            "--voc, --coco: exactly one of them is required; give the images as --voc ROOT "
            "[ROOT ...] or as --coco TRAIN.json TEST.json with --folders TRAIN TEST"
        )
    if options.coco:
        train = load_coco(options.coco[0], options.folders[0], options.classes)
        test = load_coco(options.coco[1], options.folders[1], train.classes)
    else:
        train_split, test_split = options.splits
        train = load_voc(options.voc[0], train_split, options.classes)
        other_data_sets = [load_voc(root, train_split, train.classes) for root in options.voc[1:]]
        train = concatenate([train, *other_data_sets])
        test = load_voc(options.test_voc or options.voc[0], test_split, train.classes)
    if options.subset:
        train = train.trainable_subset().subset(range(options.subset))
        return train, train
    return train, test


if __name__ == "__main__":
    command_line.execute(main, "ssl_pretrain.eval.detection")
