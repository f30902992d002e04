"""Attentive probes by published protocols, which embed new random views in every step."""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from ssl_pretrain.data.image_source import Source
from ssl_pretrain.eval import results, strong_views
from ssl_pretrain.eval.attentive_protocols import (
    AttentiveOptions,
    AttentiveProtocol,
    describe_attentive_training,
)
from ssl_pretrain.eval.frozen import features, patch_tokens, published
from ssl_pretrain.eval.frozen.attentive_probes import ProbeShape, max_num_heads
from ssl_pretrain.eval.frozen.evaluation_split import (
    EvaluationSplit,
    describe_splits,
    hold_out,
)
from ssl_pretrain.eval.frozen.probe_training import ProbeGrid
from ssl_pretrain.eval.runs import Run
from ssl_pretrain.eval.training_views import (
    build_train_loader,
    build_train_view,
    describe_train_view,
)
from ssl_pretrain.models.tokens import is_transformer
from ssl_pretrain.views.recipe import Crop


class ProbedTokens:
    """A frozen network and its probes. Their results are one row of the table."""

    def __init__(self, name: str, token_function: patch_tokens.TokenSequence, shape: ProbeShape):
        self.name, self.token_function, self.shape = name, token_function, shape
        self.grid: ProbeGrid | None = None  # built when the number of steps is known

    def scores(self, split: EvaluationSplit) -> published.Scores:
        """Return the results of each probe on a split, the same on all ranks."""
        assert self.grid is not None, "the probes were not trained"
        accuracies, losses = self.grid.score_split(split, self.token_function)
        return published.Scores(accuracies, losses, [100 * accuracy for accuracy in accuracies])


def evaluate(
    run: Run, options: AttentiveOptions, rows: Sequence[str] = ("pretrained",)
) -> dict[str, Any]:
    """Measure the accuracy in percent by a published protocol and save it.

    The result is saved to RUN/eval/attentive_<protocol>.json, and the accuracies of all settings
    to RUN/eval/attentive_<protocol>_grid.json.

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
        run, rows, published_protocol.test_interpolation, "the attentive evaluation"
    )
    source, selection_split = train.source, test
    train_rows, held_out_rows = hold_out(len(train))
    selection = options.choose_selection(len(options.adapt_protocol(len(train)).settings))
    if selection == "held-out":
        source, selection_split = source.take(train_rows), train.subset(held_out_rows)
    protocol = options.adapt_protocol(len(source))
    patch_tokens.TokenSequence(run.backbone, options.feature)  # raises before any work
    networks = []
    for name, backbone in features.networks(run, train, rows):
        sequence = patch_tokens.TokenSequence(backbone, options.feature)
        shape = build_shape(backbone, sequence.dim, protocol, len(train.classes))
        networks.append(ProbedTokens(name, sequence, shape))
    view = build_train_view(run, protocol.interpolation)
    train_probes(networks, run, source, view, protocol)
    table, grid_table = [], []
    for network in networks:
        row, grid_rows = _measure(network, selection, selection_split, test)
        results.print_progress(row.summary())
        table.append(row)
        grid_table += grid_rows
    num_heads = networks[-1].shape.num_heads
    entries = {
        **describe_splits(run, train, test, has_random_row="random" in rows),
        "feature": networks[-1].token_function.describe(run.image_size),
        "source": published_protocol.source,
        "classifier": describe_attentive_training(
            protocol, published_protocol, num_heads, len(source)
        ),
        "views": describe_train_view(view) + _describe_augmentation(run, protocol),
        "selection": published.SELECTIONS[selection].format(num_held_out=len(held_out_rows)),
    }
    grid_entries = entries | {
        "accuracy": "one per learning rate (lr) and weight decay (wd), all trained in the same pass"
    }
    suffix = "_test_selected" if selection == "test" else ""
    return results.save_with_grid(
        run.path,
        f"attentive_{options.protocol_name}{options.suffix}{suffix}",
        (entries, table),
        (grid_entries, grid_table),
        run.provenance(),
        time.monotonic() - start,
        options.measure,
    )


def _describe_augmentation(run: Run, protocol: AttentiveProtocol) -> str:
    """Describe what `train_probes` does to the training views."""
    if not protocol.augmented:
        return ""
    erasing = "a rectangle erased with probability 0.25"
    num_channels = run.config.views.num_channels
    if num_channels == 3:
        return f", AutoAugment, {erasing}"
    return (
        f", {erasing}; without AutoAugment, because it needs 3 channels and the images have"
        f" {num_channels}"
    )


def build_shape(
    backbone: Any, dim: int, protocol: AttentiveProtocol, num_classes: int
) -> ProbeShape:
    """Return the architecture of the protocol's probes for tokens of width `dim`.

    The probes of V-JEPA have as many heads as a vision transformer's attention. If no number of
    heads is known, or it does not divide the width, heads are at least 64 wide.
    """
    num_heads = protocol.num_heads
    if protocol.kind == "jepa" and not num_heads:
        num_heads = _num_backbone_heads(backbone.model)
    if not num_heads or dim % num_heads:
        num_heads = max_num_heads(dim)
    return ProbeShape(protocol.kind, dim, num_classes, num_heads, protocol.num_blocks)


def _num_backbone_heads(model: Any) -> int:
    """Return the heads of a vision transformer's attention, or 0 for other networks."""
    if not is_transformer(model):  # the `blocks` of an EfficientNet are convolutions
        return 0
    # Blocks with parallel branches have no module `attn`.
    return int(getattr(getattr(model.blocks[0], "attn", None), "num_heads", 0))


def train_probes(
    networks: list[ProbedTokens],
    run: Run,
    source: Source,
    view: Crop,
    protocol: AttentiveProtocol,
) -> None:
    """Train the probes of all networks on the same batches."""
    augment = None
    if protocol.augmented and run.config.views.num_channels == 3:
        augment = partial(strong_views.auto_augment, mean=tuple(run.config.views.mean))
    with build_train_loader(run, source, view, protocol.batch_size, augment) as loader:
        steps_per_epoch = loader.steps_per_epoch
        num_steps = protocol.num_steps or protocol.epochs * steps_per_epoch
        for network in networks:
            like = torch.empty(0, device=run.device)
            network.grid = ProbeGrid(network.shape, protocol.settings, protocol, num_steps, like)
        for step, batch in zip(range(num_steps), loader.iterate_from(0)):
            views = batch.views[0].contiguous(memory_format=torch.channels_last)
            if protocol.augmented:
                strong_views.erase(views, step // steps_per_epoch, batch.indices)
            for network in networks:
                tokens = features.compute(run, network.token_function, views)
                assert network.grid is not None
                network.grid.step(tokens, batch.labels, step, protocol.batch_size)
            if (step + 1) % max(1, num_steps // 10) == 0:
                results.print_progress(f"step {step + 1:,} of {num_steps:,}")


def _measure(
    network: ProbedTokens,
    selection: str,
    selection_split: EvaluationSplit,
    test: EvaluationSplit,
) -> tuple[results.Row, list[results.Row]]:
    """Return the network's result row, and rows with the accuracies of all settings."""
    grid = network.grid
    assert grid is not None, "the probes were not trained"
    is_published = selection == "published"
    row, grid_rows = published.build_rows(
        network.name,
        [setting.name for setting in grid.settings],
        [setting.lr for setting in grid.settings],
        network.scores(test),
        selection=selection,
        score_held_out=partial(network.scores, selection_split),
        published=0 if is_published else None,
    )
    if is_published:
        row.notes["published setting"] = grid.settings[0].name
    return row, grid_rows
