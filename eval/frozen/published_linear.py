"""Linear evaluation by published protocols, which embed new crops of the images every epoch."""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ssl_pretrain.data.image_source import Source
from ssl_pretrain.eval import results
from ssl_pretrain.eval.frozen import features, linear_heads, named_features, published
from ssl_pretrain.eval.frozen.evaluation_split import (
    EvaluationSplit,
    describe_splits,
    hold_out,
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
            affine=protocol.normalizes_features and protocol.norm_is_affine,
            optimizer=protocol.optimizer,
            trust_coefficient=protocol.trust_coefficient,
        )
        self.norm = None
        if protocol.normalizes_features:
            self.norm = linear_heads.FeatureNorm(dim, like, protocol.norm_eps)

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
    published_protocol = options.published_protocol
    run, train, test = published.open_splits(
        run, rows, published_protocol.test_interpolation, "the linear evaluation"
    )
    source, selection_split = train.source, test
    train_rows, held_out_rows = hold_out(len(train), min(0.1, MAX_HELD_OUT / len(train)))
    if options.selection == "held-out":
        source, selection_split = source.take(train_rows), train.subset(held_out_rows)
    protocol, grid = options.adapt_protocol(len(source)), options.grid()
    default_feature = named_features.published_feature_name(protocol.vit_feature, run.backbone)
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
        "selection": published.SELECTIONS[options.selection].format(
            num_held_out=len(held_out_rows)
        ),
    }
    grid_entries = entries | {
        "accuracy": "one per learning rate (lr, at a batch of 256) and weight decay (wd), all"
        " trained in the same pass"
    }
    suffix = "" if feature == default_feature else f"_{feature}"
    suffix += "_test_selected" if options.selection == "test" else ""
    return results.save_with_grid(
        run.path,
        f"linear_{options.protocol_name}{suffix}",
        (entries, table),
        (grid_entries, grid_table),
        run.provenance(),
        time.monotonic() - start,
        results.measure_of_feature(results.ACCURACY, feature),
    )


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

    def score(split: EvaluationSplit) -> published.Scores:
        accuracies, losses = network.scores(split)
        return published.Scores(accuracies.tolist(), losses.tolist(), (100 * accuracies).tolist())

    grid = network.grid
    setting = options.published_protocol.base_lr, options.published_protocol.weight_decay
    return published.build_rows(
        network.name,
        [linear_heads.setting_name(*setting) for setting in grid],
        [lr for lr, _ in grid],
        score(test),
        selection=options.selection,
        score_held_out=partial(score, selection_split),
        published=grid.index(setting) if setting in grid else None,
    )
