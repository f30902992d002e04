"""Semantic segmentation with a run's backbone, frozen or fine-tuned."""

import argparse
from dataclasses import fields
from typing import Any

from ssl_pretrain.eval import command_line
from ssl_pretrain.eval.dense import backbone_rows
from ssl_pretrain.eval.dense.backbone_rows import INITS, SegmentationOptions
from ssl_pretrain.eval.dense.mask_sources import MaskSources
from ssl_pretrain.eval.dense.segmentation_protocols import (
    PATCH_PROTOCOLS,
    PROTOCOLS,
    TRAINING_PROTOCOLS,
)
from ssl_pretrain.eval.runs import Run
from ssl_pretrain.schema import NON_NEGATIVE_INT, POSITIVE_FLOAT, POSITIVE_INT

HELP = f"""Mean intersection over union (mIoU) of semantic segmentation, in percent.

The table compares the pretrained backbone with a random one, as mean and standard deviation over
seeds. It has the mIoU, the pixel accuracy and the IoU of each class.

--protocol {" | ".join(PATCH_PROTOCOLS)}:
the patch tokens of the frozen backbone are computed once and classified. linear, the default, fits
logistic regressions. knn lets the nearest patches vote. The capi protocols are the published form.

--protocol {" | ".join(TRAINING_PROTOCOLS)}:
a head is trained on random crops: on the frozen backbone (dinov2_linear), or together with it.
torchvision_fcn, torchvision_deeplabv3 and moco_fcn are published. finetune is small, for CPUs.

The data are Pascal VOC or ADE20K in their own layouts, or a folder of images and a folder of masks.
The result is printed and saved to RUN/eval/segmentation_PROTOCOL.json.

    python -m ssl_pretrain.eval.segmentation runs/dino --voc VOCdevkit/VOC2012
    python -m ssl_pretrain.eval.segmentation runs/dino --protocol capi_knn \\
        --ade20k ADEChallengeData2016
    python -m ssl_pretrain.eval.segmentation runs/cells --protocol finetune --seeds 0 1 2 \\
        --images photos --masks masks --classes background cell
    torchrun --nproc-per-node 8 -m ssl_pretrain.eval.segmentation runs/moco --protocol moco_fcn \\
        --voc VOCdevkit/VOC2012 --voc-splits trainaug val --voc-masks SegmentationClassAug"""

SOURCE_SETTINGS = [field.name for field in fields(MaskSources)]
SETTINGS = [*(field.name for field in fields(SegmentationOptions)), *SOURCE_SETTINGS]
TRAIN_TEST = ("TRAIN", "TEST")
DATA_OPTIONS: dict[str, dict[str, Any]] = {
    "--voc": {"metavar": "ROOT", "help": "folder or zip in Pascal VOC's layout"},
    "--voc-splits": {
        "nargs": 2,
        "default": ["train", "val"],
        "metavar": TRAIN_TEST,
        "help": "image lists in ImageSets/Segmentation (default: train val)",
    },
    "--voc-masks": {
        "default": "SegmentationClass",
        "metavar": "FOLDER",
        "help": "folder of the masks beside JPEGImages (default: SegmentationClass)",
    },
    "--ade20k": {"metavar": "ROOT", "help": "folder or zip in ADE20K's layout"},
    "--images": {
        "metavar": "FOLDER",
        "help": "folder or zip of images; with train/ and val/, or a fifth is for testing",
    },
    "--masks": {
        "metavar": "FOLDER",
        "help": "folder or zip with a mask of class numbers for each image, under the same path",
    },
    "--classes": {
        "nargs": "+",
        "default": [],
        "metavar": "NAME",
        "help": "class names, or a file with one name per line (default: VOC's, ADE20K's, or the "
        "numbers in the masks)",
    },
    "--void": {
        "nargs": "*",
        "type": NON_NEGATIVE_INT,
        "default": [255],
        "metavar": "VALUE",
        "help": "values in --masks of pixels that do not count (default: 255)",
    },
    "--first-label": {
        "type": NON_NEGATIVE_INT,
        "default": 0,
        "metavar": "VALUE",
        "help": "value in --masks of the first class (default: 0)",
    },
    "--subset": {
        "type": NON_NEGATIVE_INT,
        "default": 0,
        "metavar": "N",
        "help": "train and test on the first N training images, as a check that training works",
    },
}
PROTOCOL_OPTIONS: dict[str, dict[str, Any]] = {
    "--protocol": {
        "choices": PROTOCOLS,
        "default": "linear",
        "help": "protocol, described above (default: linear)",
    },
    "--init": {
        "nargs": "+",
        "dest": "inits",
        "choices": list(INITS),
        "default": list(INITS),
        "help": "backbones to compare (default: both)",
    },
    "--seeds": {
        "nargs": "+",
        "type": NON_NEGATIVE_INT,
        "default": [0],
        "help": "seeds of the random backbone, the new layers, the crops and the held-out images "
        "(default: 0)",
    },
    "--resolution": {
        "type": POSITIVE_INT,
        "metavar": "PIXELS",
        "help": "frozen patches: side of the square images (default: the protocol's)",
    },
    "--crop-size": {
        "type": POSITIVE_INT,
        "metavar": "PIXELS",
        "help": "training: side of the crops (default: the protocol's)",
    },
    "--steps": {"type": POSITIVE_INT, "help": "training: optimizer steps"},
    "--epochs": {"type": POSITIVE_INT, "help": "training: passes over the images, not --steps"},
    "--batch-size": {"type": POSITIVE_INT, "help": "training: images per step over all ranks"},
    "--lr": {"type": POSITIVE_FLOAT, "help": "training: learning rate"},
}


def main(arguments: list[str]) -> None:
    """Run the command-line interface."""
    parser = command_line.build_parser(
        "ssl_pretrain.eval.segmentation", HELP, DATA_OPTIONS | PROTOCOL_OPTIONS
    )
    command_line.evaluate_and_print(parser, arguments, _evaluate)


def _evaluate(run: Run, options: argparse.Namespace) -> dict[str, Any]:
    return evaluate(run, **{name: getattr(options, name) for name in SETTINGS})


def evaluate(run: Run, **settings: Any) -> dict[str, Any]:
    """Segment images with a run's backbone and with a random one, and save the scores.

    Args:
        run: Run to evaluate.
        settings: Fields of `SegmentationOptions` and of `MaskSources`.

    Returns:
        The content of the result file.

    Raises:
        ValueError: If the data or the settings do not fit.
    """
    sources = {name: value for name, value in settings.items() if name in SOURCE_SETTINGS}
    options = {name: value for name, value in settings.items() if name not in SOURCE_SETTINGS}
    chosen = SegmentationOptions(**options)
    chosen.adapt()  # refuses before the data are opened
    return backbone_rows.compare(run, MaskSources(**sources).open(run), chosen)


if __name__ == "__main__":
    command_line.execute(main, "ssl_pretrain.eval.segmentation")
