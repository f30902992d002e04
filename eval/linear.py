"""Linear classifiers on a run's frozen features."""

import argparse
from typing import Any

from ssl_pretrain.eval import command_line
from ssl_pretrain.eval.frozen import (
    cached_linear,
    features,
    named_features,
    published,
    published_linear,
)
from ssl_pretrain.eval.protocols import LINEAR_PROTOCOLS, LinearOptions
from ssl_pretrain.eval.runs import Run
from ssl_pretrain.schema import NON_NEGATIVE_FLOAT, POSITIVE_FLOAT, POSITIVE_INT

HELP = f"""Accuracy of linear classifiers on frozen features, raw pixels and a random backbone.

--protocol cached, the default: each image is embedded once.
{cached_linear.NUM_SETTINGS} classifiers, one per learning rate and weight decay, are trained
together on nine tenths of the training images. The setting that is best on the last tenth is then
trained on all training images and tested once. For few labels see --labels-per-class.

--protocol {" | ".join(LINEAR_PROTOCOLS)}:
the published protocols. Random crops and flips of the training images are embedded anew in every
epoch. Learning rates around the published one are trained in the same pass. The table shows the
accuracy of the published setting and of the setting selected on held-out training images.

The result is printed and saved to RUN/eval/linear.json or RUN/eval/linear_PROTOCOL.json. The
accuracy of every setting is saved next to it, in a file that ends in _grid.json.

    python -m ssl_pretrain.eval.linear runs/demo
    # also with 1 and with 5 labels per class
    python -m ssl_pretrain.eval.linear runs/demo --labels-per-class 1 5
    python -m ssl_pretrain.eval.linear runs/demo --protocol simclr --epochs 10
    torchrun --nproc-per-node 8 -m ssl_pretrain.eval.linear runs/imagenet --protocol moco
    # select on the test images, which is DINO's convention
    python -m ssl_pretrain.eval.linear runs/imagenet --protocol dino --select test
    # evaluate on images that have moved since training
    python -m ssl_pretrain.eval.linear runs/demo data.root=/new/place"""


OPTIONS: dict[str, dict[str, Any]] = {
    "--protocol": {
        "choices": ["cached", *LINEAR_PROTOCOLS],
        "default": "cached",
        "help": "protocol, described above (default: cached)",
    },
    "--epochs": {
        "type": POSITIVE_INT,
        "help": "passes over the images (default: 50 for cached, else the published number)",
    },
    "--rows": {
        "nargs": "+",
        "choices": features.ROWS,
        "help": "features to evaluate (default: all for cached, else pretrained)",
    },
    "--labels-per-class": {
        "type": POSITIVE_INT,
        "nargs": "*",
        "default": [],
        "metavar": "N",
        "help": "cached: also fit logistic regressions to N labels per class (10 draws)",
    },
    "--lrs": {
        "type": POSITIVE_FLOAT,
        "nargs": "+",
        "metavar": "LR",
        "help": (
            "published protocols: learning rates to try, for a batch size of 256"
            " (default: the published one times 0.1, 0.3, 1, 3 and 10)"
        ),
    },
    "--weight-decays": {
        "type": NON_NEGATIVE_FLOAT,
        "nargs": "+",
        "metavar": "WD",
        "help": "published protocols: weight decays to try (default: the published one and 0)",
    },
    "--batch-size": {
        "type": POSITIVE_INT,
        "help": "published protocols: images per step on all ranks (default: the published number)",
    },
    "--feature": {
        **named_features.OPTION["--feature"],
        "default": None,
        "help": (
            "pooled, or of the tokens: prefix (class token and registers), patch_mean, cls_mean"
            " (class token and mean patch) or last<n> (class tokens of the last n layers)"
            " (default: that of the protocol, pooled for cached)"
        ),
    },
    "--select": {
        "choices": published.SELECTIONS,
        "default": "held-out",
        "help": (
            "published protocols: select on held-out training images (default), train on all images"
            " without selecting, or select on the test images (DINO's convention)"
        ),
    },
}


def main(arguments: list[str]) -> None:
    """Run the command-line interface."""
    command_line.evaluate_and_print(
        command_line.build_parser("ssl_pretrain.eval.linear", HELP, OPTIONS), arguments, _evaluate
    )


def _evaluate(run: Run, options: argparse.Namespace) -> dict[str, Any]:
    arguments = {"rows": options.rows} if options.rows else {}  # each protocol has its default
    if options.protocol == "cached":
        _refuse_options(options, "lrs", "weight_decays", "batch_size")
        if options.select != "held-out":
            raise ValueError(
                f"--select {options.select}: --protocol cached selects on held-out training images;"
                " leave it out or give a published --protocol"
            )
        return cached_linear.evaluate(
            run,
            options.epochs or 50,
            options.labels_per_class,
            feature=options.feature or named_features.POOLED,
            **arguments,
        )
    _refuse_options(options, "labels_per_class")
    linear_options = LinearOptions(
        protocol_name=options.protocol,
        lrs=options.lrs,
        weight_decays=options.weight_decays,
        epochs=options.epochs,
        batch_size=options.batch_size,
        feature=options.feature,
        selection=options.select,
    )
    return published_linear.evaluate(run, linear_options, **arguments)


def _refuse_options(options: argparse.Namespace, *names: str) -> None:
    """Raise ValueError if one of these options was given, which the protocol does not take."""
    for name in names:
        if getattr(options, name):
            remedy = (
                "a published --protocol" if options.protocol == "cached" else "--protocol cached"
            )
            raise ValueError(
                f"--{name.replace('_', '-')}: --protocol {options.protocol} does not take it; leave"
                f" it out or give {remedy}"
            )


if __name__ == "__main__":
    command_line.execute(main, "ssl_pretrain.eval.linear")
