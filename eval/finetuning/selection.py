"""Fine-tuning with selected hyperparameters.

The learning rate and the weight decay are selected on held-out labeled images. The network is then
trained with them on all labeled images and tested once.
"""

import argparse
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from torch import nn

from ssl_pretrain.data import order
from ssl_pretrain.distributed import process_group
from ssl_pretrain.eval import results
from ssl_pretrain.eval.finetuning import trainer
from ssl_pretrain.eval.finetuning_protocols import FinetuningProtocol
from ssl_pretrain.eval.frozen import features, linear_heads
from ssl_pretrain.eval.frozen.evaluation_split import EvaluationSplit, describe_splits, hold_out
from ssl_pretrain.eval.protocols import fitting_batch_size
from ssl_pretrain.eval.runs import Run
from ssl_pretrain.schema import (
    FRACTION,
    FRACTION_BELOW_ONE,
    NON_NEGATIVE_FLOAT,
    POSITIVE_FLOAT,
    POSITIVE_INT,
)

ROWS = ("random", "pretrained")
MIN_STEPS_PER_EPOCH = 3  # published batch sizes that leave fewer steps are reduced
MIXING_OPTION = {
    "type": NON_NEGATIVE_FLOAT,
    "metavar": "ALPHA",
    "help": "0 turns it off (default: the protocol's)",
}
FINETUNING_OPTIONS: dict[str, dict[str, Any]] = {
    "--lrs": {
        "type": POSITIVE_FLOAT,
        "nargs": "+",
        "metavar": "LR",
        "help": (
            "learning rates to try; one is selected on a held-out tenth of the labeled images"
            " (default: the published one)"
        ),
    },
    "--weight-decays": {
        "type": NON_NEGATIVE_FLOAT,
        "nargs": "+",
        "metavar": "WD",
        "help": "weight decays to try; one is selected in the same way",
    },
    "--epochs": {
        "type": POSITIVE_FLOAT,
        "help": "passes over the labeled images (default: the protocol's)",
    },
    "--batch-size": {
        "type": POSITIVE_INT,
        "help": (
            "images per step over all ranks (default: the protocol's, reduced if there are few"
            " images)"
        ),
    },
    "--layer-decay": {
        "type": FRACTION,
        "help": (
            "ratio of each block's learning rate to the next block's (default: the protocol's;"
            " BEiT and MAE use 0.65 to 0.75)"
        ),
    },
    "--mixup": MIXING_OPTION,
    "--cutmix": MIXING_OPTION,
    "--ema": {
        "type": FRACTION_BELOW_ONE,
        "default": 0.0,
        "metavar": "DECAY",
        "help": "evaluate the moving average of the weights with this decay, such as 0.9999",
    },
    "--rows": {
        "nargs": "+",
        "choices": ROWS,
        "default": ["pretrained"],
        "help": "random: the same network trained from random weights (default: pretrained)",
    },
}


@dataclass(frozen=True)
class FinetuningOptions:
    """Settings to try and overrides of a published protocol. None keeps the published value."""

    lrs: list[float] | None = None  # for a batch of the protocol's `lr_batch_size` images
    weight_decays: list[float] | None = None
    epochs: float | None = None
    batch_size: int | None = None
    layer_decay: float | None = None
    mixup: float | None = None
    cutmix: float | None = None
    ema: float = 0.0  # decay of the moving average of the weights; 0 turns it off
    rows: Sequence[str] = ("pretrained",)


@dataclass(frozen=True)
class Column:
    """A column of the table: the labeled images and the protocol to train on them."""

    labeled_rows: np.ndarray  # indices into the training split
    protocol: FinetuningProtocol


def finetuning_options(namespace: argparse.Namespace) -> FinetuningOptions:
    """Return the values of FINETUNING_OPTIONS on the command line."""
    return FinetuningOptions(
        **{field.name: getattr(namespace, field.name) for field in fields(FinetuningOptions)}
    )


def without_color_augmentation(
    protocol: FinetuningProtocol, num_channels: int
) -> FinetuningProtocol:
    """Return the protocol without RandAugment, which is for RGB images, if these are others."""
    if num_channels == 3 or not protocol.randaugment:
        return protocol
    source = (
        f"{protocol.source}; without RandAugment, because it needs 3 channels and the images have"
        f" {num_channels}"
    )
    return replace(protocol, source=source, randaugment="")


def adapt_protocol(
    published_protocol: FinetuningProtocol, options: FinetuningOptions, num_images: int
) -> FinetuningProtocol:
    """Return the protocol with the options applied and a batch size that fits the images.

    Raises:
        ValueError: If the training would have no steps, the batch exceeds the number of images or
            does not divide evenly over the ranks, a rank's images cannot be mixed in pairs, or a
            value is out of range.
    """
    world_size = process_group.world_size()
    batch_size = options.batch_size or fitting_batch_size(
        published_protocol.batch_size, num_images, world_size, MIN_STEPS_PER_EPOCH
    )
    changes: dict[str, Any] = {
        name: value
        for name in ("layer_decay", "mixup", "cutmix", "epochs")
        if (value := getattr(options, name)) is not None
    }
    if options.epochs is not None:
        changes["num_steps"] = 0
    protocol = replace(published_protocol, batch_size=batch_size, **changes)
    order.check_batch_divides(batch_size, world_size)
    if not 1 <= batch_size <= num_images or (protocol.epochs <= 0 and not protocol.num_steps):
        raise ValueError(
            f"--epochs {protocol.epochs:g}, --batch-size {batch_size}: give more than 0 epochs, and"
            f" a batch of 1 to {num_images} images"
        )
    if (protocol.mixup or protocol.cutmix) and batch_size // world_size % 2:
        raise ValueError(
            f"--batch-size {batch_size}: {batch_size // world_size} images per rank cannot be mixed"
            " in pairs; give an even number, or --mixup 0 --cutmix 0"
        )
    if not 0 < protocol.layer_decay <= 1 or not 0 <= options.ema < 1:
        raise ValueError(
            f"--layer-decay {protocol.layer_decay:g}, --ema {options.ema:g}: give a layer decay in"
            " (0, 1] and a moving-average decay in [0, 1)"
        )
    return protocol


def evaluate_columns(
    run: Run,
    name: str,
    columns: dict[str, Column],
    train: EvaluationSplit,
    test: EvaluationSplit,
    options: FinetuningOptions,
    protocol_entries: dict[str, str],
) -> dict[str, Any]:
    """Measure and save the test accuracy of each network in each column, in percent.

    Args:
        run: Run to evaluate.
        name: Name of the evaluation, which is saved to RUN/eval/<name>.json.
        columns: Columns of the table.
        train: Training images. Each column uses a subset of them.
        test: Test images.
        options: Settings to try.
        protocol_entries: Further entries of the saved protocol.

    Returns:
        The content of the result file.
    """
    start = time.monotonic()
    table = []
    for row_name, backbone in features.networks(run, train, options.rows):
        if row_name == "random, recalibrated":
            continue  # training updates the batch-norm statistics anyway
        is_random = row_name.startswith("random")
        row = results.Row("trained from random weights" if is_random else row_name, {})
        for title, column in columns.items():
            row.metrics[title], note = _tune_and_test(run, backbone, column, train, test, options)
            if note:
                row.notes[title] = note
            results.print_progress(f"{row.features}: {title} {row.metrics[title]:.1f} %")
        table.append(row)
    pools_patches = any(column.protocol.pools_patches for column in columns.values())
    protocol = {
        **describe_splits(run, train, test, has_random_row=False),
        "feature": "none: the whole network is trained, with a linear classifier on "
        + ("its mean patch token, after a new norm" if pools_patches else "its pooled output"),
        **protocol_entries,
        **{
            f"training, {title}": describe_training(column, options)
            for title, column in columns.items()
        },
    }
    return results.save(run.path, name, protocol, table, run.provenance(), time.monotonic() - start)


def _tune_and_test(
    run: Run,
    backbone: nn.Module,
    column: Column,
    train: EvaluationSplit,
    test: EvaluationSplit,
    options: FinetuningOptions,
) -> tuple[float, str]:
    """Return the test accuracy in percent, and a note about the setting if one was selected."""
    num_classes = len(train.classes)

    def fine_tune(rows: np.ndarray, lr: float, weight_decay: float) -> nn.Module:
        batch_size = fitting_batch_size(
            column.protocol.batch_size, len(rows), process_group.world_size(), min_steps=1
        )
        protocol = replace(
            column.protocol, base_lr=lr, weight_decay=weight_decay, batch_size=batch_size
        )
        model = trainer.build_network(run, backbone, protocol, num_classes)
        source = train.source.take(rows)
        return trainer.train(run, model, source, protocol, num_classes, options.ema)

    grid = list(
        itertools.product(
            options.lrs or [column.protocol.base_lr],
            options.weight_decays or [column.protocol.weight_decay],
        )
    )
    selected, note = grid[0], ""
    if len(grid) > 1:
        train_rows, held_out_rows = hold_out(len(column.labeled_rows))
        held_out = train.subset(column.labeled_rows[held_out_rows])
        accuracies, losses = zip(
            *(
                trainer.accuracy_and_loss(
                    fine_tune(column.labeled_rows[train_rows], *setting), held_out
                )
                for setting in grid
            )
        )
        selected = grid[linear_heads.best_setting(accuracies, losses)]
        percentages = ", ".join(
            f"lr {lr:g} wd {decay:g} {100 * accuracy:.1f} %"
            for (lr, decay), accuracy in zip(grid, accuracies)
        )
        name = linear_heads.setting_name(*selected)
        note = f"{name}, on {len(held_out)} held-out labeled images ({percentages})"
    return 100 * trainer.accuracy_and_loss(fine_tune(column.labeled_rows, *selected), test)[0], note


def describe_training(column: Column, options: FinetuningOptions) -> str:
    """Describe the training of a column, as an entry of the saved protocol."""
    protocol = column.protocol
    lrs = ", ".join(f"{lr:g}" for lr in options.lrs or [protocol.base_lr])
    decays = ", ".join(f"{decay:g}" for decay in options.weight_decays or [protocol.weight_decay])
    names = ("mixup", "cutmix", "smoothing", "erasing", "drop_path", "randaugment")
    entries = [
        "SGD with Nesterov momentum 0.9" if protocol.optimizer == "sgd" else "AdamW",
        f"learning rate {lrs} at a batch of {protocol.lr_batch_size}",
        f"batch {protocol.batch_size} of {len(column.labeled_rows):,} labeled images",
        f"{protocol.num_steps} steps" if protocol.num_steps else f"{protocol.epochs:g} epochs",
        f"warm-up {protocol.warmup_epochs:g} epochs, cosine to {protocol.min_lr:g}",
        f"weight decay {decays}"
        f"{'' if protocol.decays_norms_and_biases else ' (not biases and norms)'}",
        "" if protocol.layer_decay == 1 else f"layer decay {protocol.layer_decay}",
        *(
            f"{name.replace('_', ' ')} {value}"
            for name in names
            if (value := getattr(protocol, name))
        ),
        f"moving average {options.ema:g}" if options.ema else "",
    ]
    return ", ".join(filter(None, entries))
