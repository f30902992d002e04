"""Fine-tuning with selected hyperparameters.

Settings are selected on held-out labeled images. The selected one is then trained on all labeled
images and tested once.
"""

import argparse
import itertools
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from ssl_pretrain.data import order
from ssl_pretrain.distributed import process_group
from ssl_pretrain.eval import results
from ssl_pretrain.eval.finetuning import trainer
from ssl_pretrain.eval.frozen import features
from ssl_pretrain.eval.frozen.evaluation_split import EvaluationSplit, describe_splits, hold_out
from ssl_pretrain.eval.frozen.linear_heads import setting_name
from ssl_pretrain.eval.protocols import TuningProtocol, batch_that_fits
from ssl_pretrain.eval.runs import Run
from ssl_pretrain.schema import BELOW_ONE, COUNT, NOT_NEGATIVE, POSITIVE, SHARE

ROWS = ("random", "pretrained")
MIN_STEPS = 3  # minimum per epoch. A published batch size that gives fewer steps is reduced.
MIXING_OPTION = {
    "type": NOT_NEGATIVE,
    "metavar": "ALPHA",
    "help": "0 turns it off (default: the protocol's)",
}
TUNING_OPTIONS: dict[str, dict[str, Any]] = {
    "--lrs": {
        "type": POSITIVE,
        "nargs": "+",
        "metavar": "LR",
        "help": (
            "learning rates to try; one is selected on a held-out tenth of the labeled images"
            " (default: the published one)"
        ),
    },
    "--weight-decays": {
        "type": NOT_NEGATIVE,
        "nargs": "+",
        "metavar": "WD",
        "help": "weight decays to try; one is selected in the same way",
    },
    "--epochs": {
        "type": POSITIVE,
        "help": "passes over the labeled images (default: the protocol's)",
    },
    "--batch-size": {
        "type": COUNT,
        "help": "images per step over all ranks (default: the protocol's, or less for few images)",
    },
    "--layer-decay": {
        "type": SHARE,
        "help": (
            "ratio of each block's learning rate to the next block's (default: the protocol's;"
            " BEiT and MAE take 0.65 to 0.75)"
        ),
    },
    "--mixup": MIXING_OPTION,
    "--cutmix": MIXING_OPTION,
    "--ema": {
        "type": BELOW_ONE,
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
class TuningOptions:
    """Settings to try and departures from a published protocol. None keeps the protocol's value."""

    lrs: list[float] | None = None  # at the protocol's `lr_batch`
    weight_decays: list[float] | None = None
    epochs: float | None = None
    batch_size: int | None = None
    layer_decay: float | None = None
    mixup: float | None = None
    cutmix: float | None = None
    ema: float = 0.0
    rows: tuple[str, ...] = ("pretrained",)


@dataclass(frozen=True)
class Column:
    """A column of the table: a subset of the training images and the protocol to train on it."""

    rows: np.ndarray  # indices into the training split
    protocol: TuningProtocol


def options_from(namespace: argparse.Namespace) -> TuningOptions:
    """Return the options that TUNING_OPTIONS defines."""
    return TuningOptions(
        lrs=namespace.lrs,
        weight_decays=namespace.weight_decays,
        epochs=namespace.epochs,
        batch_size=namespace.batch_size,
        layer_decay=namespace.layer_decay,
        mixup=namespace.mixup,
        cutmix=namespace.cutmix,
        ema=namespace.ema,
        rows=tuple(namespace.rows),
    )


def adapt(published: TuningProtocol, options: TuningOptions, num_images: int) -> TuningProtocol:
    """Return the protocol with the options applied and a batch size that fits the images.

    Raises:
        ValueError: If there is nothing to train, the batch does not fit or cannot be mixed in
            pairs, or a value is out of range.
    """
    world_size = process_group.world_size()
    batch = options.batch_size or batch_that_fits(
        published.batch_size, num_images, world_size, MIN_STEPS
    )
    changes: dict[str, Any] = {
        name: value
        for name in ("layer_decay", "mixup", "cutmix")
        if (value := getattr(options, name)) is not None
    }
    if options.epochs is not None:
        changes |= {"epochs": options.epochs, "steps": 0}
    protocol = replace(published, batch_size=batch, **changes)
    order.check_divides(batch, world_size)
    if not 1 <= batch <= num_images or (protocol.epochs <= 0 and not protocol.steps):
        raise ValueError(
            f"--epochs {protocol.epochs:g}, --batch-size {batch}: give more than 0 epochs, and a"
            f" batch of 1 to {num_images} images"
        )
    if (protocol.mixup or protocol.cutmix) and batch // world_size % 2:
        raise ValueError(
            f"--batch-size {batch}: {batch // world_size} images per rank cannot be mixed in pairs;"
            " give an even number, or --mixup 0 --cutmix 0"
        )
    if not 0 < protocol.layer_decay <= 1 or not 0 <= options.ema < 1:
        raise ValueError(
            f"--layer-decay {protocol.layer_decay:g}, --ema {options.ema:g}: give a layer decay in"
            " (0, 1] and a moving average in [0, 1)"
        )
    return protocol


def evaluate_columns(
    run: Run,
    name: str,
    columns: dict[str, Column],
    train: EvaluationSplit,
    test: EvaluationSplit,
    options: TuningOptions,
    about: dict[str, str],
) -> dict[str, Any]:
    """Measure the accuracy in percent of each network in each column, and save it.

    Args:
        run: Run to evaluate.
        name: Name of the result: RUN/eval/<name>.json.
        columns: Columns of the table.
        train: Training images. Each column uses a subset of them.
        test: Test images.
        options: Settings to try.
        about: Further entries of the protocol.

    Returns:
        The content of the result file.
    """
    start = time.monotonic()
    table = []
    for row_name, backbone in features.networks(run, train, options.rows):
        if row_name == "random, recalibrated":
            continue  # training updates the statistics in any case
        is_random = row_name.startswith("random")
        row = results.Row("trained from random weights" if is_random else row_name, {})
        for title, column in columns.items():
            row.metrics[title], note = _tune_and_test(run, backbone, column, train, test, options)
            if note:
                row.notes[title] = note
            results.print_progress(f"{row.features}: {title} {row.metrics[title]:.1f} %")
        table.append(row)
    protocol = {
        **describe_splits(run, train, test, random=False),
        "feature": "none: the whole network is trained, with a linear classifier on its pooled"
        " output",
        **about,
        **{f"training, {title}": describe(column, options) for title, column in columns.items()},
    }
    return results.save(run.path, name, protocol, table, run.about(), time.monotonic() - start)


def _tune_and_test(
    run: Run,
    backbone: nn.Module,
    column: Column,
    train: EvaluationSplit,
    test: EvaluationSplit,
    options: TuningOptions,
) -> tuple[float, str]:
    """Return the test accuracy in percent, and a note about the selected setting."""
    protocol, num_classes = column.protocol, len(train.classes)

    def tune(rows: np.ndarray, lr: float, weight_decay: float) -> nn.Module:
        # A tenth of the images may be held out.
        batch = batch_that_fits(
            protocol.batch_size, len(rows), process_group.world_size(), min_steps=1
        )
        setting = replace(protocol, base_lr=lr, weight_decay=weight_decay, batch_size=batch)
        model = trainer.build_network(run, backbone, setting, num_classes)
        source = train.source.take(rows)
        return trainer.train(run, model, source, setting, num_classes, options.ema)

    lrs = options.lrs or [protocol.base_lr]
    grid = list(itertools.product(lrs, options.weight_decays or [protocol.weight_decay]))
    best, note = grid[0], ""
    if len(grid) > 1:
        train_rows, held_out_rows = (column.rows[rows] for rows in hold_out(len(column.rows)))
        held_out = train.subset(held_out_rows)
        scores = [trainer.scores(tune(train_rows, *setting), held_out) for setting in grid]

        def quality(index: int) -> tuple[float, float]:
            accuracy, loss = scores[index]
            return accuracy, -np.nan_to_num(loss, nan=np.inf)

        best = grid[max(range(len(grid)), key=quality)]
        accuracies = ", ".join(
            f"lr {lr:g} wd {decay:g} {100 * accuracy:.1f} %"
            for (lr, decay), (accuracy, _) in zip(grid, scores)
        )
        note = f"{setting_name(*best)}, on {len(held_out)} held-out labeled images ({accuracies})"
    return 100 * trainer.scores(tune(column.rows, *best), test)[0], note


def describe(column: Column, options: TuningOptions) -> str:
    """Describe the training of a column for the protocol."""
    protocol = column.protocol
    lrs = ", ".join(f"{lr:g}" for lr in options.lrs or [protocol.base_lr])
    decays = ", ".join(f"{decay:g}" for decay in options.weight_decays or [protocol.weight_decay])
    entries = [
        "SGD with Nesterov momentum 0.9" if protocol.optimizer == "sgd" else "AdamW",
        f"learning rate {lrs} at a batch of {protocol.lr_batch}",
        f"batch {protocol.batch_size} of {len(column.rows):,} labeled images",
        f"{protocol.steps} steps" if protocol.steps else f"{protocol.epochs:g} epochs",
        f"warm-up {protocol.warmup_epochs:g} epochs, cosine to {protocol.min_lr:g}",
        f"weight decay {decays}" + ("" if protocol.decay_all else " (not biases and norms)"),
        "" if protocol.layer_decay == 1 else f"layer decay {protocol.layer_decay}",
    ]
    for name in ("mixup", "cutmix", "smoothing", "erasing", "drop_path", "randaugment"):
        if value := getattr(protocol, name):
            entries.append(f"{name.replace('_', ' ')} {value}")
    if options.ema:
        entries.append(f"moving average {options.ema:g}")
    return ", ".join(filter(None, entries))
