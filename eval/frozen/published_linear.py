"""Linear evaluation by published protocols, which embed new crops of the images every epoch."""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ssl_pretrain.data.image_source import Source
from ssl_pretrain.eval import results
from ssl_pretrain.eval.frozen import features, linear_heads, named_features
from ssl_pretrain.eval.frozen.evaluation_split import (
    EvaluationSplit,
    describe_splits,
    hold_out,
    labeled_splits,
)
from ssl_pretrain.eval.frozen.named_features import Feature
from ssl_pretrain.eval.protocols import LinearOptions, LinearProtocol, describe_linear_training
from ssl_pretrain.eval.runs import Run
from ssl_pretrain.eval.training_views import (
    build_train_loader,
    build_train_view,
    describe_train_view,
)
from ssl_pretrain.views.recipe import Crop

# BYOL holds out this many images (Grill et al., NeurIPS 2020, arXiv:2006.07733). Smaller data sets
# hold out a tenth of their images.
MAX_HELD_OUT = 10_000
# The result file's description of each value of --select.
SELECTIONS: dict[str, str] = {
    "held-out": "by accuracy on {num_held_out:,} held-out training images, which the final heads"
    " are not trained on",
    "published": "no selection; the published setting is trained on all training images",
    "test": "ON THE TEST IMAGES, as in DINO's convention; this is an upper bound and not comparable"
    " with other selections",
}


class ProbedNetwork:
    """A frozen network and its linear heads. Their results are one row of the table.

    Args:
        name: Name of the row.
        feature: Feature of the network that the heads classify.
        grid: Learning rate at a batch of 256 and weight decay of each head.
        protocol: Training protocol.
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
        self.name, self.feature, self.grid = name, feature, grid
        like, dim = torch.empty(0, device=device), feature.feature_dim
        self.heads = linear_heads.LinearHeads(
            dim,
            num_classes,
            [lr * protocol.batch_size / 256 for lr, _ in grid],
            [weight_decay for _, weight_decay in grid],
            like=like,
            nesterov=protocol.nesterov,
            momentum=protocol.momentum,
            init=protocol.init,
            init_std=protocol.init_std,
            affine=protocol.normalizes_features,
            larc_coefficient=protocol.larc_coefficient,
        )
        self.norm = linear_heads.FeatureNorm(dim, like) if protocol.normalizes_features else None

    def step(self, values: Tensor, labels: Tensor, lr_factor: float) -> None:
        """Train the heads on features, with their learning rates multiplied by `lr_factor`."""
        if self.norm:
            values = self.norm.normalize_batch(values)
        self.heads.step(values, labels, lr_factor)

    def scores(self, split: EvaluationSplit) -> tuple[Tensor, Tensor]:
        """Return each head's accuracy in [0, 1] and cross entropy, the same on all ranks."""
        values, labels = features.embed_split(partial(features.extract, self.feature), split)
        values = self.norm(values) if self.norm else values
        return linear_heads.scores(self.heads.weights.transpose(0, 1), values, labels)


def evaluate(
    run: Run, options: LinearOptions, rows: Sequence[str] = ("pretrained",)
) -> dict[str, Any]:
    """Measure the accuracy in percent by a published protocol and save it.

    The result is saved to RUN/eval/linear_<protocol>.json, and the accuracies of all settings to
    RUN/eval/linear_<protocol>_grid.json.

    Args:
        run: Run to evaluate.
        options: The protocol and any changes to it.
        rows: Networks to evaluate: "random", "pretrained" or both.

    Returns:
        The content of the result file.

    Raises:
        ValueError: If the images have no labels, an option does not fit them, or `rows` includes
            "raw".
    """
    start = time.monotonic()
    if "raw" in rows:
        raise ValueError(
            "--rows raw: the published protocols only evaluate networks; leave it out or give"
            " --protocol cached"
        )
    published_protocol = options.published_protocol
    evaluation = replace(run.config.evaluation, interpolation=published_protocol.test_interpolation)
    run = replace(run, config=replace(run.config, evaluation=evaluation))
    train, test = labeled_splits(run, "the linear evaluation")
    source, selection_split = train.source, test
    train_rows, held_out_rows = hold_out(len(train), min(0.1, MAX_HELD_OUT / len(train)))
    if options.selection == "held-out":
        source, selection_split = source.take(train_rows), train.subset(held_out_rows)
    protocol, grid = options.adapt_protocol(len(source)), options.grid()
    default_feature = named_features.POOLED
    if protocol.uses_dino_feature:
        default_feature = named_features.dino_feature_name(run.backbone)
    feature = options.feature or default_feature
    networks = [
        ProbedNetwork(
            name,
            Feature(backbone, feature),
            grid,
            protocol,
            len(train.classes),
            run.device,
        )
        for name, backbone in features.networks(run, train, rows)
    ]
    view = build_train_view(run, protocol.interpolation, protocol.crop_sampler, protocol.antialias)
    train_heads(networks, run, source, view, protocol)
    table, grid_table = [], []
    for network in networks:
        row, grid_rows = _measure(network, options, selection_split, test)
        results.print_progress(row.summary())
        table.append(row)
        grid_table += grid_rows
    entries = {
        **describe_splits(run, train, test, has_random_row="random" in rows, feature=feature),
        "source": published_protocol.source,
        "classifier": describe_linear_training(protocol, published_protocol, len(source)),
        "views": describe_train_view(view),
        "selection": SELECTIONS[options.selection].format(num_held_out=len(held_out_rows)),
    }
    grid_entries = entries | {
        "accuracy": "one per learning rate (lr, at a batch of 256) and weight decay (wd), all"
        " trained in the same pass"
    }
    suffix = "" if feature == default_feature else f"_{feature}"
    suffix += "_test_selected" if options.selection == "test" else ""
    name, seconds = f"linear_{options.protocol_name}{suffix}", time.monotonic() - start
    measure = results.measure_of_feature(results.ACCURACY, feature)
    save = partial(results.save, run.path, measure=measure)
    save(f"{name}_grid", grid_entries, grid_table, run.provenance(), seconds)
    table = results.with_better_random_row(table)
    return save(name, entries, table, run.provenance(), seconds)


@torch.no_grad()
def train_heads(
    networks: list[ProbedNetwork], run: Run, source: Source, view: Crop, protocol: LinearProtocol
) -> None:
    """Train the heads of all networks on the same batches."""
    with build_train_loader(run, source, view, protocol.batch_size) as loader:
        steps_per_epoch = loader.steps_per_epoch
        for step, batch in zip(range(protocol.epochs * steps_per_epoch), loader.iterate_from(0)):
            views = batch.views[0].contiguous(memory_format=torch.channels_last)
            for network in networks:
                values = features.compute(run, network.feature, views)
                network.step(values, batch.labels, protocol.lr_factor(step / steps_per_epoch))
            if (step + 1) % steps_per_epoch == 0:
                epoch = (step + 1) // steps_per_epoch
                results.print_progress(f"epoch {epoch} of {protocol.epochs}")


def _measure(
    network: ProbedNetwork,
    options: LinearOptions,
    selection_split: EvaluationSplit,
    test: EvaluationSplit,
) -> tuple[results.Row, list[results.Row]]:
    """Return the network's row of the table and its rows of the grid of all settings."""
    grid = network.grid
    names = [linear_heads.setting_name(*setting) for setting in grid]
    percentages = (100 * network.scores(test)[0]).tolist()
    row = results.Row(network.name, {})
    grid_rows = [results.Row(f"{network.name}, test images", dict(zip(names, percentages)))]
    published_setting = options.published_protocol.base_lr, options.published_protocol.weight_decay
    if published_setting in grid:
        row.metrics["published setting"] = percentages[grid.index(published_setting)]
    if options.selection == "published":
        return row, grid_rows
    accuracies, losses = network.scores(selection_split)
    best = linear_heads.best_setting(accuracies.tolist(), losses.tolist())
    column = "chosen on held-out images"
    if options.selection == "test":
        column = "chosen on the test images"
    else:
        held_out = dict(zip(names, (100 * accuracies).tolist()))
        grid_rows.insert(0, results.Row(f"{network.name}, held-out images", held_out))
    lrs = {lr for lr, _ in grid}
    is_at_edge = len(lrs) > 1 and grid[best][0] in (min(lrs), max(lrs))
    row.metrics[column] = percentages[best]
    row.notes[column] = names[best] + (", at the edge of the grid" if is_at_edge else "")
    return row, grid_rows
