"""The published linear protocols: classifiers on a frozen backbone that sees another crop of every image in every epoch."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ssl_pretrain.data import readers
from ssl_pretrain.data.image_source import Source
from ssl_pretrain.data.loader import Loader
from ssl_pretrain.data.order import Plan
from ssl_pretrain.distributed import process_group
from ssl_pretrain.eval import protocols, results
from ssl_pretrain.eval.frozen import evaluation_split, features, linear_heads, shards
from ssl_pretrain.eval.frozen.evaluation_split import Part
from ssl_pretrain.eval.frozen.features import Feature
from ssl_pretrain.eval.frozen.linear_heads import Classifiers, FeatureNorm
from ssl_pretrain.eval.protocols import LinearProtocol
from ssl_pretrain.eval.results import Row
from ssl_pretrain.eval.runs import Run
from ssl_pretrain.views.recipe import Crop, ViewsConfig

SELECT = ("held-out", "published", "test")
AROUND = (1.0, 0.1, 0.3, 3.0, 10.0)  # the published rate times these
MOST_HELD_OUT = (
    10_000  # BYOL's number (Grill et al., NeurIPS 2020, arXiv:2006.07733); of fewer images a tenth
)


@dataclass(frozen=True)
class Settings:
    """A published protocol by name, and what is tried or departs from it; None: as published."""

    name: str
    lrs: list[float] | None = None  # at a batch of 256
    weight_decays: list[float] | None = None
    epochs: int | None = None
    batch_size: int | None = None
    feature: str | None = None
    select: str = "held-out"

    def protocol(self, num_images: int) -> LinearProtocol:
        """The published one with these departures; milestones stay at their share of the epochs."""
        published = protocols.LINEAR[self.name]
        epochs = published.epochs if self.epochs is None else self.epochs
        batch = protocols.batch_that_fits(
            published.batch_size, num_images, process_group.world_size()
        )
        batch = batch if self.batch_size is None else self.batch_size
        if epochs < 1 or not 1 <= batch <= num_images:
            raise ValueError(
                f"--epochs {epochs}, --batch-size {batch}: give at least 1 epoch, and a batch of 1 to {num_images} images"
            )
        milestones = tuple(
            round(milestone * epochs / published.epochs) for milestone in published.milestones
        )
        return replace(published, epochs=epochs, batch_size=batch, milestones=milestones)

    def grid(self) -> list[tuple[float, float]]:
        """(learning rate at a batch of 256, weight decay) of each classifier, the published setting first where it is tried."""
        published = protocols.LINEAR[self.name]
        if self.select == "published":
            if self.lrs or self.weight_decays:
                raise ValueError(
                    "--select published trains the published setting alone; leave out --lrs and --weight-decays"
                )
            return [(published.base_lr, published.weight_decay)]
        lrs = self.lrs or [published.base_lr * factor for factor in AROUND]
        decays = self.weight_decays or list(dict.fromkeys([published.weight_decay, 0.0]))
        return list(itertools.product(lrs, decays))


@dataclass
class Judged:
    """One row of the table: a frozen network and its classifiers."""

    name: str
    feature: Feature
    heads: Classifiers
    norm: FeatureNorm | None

    def step(self, views: Tensor, labels: Tensor, factor: float) -> None:
        found = self.feature(views).float()
        self.heads.step(self.norm.train(found) if self.norm else found, labels, factor)

    def scores(self, part: Part) -> tuple[Tensor, Tensor]:
        """Accuracy in [0, 1] and cross entropy of each classifier on the evaluation views of a part, on all ranks."""

        def embed(own: Part, offset: tuple[int, int] = (0, 0)) -> tuple[Tensor, Tensor]:
            return features.extract(self.feature, own, offset)

        found, labels = shards.embedded(embed, part, shards.share(part))
        found, weights = (
            self.norm(found) if self.norm else found,
            self.heads.weights.transpose(0, 1),
        )
        return linear_heads.accuracies(weights, found, labels), linear_heads.cross_entropies(
            weights, found, labels
        )


def evaluate(run: Run, settings: Settings, rows: Sequence[str] = ("pretrained",)) -> dict[str, Any]:
    """Accuracy in percent of each network's classifiers by a published protocol. Kept in RUN/eval/linear_<name>.json.

    Raises:
        ValueError: the images have no labels, a setting does not fit them, or raw pixels are asked for, which have no network.
    """
    began = time.monotonic()
    if "raw" in rows:
        raise ValueError(
            "--rows raw: the published protocols train on crops through a network; --protocol cached has a row of raw pixels"
        )
    published = protocols.LINEAR[settings.name]
    evaluation = replace(run.config.evaluation, interpolation=published.test_interpolation)
    run = replace(run, config=replace(run.config, evaluation=evaluation))
    train, test = evaluation_split.labelled_parts(run, "the linear evaluation")
    kept, held_out = evaluation_split.hold_out(len(train), min(0.1, MOST_HELD_OUT / len(train)))
    source = train.source.take(kept) if settings.select == "held-out" else train.source
    protocol, grid = settings.protocol(len(source)), settings.grid()
    chosen_feature = settings.feature or (
        features.dinos_choice(run.backbone) if protocol.dinos_feature else "pooled"
    )
    judged = [
        _judged(
            name, Feature(backbone, chosen_feature), grid, protocol, len(train.classes), run.device
        )
        for name, backbone in features.networks(run, train, rows)
    ]
    view = train_views(run, protocol.interpolation, protocol.crop_sampler, protocol.antialias)
    train_all(judged, run, source, view, protocol)
    choosing = Part(run, train.source, held_out) if settings.select == "held-out" else test
    table, tried = [], []
    for one in judged:
        row, each = _rows(one, grid, settings, choosing, test)
        results.say(
            f"{one.name}: "
            + ", ".join(f"{column} {value:.1f} %" for column, value in row.metrics.items())
        )
        table.append(row)
        tried += each
    about = {
        **evaluation_split.protocol(run, train, test, random="random" in rows),
        "feature": str(judged[-1].feature),
        "source": published.source,
        "classifier": describe(protocol, published, len(source)),
        "views": f"random crops of {view.scale[0]:g} to {view.scale[1]:g} of the area, {view.interpolation}"
        + ("" if view.crop_sampler == "torchvision" else f", {view.crop_sampler} sampler")
        + ("" if view.antialias else ", not antialiased")
        + (
            ", flipped in half of the cases"
            if view.flip
            else ", not flipped, as the run's own views are not"
        ),
        "selection": _selection(settings, len(held_out)),
    }
    name = f"linear_{settings.name}" + ("_test_selected" if settings.select == "test" else "")
    seconds = time.monotonic() - began
    everything = {
        **about,
        "accuracy": "of each learning rate (lr, at a batch of 256) and weight decay (wd), trained in the one pass",
    }
    results.save(run.path, f"{name}_grid", everything, tried, run.about(), seconds)
    return results.save(
        run.path, name, about, results.with_better_random(table), run.about(), seconds
    )


def train_views(
    run: Run, interpolation: Any, crop_sampler: Any = "torchvision", antialias: bool = True
) -> Crop:
    flips = any(crop.flip > 0 for crop in run.config.views.crops.values())
    return protocols.train_view(run.image_size, interpolation, flips, crop_sampler, antialias)


def batches(
    run: Run, source: Source, view: Crop, batch_size: int, finish: readers.Finish | None = None
) -> Loader:
    """This rank's share of the training batches, seed 0: the same images and crops on any number of ranks."""
    data, views = run.config.data, run.config.views
    kind = readers.ReaderKind.PROCESSES
    if finish is None:
        kind, _ = readers.choose_reader(data, source)
    reader = readers.build_reader(
        source,
        ViewsConfig({"train": view}, views.mean, views.std),
        Plan(0, len(source), batch_size, process_group.rank(), process_group.world_size()),
        kind,
        num_workers=min(data.num_workers, process_group.cores_per_rank()),
        device=run.device,
        finish=finish,
    )
    return Loader(reader, max_replaced=data.max_replaced)


@torch.no_grad()
def train_all(
    judged: list[Judged], run: Run, source: Source, view: Crop, protocol: LinearProtocol
) -> None:
    """Every classifier of every network, on the same batches."""
    with batches(run, source, view, protocol.batch_size) as made:
        steps = made.steps_per_epoch
        for step, batch in zip(range(protocol.epochs * steps), made.starting_at(0)):
            images = batch.views[0].contiguous(memory_format=torch.channels_last)
            for one in judged:
                one.step(images, batch.labels, protocol.rate(step / steps))
            if (step + 1) % steps == 0:
                results.say(f"epoch {(step + 1) // steps} of {protocol.epochs}")


def _judged(
    name: str,
    feature: Feature,
    grid: list[tuple[float, float]],
    protocol: LinearProtocol,
    classes: int,
    device: Any,
) -> Judged:
    like = torch.empty(0, device=device)
    rates = [lr * protocol.batch_size / 256 for lr, _ in grid]
    decays = [weight_decay for _, weight_decay in grid]
    heads = Classifiers(
        feature.feature_dim, classes, rates, decays, like=like,
        nesterov=protocol.nesterov, momentum=protocol.momentum, start=protocol.start, init_std=protocol.init_std,
        affine=protocol.batch_norm, trust=protocol.trust,
    )  # fmt: skip
    return Judged(
        name,
        feature,
        heads,
        FeatureNorm(feature.feature_dim, like) if protocol.batch_norm else None,
    )


def _rows(
    one: Judged, grid: list[tuple[float, float]], settings: Settings, choosing: Part, test: Part
) -> tuple[Row, list[Row]]:
    """The row of the table, and those of everything tried."""
    reached, _ = one.scores(test)
    percent = [100 * value for value in reached.tolist()]
    names = [f"lr {lr:g}, wd {weight_decay:g}" for lr, weight_decay in grid]
    row, tried = Row(one.name, {}), [Row(f"{one.name}, test images", dict(zip(names, percent)))]
    published = protocols.LINEAR[settings.name]
    if (published.base_lr, published.weight_decay) in grid:
        row.metrics["published setting"] = percent[
            grid.index((published.base_lr, published.weight_decay))
        ]
    if settings.select != "published":
        on_choice, losses = one.scores(choosing)
        head = linear_heads.best(on_choice, losses)
        column = (
            "chosen on the test images"
            if settings.select == "test"
            else "chosen on held-out images"
        )
        lrs = [lr for lr, _ in grid]
        edge = (
            ", at the edge of those tried"
            if len(set(lrs)) > 1 and grid[head][0] in (min(lrs), max(lrs))
            else ""
        )
        row.metrics[column], row.notes[column] = percent[head], f"{names[head]}{edge}"
    if settings.select == "held-out":
        tried.insert(
            0, Row(f"{one.name}, held-out images", dict(zip(names, (100 * on_choice).tolist())))
        )
    return row, tried


def describe(protocol: LinearProtocol, published: LinearProtocol, num_images: int) -> str:
    schedule = "cosine to 0" + (" by epochs" if protocol.by_epoch else " by steps")
    if protocol.milestones:
        schedule = f"a tenth of the rate after {', '.join(map(str, protocol.milestones))} epochs"
    parts_ = [
        f"SGD with {'Nesterov ' if protocol.nesterov else ''}momentum {protocol.momentum:g}",
        f"published learning rate {protocol.base_lr:g} at a batch of 256, here times {protocol.batch_size / 256:g}",
        f"batch {protocol.batch_size}"
        + _published(published.batch_size, protocol.batch_size, f", {num_images:,} images"),
        f"{protocol.epochs} epochs" + _published(published.epochs, protocol.epochs),
        schedule,
        f"weight decay {protocol.weight_decay:g}",
        _start(protocol),
    ]
    if protocol.trust:
        parts_.insert(1, f"LARC of {protocol.trust:g} without clipping")
    return ", ".join(
        [
            *parts_,
            *(
                ["features through a batch norm with a trained scale and shift"]
                if protocol.batch_norm
                else []
            ),
        ]
    )


def _start(protocol: LinearProtocol) -> str:
    if protocol.start == "uniform":
        return "from nn.Linear's default weights"
    if protocol.start == "truncated":
        return "from Haiku's default weights"
    return (
        f"from normal weights of deviation {protocol.init_std:g}"
        if protocol.init_std
        else "from zero"
    )


def _published(value: int, here: int, why: str = "") -> str:
    return "" if value == here else f" (published: {value}{why})"


def _selection(settings: Settings, num_held_out: int) -> str:
    return {
        "held-out": f"on {num_held_out:,} training images held out, by accuracy; not trained on them afterwards",
        "published": "nothing is chosen: the published setting, trained on all training images",
        "test": "ON THE TEST IMAGES, as in DINO's convention: an upper bound, not to be compared with numbers chosen otherwise",
    }[settings.select]
