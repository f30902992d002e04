"""The tables of tuned networks: what is tried is chosen on held-out labelled images, then trained on all of them and tested once."""

from __future__ import annotations

import argparse
import itertools
import time
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import nn

from ssl_pretrain.data import order
from ssl_pretrain.distributed import process_group
from ssl_pretrain.eval import protocols, results
from ssl_pretrain.eval.finetuning import trainer
from ssl_pretrain.eval.frozen import evaluation_split, features
from ssl_pretrain.eval.frozen.evaluation_split import Part
from ssl_pretrain.eval.protocols import TuningProtocol
from ssl_pretrain.eval.results import Row
from ssl_pretrain.eval.runs import Run
from ssl_pretrain.schema import BELOW_ONE, COUNT, NOT_NEGATIVE, POSITIVE, SHARE

ROWS = ("random", "pretrained")


@dataclass(frozen=True)
class Settings:
    """What is tried, or departs from a published protocol; None: as published."""

    lrs: list[float] | None = None  # for the batch that the protocol gives its rate for
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
    """A column of the table: some labelled training images, and how the networks are trained on them."""

    rows: np.ndarray  # of the training part
    protocol: TuningProtocol
    notes: list[str] = field(default_factory=list)


def add_options(parser: argparse.ArgumentParser) -> None:
    lrs = "learning rates to try, chosen on a tenth of the labelled images held out (default: the published one)"
    parser.add_argument("--lrs", type=POSITIVE, nargs="+", metavar="LR", help=lrs)
    parser.add_argument(
        "--weight-decays",
        type=NOT_NEGATIVE,
        nargs="+",
        metavar="WD",
        help="the same for weight decays",
    )
    parser.add_argument(
        "--epochs", type=POSITIVE, help="passes over the labelled images (default: the protocol's)"
    )
    parser.add_argument(
        "--batch-size",
        type=COUNT,
        help="images a step, over all ranks (default: the protocol's, where it fits the images)",
    )
    decay = "the rate of each block, as a share of that of the block after it (default: the protocol's; BEiT and MAE take 0.65 to 0.75)"
    parser.add_argument("--layer-decay", type=SHARE, help=decay)
    parser.add_argument(
        "--mixup",
        type=NOT_NEGATIVE,
        metavar="ALPHA",
        help="0 turns it off (default: the protocol's)",
    )
    parser.add_argument(
        "--cutmix",
        type=NOT_NEGATIVE,
        metavar="ALPHA",
        help="0 turns it off (default: the protocol's)",
    )
    parser.add_argument(
        "--ema",
        type=BELOW_ONE,
        default=0.0,
        metavar="DECAY",
        help="judge the moving average of the weights, such as 0.9999",
    )
    rows = "random: the same network trained from its own first weights (default: pretrained)"
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=["pretrained"], help=rows)


def settings_of(options: argparse.Namespace) -> Settings:
    return Settings(
        options.lrs, options.weight_decays, options.epochs, options.batch_size, options.layer_decay,
        options.mixup, options.cutmix, options.ema, tuple(options.rows),
    )  # fmt: skip


def departing(published: TuningProtocol, settings: Settings, num_images: int) -> TuningProtocol:
    """The protocol with these departures and a batch that fits the images.

    Raises:
        ValueError: there is nothing to train, the batch does not fit or cannot be mixed in pairs, or a share is outside of [0, 1].
    """
    world = process_group.world_size()
    batch = settings.batch_size or protocols.batch_that_fits(
        published.batch_size, num_images, world, steps=3
    )
    changes: dict[str, Any] = {"batch_size": batch}
    for name in ("layer_decay", "mixup", "cutmix"):
        if (value := getattr(settings, name)) is not None:
            changes[name] = value
    if settings.epochs is not None:
        changes |= {"epochs": settings.epochs, "steps": 0}
    protocol = replace(published, **changes)
    order.check_divides(batch, world)
    if not 1 <= batch <= num_images or (protocol.epochs <= 0 and not protocol.steps):
        wanted = f"give more than 0 epochs, and a batch of 1 to {num_images} images"
        raise ValueError(f"--epochs {protocol.epochs:g}, --batch-size {batch}: {wanted}")
    if (protocol.mixup or protocol.cutmix) and batch // world % 2:
        remedy = "give an even number, or --mixup 0 --cutmix 0"
        raise ValueError(
            f"--batch-size {batch}: {batch // world} images a rank cannot be mixed in pairs; {remedy}"
        )
    if not 0 < protocol.layer_decay <= 1 or not 0 <= settings.ema < 1:
        raise ValueError(
            f"--layer-decay {protocol.layer_decay:g} is a share in (0, 1], --ema {settings.ema:g} one in [0, 1)"
        )
    return protocol


def evaluate(
    run: Run,
    name: str,
    columns: dict[str, Column],
    train: Part,
    test: Part,
    settings: Settings,
    about: dict[str, str],
) -> dict[str, Any]:
    """Accuracy in percent of each network in each column. Kept in RUN/eval/<name>.json.

    Args:
        about: further lines of the protocol.
    """
    began = time.monotonic()
    table = []
    for row_name, backbone in features.networks(run, train, settings.rows):
        if row_name == "random, recalibrated":
            continue  # its statistics are trained here anyhow
        row = Row("trained from random weights" if row_name.startswith("random") else row_name, {})
        for column, what in columns.items():
            row.metrics[column], note = _reached(run, backbone, what, train, test, settings)
            if note:
                row.notes[column] = note
            results.say(f"{row.features}: {column} {row.metrics[column]:.1f} %")
        table.append(row)
    protocol = {
        **evaluation_split.protocol(run, train, test, random=False),
        "feature": "none: the whole network is trained, with a linear classifier on its pooled output",
        **about,
        **{f"training, {column}": describe(what, settings) for column, what in columns.items()},
    }
    return results.save(run.path, name, protocol, table, run.about(), time.monotonic() - began)


def _reached(
    run: Run, backbone: nn.Module, what: Column, train: Part, test: Part, settings: Settings
) -> tuple[float, str]:
    """Percent of the test images, and what was chosen on which images."""
    protocol, num_classes = what.protocol, len(train.classes)
    grid = list(
        itertools.product(
            settings.lrs or [protocol.base_lr], settings.weight_decays or [protocol.weight_decay]
        )
    )

    def tuned(rows: np.ndarray, lr: float, weight_decay: float) -> nn.Module:
        batch = protocols.batch_that_fits(
            protocol.batch_size, len(rows), process_group.world_size(), steps=1
        )  # a tenth may be held out
        each = replace(protocol, base_lr=lr, weight_decay=weight_decay, batch_size=batch)
        model = trainer.network(run, backbone, each, num_classes)
        return trainer.train(
            run, model, train.source.take(rows), each, num_classes, each.layer_decay, settings.ema
        )

    chosen, note = grid[0], ""
    if len(grid) > 1:
        kept, aside = evaluation_split.hold_out(len(what.rows))
        held_out = Part(run, train.source, what.rows[aside])
        tried = [trainer.scores(tuned(what.rows[kept], *each), held_out) for each in grid]
        best = max(
            range(len(grid)), key=lambda i: (tried[i][0], -np.nan_to_num(tried[i][1], nan=np.inf))
        )
        chosen = grid[best]
        listed = ", ".join(
            f"lr {lr:g} wd {wd:g} {100 * reached:.1f} %"
            for (lr, wd), (reached, _) in zip(grid, tried)
        )
        note = f"lr {chosen[0]:g}, wd {chosen[1]:g}, on {len(aside)} held-out labelled images ({listed})"
    return 100 * trainer.scores(tuned(what.rows, *chosen), test)[0], note


def describe(what: Column, settings: Settings) -> str:
    protocol = what.protocol
    lrs = ", ".join(f"{lr:g}" for lr in settings.lrs or [protocol.base_lr])
    decays = ", ".join(f"{decay:g}" for decay in settings.weight_decays or [protocol.weight_decay])
    said = [
        "SGD with Nesterov momentum 0.9" if protocol.optimizer == "sgd" else "AdamW",
        f"learning rate {lrs} at a batch of {protocol.lr_batch}",
        f"batch {protocol.batch_size} of {len(what.rows):,} labelled images",
        f"{protocol.steps} steps" if protocol.steps else f"{protocol.epochs:g} epochs",
        f"warm-up {protocol.warmup_epochs:g} epochs, cosine to {protocol.min_lr:g}",
        f"weight decay {decays}" + ("" if protocol.decay_all else " (not biases and norms)"),
    ]
    extras = {
        "layer_decay": 1.0,
        "mixup": 0.0,
        "cutmix": 0.0,
        "smoothing": 0.0,
        "erasing": 0.0,
        "drop_path": 0.0,
        "randaugment": "",
    }
    said += [
        f"{name.replace('_', ' ')} {getattr(protocol, name)}"
        for name, off in extras.items()
        if getattr(protocol, name) != off
    ]
    said += [f"moving average {settings.ema:g}"] if settings.ema else []
    return ", ".join([*said, *what.notes])
