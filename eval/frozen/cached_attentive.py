"""Attentive probes on tokens that are computed once. Held-out images select the setting."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ssl_pretrain import rng
from ssl_pretrain.distributed import process_group
from ssl_pretrain.eval import results
from ssl_pretrain.eval.attentive_protocols import (
    AttentiveOptions,
    AttentiveProtocol,
    ProbeSetting,
    describe_attentive_training,
)
from ssl_pretrain.eval.frozen import features, linear_heads, patch_tokens
from ssl_pretrain.eval.frozen.attentive_probes import ProbeShape, max_num_heads
from ssl_pretrain.eval.frozen.evaluation_split import (
    EvaluationSplit,
    describe_splits,
    hold_out,
    labeled_splits,
)
from ssl_pretrain.eval.frozen.probe_training import ProbeGrid
from ssl_pretrain.eval.runs import Run


def evaluate(
    run: Run, options: AttentiveOptions, rows: Sequence[str] = features.ROWS
) -> dict[str, Any]:
    """Measure the accuracy in percent of each row's tokens and save it to RUN/eval/attentive.json.

    Args:
        run: Run to evaluate.
        options: Changes to the protocol.
        rows: Names of the tokens to evaluate, from `features.ROWS`.

    Returns:
        The content of the result file.

    Raises:
        ValueError: If the images have no labels, or the tokens do not fit in memory.
    """
    start, rows = time.monotonic(), tuple(rows)
    train, test = labeled_splits(run, "the attentive evaluation")
    patch_tokens.check_memory(run, len(train), len(test), rows, options.feature)
    protocol = options.adapt_protocol(len(train))
    sequence = patch_tokens.TokenSequence(run.backbone, options.feature)
    table, grid = [], []
    for name, embed in patch_tokens.embedders(run, train, rows, options.feature):
        row, grid_row, num_heads = _measure(name, embed, train, test, protocol)
        results.print_progress(row.summary())
        table.append(row)
        grid.append(grid_row)
    entries = {
        **describe_splits(run, train, test, has_random_row="random" in rows),
        "feature": sequence.describe(run.image_size),
        "source": protocol.source,
        "normalization": "every number of a token is scaled to mean 0 and standard deviation 1 over"
        " all tokens of the training images",
        "classifier": describe_attentive_training(
            protocol, options.published_protocol, num_heads, len(train)
        ),
        "selection": "learning rate and weight decay by accuracy on a held-out tenth of the"
        " training images; then trained on all of them",
    }
    grid_entries = entries | {
        "accuracy": "on the held-out tenth of the training images, by learning rate (lr) and weight"
        " decay (wd)"
    }
    return results.save_with_grid(
        run.path,
        f"attentive{options.suffix}",
        (entries, table),
        (grid_entries, grid),
        run.provenance(),
        time.monotonic() - start,
        options.measure,
    )


def _measure(
    name: str,
    embed: features.SplitEmbedder,
    train: EvaluationSplit,
    test: EvaluationSplit,
    protocol: AttentiveProtocol,
) -> tuple[results.Row, results.Row, int]:
    """Return the result row, the accuracies of all settings, and the number of heads."""
    tokens, labels = features.embed_split(embed, train)
    test_tokens, test_labels = features.embed_split(embed, test)
    standardize_in_place(tokens, test_tokens)
    dim = tokens.shape[2]
    shape = ProbeShape(protocol.kind, dim, len(train.classes), max_num_heads(dim))
    train_rows, held_out_rows = (torch.from_numpy(rows) for rows in hold_out(len(tokens)))
    grid = train_probes(shape, tokens, labels, train_rows, protocol.settings, protocol)
    held_out = held_out_rows.to(tokens.device)
    accuracies, losses = grid.score_tokens(tokens[held_out], labels[held_out])
    best = linear_heads.best_setting(accuracies, losses)
    setting = protocol.settings[best]
    all_rows = torch.arange(len(tokens))
    probe = train_probes(shape, tokens, labels, all_rows, [setting], protocol)
    column = "all labels"
    row = results.Row(name, {column: 100 * probe.score_tokens(test_tokens, test_labels)[0][0]})
    edge = linear_heads.edge_note(setting.lr, [entry.lr for entry in protocol.settings])
    row.notes[column] = (
        f"{setting.name}{edge} ({100 * accuracies[best]:.1f} % of held-out training images)"
    )
    percentages = [100 * accuracy for accuracy in accuracies]
    names = [entry.name for entry in protocol.settings]
    return row, results.Row(name, dict(zip(names, percentages))), shape.num_heads


def standardize_in_place(train_tokens: Tensor, test_tokens: Tensor) -> None:
    """Scale each of the training tokens' `dim` numbers to mean 0 and standard deviation 1.

    The test tokens are scaled with the same constants. A number that is constant becomes 0.
    """
    std, mean = torch.std_mean(train_tokens, dim=(0, 1), correction=0)
    is_constant = std <= 1e-6 * std.max().clamp(min=1e-30)
    divisor = std.masked_fill(is_constant, torch.inf)
    for tokens in (train_tokens, test_tokens):
        tokens.sub_(mean).div_(divisor)


def train_probes(
    shape: ProbeShape,
    tokens: Tensor,
    labels: Tensor,
    rows: Tensor,
    settings: Sequence[ProbeSetting],
    protocol: AttentiveProtocol,
) -> ProbeGrid:
    """Train one probe per setting on the images `rows`, all on the same batches.

    Every rank has the tokens of all images and trains on its own images of every batch.
    """
    batch_size = min(protocol.batch_size, len(rows))
    steps_per_epoch = len(rows) // batch_size
    num_steps = protocol.num_steps or protocol.epochs * steps_per_epoch
    grid = ProbeGrid(shape, settings, protocol, num_steps, tokens)
    for step in range(num_steps):
        epoch, number = divmod(step, steps_per_epoch)
        order = torch.from_numpy(rng.permutation(0, epoch, len(rows)))
        batch = rows[order[number * batch_size : (number + 1) * batch_size]]
        own = batch[process_group.rank() :: process_group.world_size()].to(tokens.device)
        grid.step(tokens[own], labels[own], step, len(batch))
    return grid
