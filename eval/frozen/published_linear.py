"""The published linear protocols, which show a frozen backbone new crops in every epoch."""

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ssl_pretrain.data.image_source import Source
from ssl_pretrain.distributed import process_group
from ssl_pretrain.eval import results
from ssl_pretrain.eval.frozen import features, linear_heads, shards
from ssl_pretrain.eval.frozen.evaluation_split import (
    EvaluationSplit,
    describe_splits,
    hold_out,
    labeled_splits,
)
from ssl_pretrain.eval.frozen.features import Feature
from ssl_pretrain.eval.protocols import LINEAR, LinearProtocol, batch_that_fits, describe_linear
from ssl_pretrain.eval.runs import Run
from ssl_pretrain.eval.training_views import describe_view, train_loader, train_view
from ssl_pretrain.views.recipe import Crop

SELECTIONS = ("held-out", "published", "test")
LR_FACTORS = (1.0, 0.1, 0.3, 3.0, 10.0)  # learning rates to try over the published one
# Images that BYOL holds out (Grill et al., NeurIPS 2020, arXiv:2006.07733). Smaller data sets hold
# out a tenth.
MAX_HELD_OUT = 10_000


@dataclass(frozen=True)
class LinearOptions:
    """A published protocol by name, settings to try, and departures from it.

    None stands for the published value.
    """

    protocol: str
    lrs: list[float] | None = None  # at a batch of 256
    weight_decays: list[float] | None = None
    epochs: int | None = None
    batch_size: int | None = None
    feature: str | None = None
    selection: str = "held-out"

    @property
    def published(self) -> LinearProtocol:
        """The protocol as published, without the departures."""
        return LINEAR[self.protocol]

    def adapted(self, num_images: int) -> LinearProtocol:
        """Return the protocol with these departures and a batch that fits the images.

        Milestones keep their share of the epochs.
        """
        published = self.published
        epochs = published.epochs if self.epochs is None else self.epochs
        batch = self.batch_size or batch_that_fits(
            published.batch_size, num_images, process_group.world_size()
        )
        if epochs < 1 or not 1 <= batch <= num_images:
            raise ValueError(
                f"--epochs {epochs}, --batch-size {batch}: give at least 1 epoch, and a batch of 1"
                f" to {num_images} images"
            )
        milestones = tuple(round(each * epochs / published.epochs) for each in published.milestones)
        return replace(published, epochs=epochs, batch_size=batch, milestones=milestones)

    def grid(self) -> list[tuple[float, float]]:
        """Return learning rate at a batch of 256 and weight decay of each head."""
        published = self.published
        if self.selection == "published":
            if self.lrs or self.weight_decays:
                raise ValueError(
                    "--select published: trains the published setting only; leave out --lrs and"
                    " --weight-decays"
                )
            return [(published.base_lr, published.weight_decay)]
        lrs = self.lrs or [published.base_lr * factor for factor in LR_FACTORS]
        decays = self.weight_decays or list(dict.fromkeys([published.weight_decay, 0.0]))
        return list(itertools.product(lrs, decays))


class ProbedNetwork:
    """A frozen network and its linear heads, one row of the table.

    Args:
        name: Name of the row.
        feature: Feature of the network that the heads read.
        grid: Learning rate at a batch of 256 and weight decay of each head.
        protocol: Protocol of the training.
        num_classes: Number of classes.
        device: Device of the heads.
    """

    def __init__(
        self,
        name: str,
        feature: Feature,
        grid: list[tuple[float, float]],
        protocol: LinearProtocol,
        num_classes: int,
        device: torch.device,
    ):
        self.name, self.feature = name, feature
        like, dim = torch.empty(0, device=device), feature.feature_dim
        self.heads = linear_heads.LinearHeads(
            dim,
            num_classes,
            [lr * protocol.batch_size / 256 for lr, _ in grid],
            [weight_decay for _, weight_decay in grid],
            like=like,
            nesterov=protocol.nesterov,
            momentum=protocol.momentum,
            start=protocol.start,
            init_std=protocol.init_std,
            affine=protocol.batch_norm,
            trust=protocol.trust,
        )
        self.norm = linear_heads.FeatureNorm(dim, like) if protocol.batch_norm else None

    def step(self, views: Tensor, labels: Tensor, factor: float) -> None:
        """Train the heads on one batch."""
        values = self.feature(views).float()
        if self.norm:
            values = self.norm.normalize_batch(values)
        self.heads.step(values, labels, factor)

    def scores(self, split: EvaluationSplit) -> tuple[Tensor, Tensor]:
        """Return accuracy in [0, 1] and cross entropy of each head, the same on all ranks."""
        embed = partial(features.extract, self.feature)
        values, labels = shards.embed_split(embed, split)
        values = self.norm(values) if self.norm else values
        return linear_heads.scores(self.heads.weights.transpose(0, 1), values, labels)


def evaluate(
    run: Run, options: LinearOptions, rows: Sequence[str] = ("pretrained",)
) -> dict[str, Any]:
    """Measure the accuracy in percent by a published protocol and save it.

    The result goes to RUN/eval/linear_<protocol>.json, and every setting to ..._grid.json.

    Args:
        run: Run to evaluate.
        options: The protocol and departures from it.
        rows: Networks to evaluate: "random", "pretrained" or both.

    Returns:
        The content of the result file.

    Raises:
        ValueError: If the images have no labels, an option does not fit them, or `rows` has raw
            pixels, which have no network.
    """
    began = time.monotonic()
    if "raw" in rows:
        raise ValueError(
            "--rows raw: the published protocols train on crops that go through a network; only"
            " --protocol cached has a row of raw pixels"
        )
    published = options.published
    evaluation = replace(run.config.evaluation, interpolation=published.test_interpolation)
    run = replace(run, config=replace(run.config, evaluation=evaluation))
    train, test = labeled_splits(run, "the linear evaluation")
    fit, held_out = hold_out(len(train), min(0.1, MAX_HELD_OUT / len(train)))
    holds_out = options.selection == "held-out"
    source = train.source.take(fit) if holds_out else train.source
    protocol, grid = options.adapted(len(source)), options.grid()
    default = features.dino_feature(run.backbone) if protocol.dino_feature else "pooled"
    networks = [
        ProbedNetwork(
            name,
            Feature(backbone, options.feature or default),
            grid,
            protocol,
            len(train.classes),
            run.device,
        )
        for name, backbone in features.networks(run, train, rows)
    ]
    view = train_view(run, protocol.interpolation, protocol.crop_sampler, protocol.antialias)
    train_heads(networks, run, source, view, protocol)
    table, tried = [], []
    for network in networks:
        row, settings = _rows(
            network, grid, options, train.subset(held_out) if holds_out else test, test
        )
        results.print_progress(row.summary())
        table.append(row)
        tried += settings
    about = {
        **describe_splits(run, train, test, random="random" in rows),
        "feature": str(networks[-1].feature),
        "source": published.source,
        "classifier": describe_linear(protocol, published, len(source)),
        "views": describe_view(view),
        "selection": {
            "held-out": f"on {len(held_out):,} training images held out, by accuracy; not trained"
            " on them afterwards",
            "published": "none: the published setting, trained on all training images",
            "test": "ON THE TEST IMAGES, as in DINO's convention: an upper bound, not comparable"
            " with numbers selected otherwise",
        }[options.selection],
    }
    suffix = "_test_selected" if options.selection == "test" else ""
    name, seconds = f"linear_{options.protocol}{suffix}", time.monotonic() - began
    grid_about = about | {
        "accuracy": "of each learning rate (lr, at a batch of 256) and weight decay (wd), trained"
        " in the same pass"
    }
    results.save(run.path, f"{name}_grid", grid_about, tried, run.about(), seconds)
    table = results.with_better_random(table)
    return results.save(run.path, name, about, table, run.about(), seconds)


@torch.no_grad()
def train_heads(
    networks: list[ProbedNetwork], run: Run, source: Source, view: Crop, protocol: LinearProtocol
) -> None:
    """Train the heads of all networks on the same batches."""
    with train_loader(run, source, view, protocol.batch_size) as loader:
        steps = loader.steps_per_epoch
        for step, batch in zip(range(protocol.epochs * steps), loader.starting_at(0)):
            images = batch.views[0].contiguous(memory_format=torch.channels_last)
            for network in networks:
                network.step(images, batch.labels, protocol.lr_factor(step / steps))
            if (step + 1) % steps == 0:
                results.print_progress(f"epoch {(step + 1) // steps} of {protocol.epochs}")


def _rows(
    network: ProbedNetwork,
    grid: list[tuple[float, float]],
    options: LinearOptions,
    selection_split: EvaluationSplit,
    test: EvaluationSplit,
) -> tuple[results.Row, list[results.Row]]:
    """Return the network's row of the table, and the rows of everything that was tried."""
    percent = (100 * network.scores(test)[0]).tolist()
    names = [linear_heads.setting_name(*setting) for setting in grid]
    row = results.Row(network.name, {})
    tried = [results.Row(f"{network.name}, test images", dict(zip(names, percent)))]
    published = options.published.base_lr, options.published.weight_decay
    if published in grid:
        row.metrics["published setting"] = percent[grid.index(published)]
    if options.selection == "published":
        return row, tried
    accuracies, losses = network.scores(selection_split)
    head = linear_heads.best(accuracies, losses)
    on_test = options.selection == "test"
    column = "chosen on the test images" if on_test else "chosen on held-out images"
    lrs = {lr for lr, _ in grid}
    at_edge = len(lrs) > 1 and grid[head][0] in (min(lrs), max(lrs))
    row.metrics[column] = percent[head]
    row.notes[column] = names[head] + (", at the edge of those tried" if at_edge else "")
    if not on_test:
        held_out = dict(zip(names, (100 * accuracies).tolist()))
        tried.insert(0, results.Row(f"{network.name}, held-out images", held_out))
    return row, tried
