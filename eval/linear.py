"""Linear classifiers on a run's frozen features: `python -m ssl_pretrain.eval.linear RUN`."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssl_pretrain import rng
from ssl_pretrain.distributed import process_group
from ssl_pretrain.eval import results, runs
from ssl_pretrain.eval.frozen import (
    evaluation_split,
    features,
    few_labels,
    linear_heads,
    published_linear,
    shards,
)
from ssl_pretrain.eval.frozen.linear_heads import Classifiers
from ssl_pretrain.eval.protocols import LINEAR
from ssl_pretrain.eval.results import Row
from ssl_pretrain.eval.runs import Run
from ssl_pretrain.schema import COUNT, NOT_NEGATIVE, POSITIVE

LEARNING_RATES = (0.0001, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
WEIGHT_DECAYS = (0.0, 1e-6)  # DINO's and MoCo's; SimCLR's
MOMENTUM = 0.9  # Nesterov's
BATCH_SIZE = 256
HELP = f"""Accuracy of linear classifiers on a run's frozen features, beside raw pixels and the untrained network.

--protocol cached, the default: each image is embedded once. {len(LEARNING_RATES) * len(WEIGHT_DECAYS)} classifiers, one for each learning
rate and weight decay, are trained together on nine tenths of the training images; the best on the last tenth names the two,
and one classifier trained with them on all training images is tested, once. Few labels: see --labels-per-class.

--protocol {" | ".join(LINEAR)}: the published ones, on random crops and flips of the training images, which are embedded anew in
every epoch. Rates around the published one are trained in the same pass; the table has the published setting's accuracy and
that of the one chosen on held-out training images.

The numbers and their protocol are printed and kept in RUN/eval/linear.json or linear_PROTOCOL.json, all settings tried in
..._grid.json.

    python -m ssl_pretrain.eval.linear runs/demo
    python -m ssl_pretrain.eval.linear runs/demo --labels-per-class 1 5     # and with 1 and with 5 labels of each class
    python -m ssl_pretrain.eval.linear runs/demo --protocol simclr --epochs 10
    torchrun --nproc-per-node 8 -m ssl_pretrain.eval.linear runs/imagenet --protocol moco --rows random pretrained
    python -m ssl_pretrain.eval.linear runs/imagenet --protocol dino --select test     # DINO's convention: chosen on the test images
    python -m ssl_pretrain.eval.linear runs/demo data.root=/new/place       # the images have moved"""


def main(arguments: list[str]) -> None:
    parser = runs.parser("ssl_pretrain.eval.linear", HELP)
    parser.add_argument(
        "--protocol",
        choices=["cached", *LINEAR],
        default="cached",
        help="see above (default: cached)",
    )
    parser.add_argument(
        "--epochs", type=COUNT, help="passes over the images (default: 50, or the protocol's)"
    )
    few = "cached: and with N labels of each class, by logistic regression: mean over 10 draws"
    parser.add_argument(
        "--labels-per-class", type=COUNT, nargs="*", default=[], metavar="N", help=few
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=features.ROWS,
        help="what is judged (default: all; published protocols: pretrained)",
    )
    lrs = "a published protocol's: learning rates to try, at a batch of 256 (default: the published one times 0.1, 0.3, 1, 3, 10)"
    parser.add_argument("--lrs", type=POSITIVE, nargs="+", metavar="LR", help=lrs)
    decays = "a published protocol's: weight decays to try (default: the published one and 0)"
    parser.add_argument("--weight-decays", type=NOT_NEGATIVE, nargs="+", metavar="WD", help=decays)
    parser.add_argument(
        "--batch-size",
        type=COUNT,
        help="a published protocol's: images a step, over all ranks (default: the published one)",
    )
    feature = "a published protocol's: pooled output, a ViT's last four class tokens, or class token and mean patch"
    parser.add_argument("--feature", choices=["pooled", "last4", "cls_mean"], help=feature)
    select = "a published protocol's: choose on held-out training images, or train on all and choose nothing, or on the test images"
    parser.add_argument(
        "--select",
        choices=published_linear.SELECT,
        default="held-out",
        help=f"{select} (DINO's convention)",
    )
    options = parser.parse_intermixed_args(arguments)
    with shards.ranks(options.device) as device:
        run = runs.load_run(options.run, options.checkpoint, options.overrides, device)
        if options.protocol == "cached":
            _refuse(
                options, ["lrs", "weight_decays", "batch_size", "feature"], "a published --protocol"
            )
            epochs = 50 if options.epochs is None else options.epochs
            result = evaluate(run, epochs, options.labels_per_class, options.rows or features.ROWS)
        else:
            _refuse(options, ["labels_per_class"], "--protocol cached")
            settings = published_linear.Settings(
                options.protocol,
                options.lrs,
                options.weight_decays,
                options.epochs,
                options.batch_size,
                options.feature,
                options.select,
            )
            result = published_linear.evaluate(run, settings, options.rows or ["pretrained"])
        if process_group.is_main():
            grid = next(
                found
                for found in results.load(run.path)
                if found["name"] == f"{result['name']}_grid"
            )
            kept = run.path / "eval" / result["name"]
            print(
                f"\n{results.text(grid)}\n\n{results.text(result)}\n\n{result['seconds']:.0f} s; kept in {kept}.json"
            )


def _refuse(options: Any, names: list[str], of: str) -> None:
    """An option that would be passed over in silence."""
    for name in names:
        if getattr(options, name):
            raise ValueError(
                f"--{name.replace('_', '-')} is of {of}; --protocol {options.protocol} does not take it"
            )
    if of != "--protocol cached" and options.select != "held-out":
        raise ValueError(
            f"--select {options.select} is of {of}; --protocol cached chooses on held-out training images"
        )


def evaluate(
    run: Run,
    epochs: int = 50,
    labels_per_class: list[int] | None = None,
    rows: Sequence[str] = features.ROWS,
) -> dict[str, Any]:
    """Accuracy in percent of raw pixels, the random backbone and the pretrained one; see HELP. Kept in RUN/eval/linear.json.

    Raises:
        ValueError: the images have no labels, or a class has too few.
    """
    began = time.monotonic()
    if epochs < 1:
        raise ValueError(f"epochs: {epochs} trains nothing; give at least 1")
    train, test = evaluation_split.labelled_parts(run, "the linear evaluation")
    few = {
        number: few_labels.draws(train.labels, number, train.classes)
        for number in labels_per_class or []
    }
    own_train, own_test = shards.share(train), shards.share(test)
    table, grid = [], []
    for judged in features.judged(run, train, rows):
        train_features, train_labels = shards.embedded(judged.embed, train, own_train)
        test_features, test_labels = shards.embedded(judged.embed, test, own_test)
        standardize = Standardize.of(train_features)
        train_features, test_features = standardize(train_features), standardize(test_features)
        choice = choose(train_features, train_labels, len(train.classes), epochs)
        weights = train_heads(
            train_features,
            train_labels,
            len(train.classes),
            [choice.lr],
            [choice.weight_decay],
            epochs,
        )
        reached = 100 * linear_heads.accuracies(weights, test_features, test_labels).item()
        row = Row(judged.name, {"all labels": reached}, notes={"all labels": str(choice)})
        for number, drawn in few.items():
            column = f"{number} per class"
            row.metrics[column], row.spread[column] = few_labels.accuracy(
                train_features, train_labels, test_features, test_labels, drawn
            )
        results.say(
            f"{judged.name}: "
            + ", ".join(f"{column} {value:.1f} %" for column, value in row.metrics.items())
        )
        table.append(row)
        grid.append(Row(judged.name, choice.tried))
    protocol = {
        **evaluation_split.protocol(run, train, test, random="random" in rows),
        "normalization": "every feature to mean 0, deviation 1 over the training images; raw pixels too",
        "classifier": f"linear, SGD with Nesterov momentum {MOMENTUM}, batch {BATCH_SIZE}, {epochs} epochs, cosine to 0, from zero",
        "selection": f"learning rate of {_listed(LEARNING_RATES)}, weight decay of {_listed(WEIGHT_DECAYS)}, by accuracy on a tenth of the"
        " training images held out; then trained on all of them",
        **({"few labels": few_labels.PROTOCOL} if few else {}),
    }
    tried = {
        **protocol,
        "accuracy": "of the held-out tenth of the training images, by learning rate (lr) and weight decay (wd)",
    }
    seconds = time.monotonic() - began
    results.save(run.path, "linear_grid", tried, grid, run.about(), seconds)
    return results.save(
        run.path, "linear", protocol, results.with_better_random(table), run.about(), seconds
    )


@dataclass
class Standardize:
    """Every feature to mean 0 and deviation 1 over the training images."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, train_features: Tensor) -> Standardize:
        std, mean = torch.std_mean(train_features, dim=0, correction=0)
        return cls(
            mean, torch.where(std > 1e-6 * std.max().clamp(min=1e-30), std, torch.inf)
        )  # a constant feature becomes 0

    def __call__(self, found: Tensor) -> Tensor:
        return (found - self.mean) / self.std


@dataclass
class Choice:
    lr: float
    weight_decay: float
    held_out_accuracy: float
    tried: dict[str, float]  # percent of the held-out images, of every setting

    def __str__(self) -> str:
        edge = (
            ", at the edge of those tried"
            if self.lr in (LEARNING_RATES[0], LEARNING_RATES[-1])
            else ""
        )
        reached = f"{100 * self.held_out_accuracy:.1f} % of held-out training images"
        return f"learning rate {self.lr:g}{edge}, weight decay {self.weight_decay:g} ({reached})"


def _listed(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def choose(train_features: Tensor, train_labels: Tensor, num_classes: int, epochs: int) -> Choice:
    """The learning rate and weight decay that do best on held-out training images: by accuracy, then by cross entropy."""
    kept, held_out = evaluation_split.hold_out(len(train_features))
    grid = [(lr, weight_decay) for lr in LEARNING_RATES for weight_decay in WEIGHT_DECAYS]
    lrs, decays = [lr for lr, _ in grid], [weight_decay for _, weight_decay in grid]
    weights = train_heads(
        train_features[kept], train_labels[kept], num_classes, lrs, decays, epochs
    )
    reached = linear_heads.accuracies(weights, train_features[held_out], train_labels[held_out])
    head = linear_heads.best(
        reached,
        linear_heads.cross_entropies(weights, train_features[held_out], train_labels[held_out]),
    )
    tried = {setting(*each): 100 * accuracy for each, accuracy in zip(grid, reached.tolist())}
    return Choice(*grid[head], reached[head].item(), tried)


def setting(lr: float, weight_decay: float) -> str:
    return f"lr {lr:g}, wd {weight_decay:g}"


def train_heads(
    train_features: Tensor,
    train_labels: Tensor,
    num_classes: int,
    lrs: list[float],
    weight_decays: list[float],
    epochs: int,
) -> Tensor:
    """Linear classifiers trained side by side on the same batches, each with its own learning rate and weight decay.

    Each is what torch.optim.SGD(nesterov=True) with a cosine schedule makes of a linear layer from zero. All ranks hold all
    features, and each takes its share of every batch.

    Returns:
        Weights (num_heads, dim + 1, num_classes); the last row is the bias.
    """
    n, dim = train_features.shape
    heads = Classifiers(
        dim, num_classes, lrs, weight_decays, like=train_features, momentum=MOMENTUM
    )
    steps_per_epoch = -(-n // BATCH_SIZE)
    for epoch in range(epochs):
        order = torch.from_numpy(rng.permutation(0, epoch, n)).to(train_features.device)
        for step, batch in enumerate(order.split(BATCH_SIZE)):
            progress = (epoch + step / steps_per_epoch) / epochs
            own = batch[process_group.rank() :: process_group.world_size()]
            heads.step(
                train_features[own],
                train_labels[own],
                0.5 * (1 + math.cos(math.pi * progress)),
                len(batch),
            )
    return heads.weights.transpose(0, 1)


if __name__ == "__main__":
    results.command(main, "ssl_pretrain.eval.linear")
