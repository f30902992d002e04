"""Linear classifiers on a run's frozen features."""

import argparse
from typing import Any

from ssl_pretrain.eval import command_line
from ssl_pretrain.eval.frozen import cached_linear, features, published_linear
from ssl_pretrain.eval.protocols import LINEAR, LinearOptions
from ssl_pretrain.eval.runs import Run
from ssl_pretrain.schema import COUNT, NOT_NEGATIVE, POSITIVE

HELP = f"""Accuracy of linear classifiers on frozen features, raw pixels and a random backbone.

--protocol cached, the default: each image is embedded once.
{cached_linear.NUM_SETTINGS} classifiers, one per learning rate and weight decay, are trained
together on nine tenths of the training images. The setting that is best on the last tenth is
trained on all training images and tested once. For few labels see --labels-per-class.

--protocol {" | ".join(LINEAR)}:
the published protocols, on random crops and flips of the training images, which are embedded in
every epoch. Learning rates around the published one are trained in the same pass. The table has the
accuracy of the published setting and of the one selected on held-out training images.

The result is printed and saved to RUN/eval/linear.json or RUN/eval/linear_PROTOCOL.json. A file
..._grid.json beside it has the accuracy of every setting.

    python -m ssl_pretrain.eval.linear runs/demo
    # also with 1 and with 5 labels per class
    python -m ssl_pretrain.eval.linear runs/demo --labels-per-class 1 5
    python -m ssl_pretrain.eval.linear runs/demo --protocol simclr --epochs 10
    torchrun --nproc-per-node 8 -m ssl_pretrain.eval.linear runs/imagenet --protocol moco
    # DINO's convention: selected on the test images
    python -m ssl_pretrain.eval.linear runs/imagenet --protocol dino --select test
    # the images have moved
    python -m ssl_pretrain.eval.linear runs/demo data.root=/new/place"""


OPTIONS: dict[str, dict[str, Any]] = {
    "--protocol": {
        "choices": ["cached", *LINEAR],
        "default": "cached",
        "help": "see above (default: cached)",
    },
    "--epochs": {
        "type": COUNT,
        "help": "passes over the images (default: 50, or the protocol's)",
    },
    "--rows": {
        "nargs": "+",
        "choices": features.ROWS,
        "help": "features to evaluate (default: all; published protocols: pretrained)",
    },
    "--labels-per-class": {
        "type": COUNT,
        "nargs": "*",
        "default": [],
        "metavar": "N",
        "help": "cached: also with N labels per class, by logistic regression (10 draws)",
    },
    "--lrs": {
        "type": POSITIVE,
        "nargs": "+",
        "metavar": "LR",
        "help": (
            "published protocols: learning rates to try, at a batch of 256"
            " (default: the published one times 0.1, 0.3, 1, 3, 10)"
        ),
    },
    "--weight-decays": {
        "type": NOT_NEGATIVE,
        "nargs": "+",
        "metavar": "WD",
        "help": "published protocols: weight decays to try (default: the published one and 0)",
    },
    "--batch-size": {
        "type": COUNT,
        "help": "published protocols: images per step over all ranks (default: published)",
    },
    "--feature": {
        "choices": ["pooled", "last4", "cls_mean"],
        "help": (
            "published protocols: pooled output, class tokens of a ViT's last four blocks, or"
            " class token and mean patch token"
        ),
    },
    "--select": {
        "choices": published_linear.SELECTIONS,
        "default": "held-out",
        "help": (
            "published protocols: select on held-out training images, train on all and select"
            " nothing, or select on the test images (DINO's convention)"
        ),
    },
}


def main(arguments: list[str]) -> None:
    """Run the command line."""
    command_line.evaluate_and_print(
        command_line.build_parser("ssl_pretrain.eval.linear", HELP, OPTIONS), arguments, _evaluate
    )


def _evaluate(run: Run, options: argparse.Namespace) -> dict[str, Any]:
    if options.protocol == "cached":
        _refuse(options, "lrs", "weight_decays", "batch_size", "feature")
        if options.select != "held-out":
            raise ValueError(
                f"--select {options.select}: --protocol cached selects on held-out training images;"
                " leave it out or give a published --protocol"
            )
        return cached_linear.evaluate(
            run, options.epochs or 50, options.labels_per_class, options.rows or features.ROWS
        )
    _refuse(options, "labels_per_class")
    linear_options = LinearOptions(
        protocol=options.protocol,
        lrs=options.lrs,
        weight_decays=options.weight_decays,
        epochs=options.epochs,
        batch_size=options.batch_size,
        feature=options.feature,
        selection=options.select,
    )
    return published_linear.evaluate(run, linear_options, options.rows or ["pretrained"])


def _refuse(options: argparse.Namespace, *names: str) -> None:
    """Raise ValueError if an option was given that this protocol does not take."""
    for name in names:
        if getattr(options, name):
            kind = "a published --protocol" if options.protocol == "cached" else "--protocol cached"
            raise ValueError(
                f"--{name.replace('_', '-')}: --protocol {options.protocol} does not take it; leave"
                f" it out or give {kind}"
            )


if __name__ == "__main__":
    command_line.execute(main, "ssl_pretrain.eval.linear")
