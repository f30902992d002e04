"""Linear classifiers on a run's frozen features: `python -m eval.linear RUN`."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eval import features, few_labels, parts, results, runs
from eval.results import Row
from eval.runs import Run
from ssl_pretrain import draws

LEARNING_RATES = (0.0001, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
WEIGHT_DECAYS = (0.0, 1e-6)  # DINO's and MoCo's; SimCLR's
MOMENTUM = 0.9  # Nesterov's
BATCH_SIZE = 256
HELP = f"""Accuracy of linear classifiers on a run's frozen features, beside raw pixels and the untrained network.

All labels: {len(LEARNING_RATES) * len(WEIGHT_DECAYS)} classifiers, one for each learning rate and weight decay, are trained
together on nine tenths of the training images; the best on the last tenth names the two, and one classifier trained with
them on all training images is tested, once. Few labels: see --labels-per-class. The numbers and their protocol are
printed and kept in RUN/eval/linear.json.

    python -m eval.linear runs/demo
    python -m eval.linear runs/demo --labels-per-class 1 5     # and with 1 and with 5 labels of each class
    python -m eval.linear runs/demo data.root=/new/place       # the images have moved"""


def main(arguments: list[str]) -> None:
    parser = runs.parser("eval.linear", HELP)
    parser.add_argument("--epochs", type=int, default=50, help="passes over the features (default: 50)")
    few = "and with N labels of each class, by logistic regression: mean over 10 draws"
    parser.add_argument("--labels-per-class", type=int, nargs="*", default=[], metavar="N", help=few)
    options = parser.parse_intermixed_args(arguments)
    run = runs.load_run(options.run, options.checkpoint, options.overrides, options.device)
    result = evaluate(run, options.epochs, options.labels_per_class)
    print(f"\n{results.text(result)}\n\n{result['seconds']:.0f} s; kept in {run.path / 'eval/linear.json'}")


def evaluate(run: Run, epochs: int = 50, labels_per_class: list[int] | None = None) -> dict[str, Any]:
    """Accuracy in percent of raw pixels, the random backbone and the pretrained one; see HELP. Kept in RUN/eval/linear.json.

    Raises:
        ValueError: the images have no labels, or a class has too few.
    """
    began = time.monotonic()
    if epochs < 1:
        raise ValueError(f"epochs: {epochs} trains nothing; give at least 1")
    train, test = parts.labelled_parts(run, "the linear evaluation")
    few = {number: few_labels.draws(train.labels, number, train.classes) for number in labels_per_class or []}
    rows = []
    for judged in features.judged(run, train):
        train_features, train_labels = judged.embed(train)
        test_features, test_labels = judged.embed(test)
        standardize = Standardize.of(train_features)
        train_features, test_features = standardize(train_features), standardize(test_features)
        choice = choose(train_features, train_labels, len(train.classes), epochs)
        weights = train_heads(train_features, train_labels, len(train.classes), [choice.lr], [choice.weight_decay], epochs)
        reached = 100 * accuracies(weights, test_features, test_labels).item()
        row = Row(judged.name, {"all labels": reached}, notes={"all labels": str(choice)})
        for number, drawn in few.items():
            column = f"{number} per class"
            row.metrics[column], row.spread[column] = few_labels.accuracy(train_features, train_labels, test_features, test_labels, drawn)
        results.say(f"{judged.name}: " + ", ".join(f"{column} {value:.1f} %" for column, value in row.metrics.items()))
        rows.append(row)
    protocol = {
        **parts.protocol(run, train, test),
        "normalization": "every feature to mean 0, deviation 1 over the training images; raw pixels too",
        "classifier": f"linear, SGD with Nesterov momentum {MOMENTUM}, batch {BATCH_SIZE}, {epochs} epochs, cosine to 0, from zero",
        "selection": f"learning rate of {_listed(LEARNING_RATES)}, weight decay of {_listed(WEIGHT_DECAYS)}, by accuracy on a tenth of the"
        " training images held out; then trained on all of them",
        **({"few labels": few_labels.PROTOCOL} if few else {}),
    }
    return results.save(run.path, "linear", protocol, results.with_better_random(rows), run.about(), time.monotonic() - began)


@dataclass
class Standardize:
    """Every feature to mean 0 and deviation 1 over the training images."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, train_features: Tensor) -> Standardize:
        std, mean = torch.std_mean(train_features, dim=0, correction=0)
        return cls(mean, torch.where(std > 1e-6 * std.max().clamp(min=1e-30), std, torch.inf))  # a constant feature becomes 0

    def __call__(self, found: Tensor) -> Tensor:
        return (found - self.mean) / self.std


@dataclass
class Choice:
    lr: float
    weight_decay: float
    held_out_accuracy: float

    def __str__(self) -> str:
        edge = ", at the edge of those tried" if self.lr in (LEARNING_RATES[0], LEARNING_RATES[-1]) else ""
        reached = f"{100 * self.held_out_accuracy:.1f} % of held-out training images"
        return f"learning rate {self.lr:g}{edge}, weight decay {self.weight_decay:g} ({reached})"


def _listed(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def choose(train_features: Tensor, train_labels: Tensor, num_classes: int, epochs: int) -> Choice:
    """The learning rate and weight decay that do best on held-out training images: by accuracy, then by cross entropy."""
    kept, held_out = parts.hold_out(len(train_features))
    grid = [(lr, weight_decay) for lr in LEARNING_RATES for weight_decay in WEIGHT_DECAYS]
    lrs, decays = [lr for lr, _ in grid], [weight_decay for _, weight_decay in grid]
    weights = train_heads(train_features[kept], train_labels[kept], num_classes, lrs, decays, epochs)
    reached = accuracies(weights, train_features[held_out], train_labels[held_out])
    head = best(reached, cross_entropies(weights, train_features[held_out], train_labels[held_out]))
    return Choice(*grid[head], reached[head].item())


def best(reached: Tensor, losses: Tensor) -> int:
    """The head of the highest accuracy; among equals, of the lowest cross entropy, a diverged one last."""
    losses = losses.nan_to_num(nan=torch.inf)
    return max(range(len(reached)), key=lambda head: (reached[head].item(), -losses[head].item()))


def train_heads(
    train_features: Tensor, train_labels: Tensor, num_classes: int, lrs: list[float], weight_decays: list[float], epochs: int
) -> Tensor:
    """Linear classifiers trained side by side on the same batches, each with its own learning rate and weight decay.

    Each is what torch.optim.SGD(nesterov=True) with a cosine schedule makes of a linear layer from zero.

    Returns:
        Weights (num_heads, dim + 1, num_classes); the last row is the bias.
    """
    n, dim = train_features.shape
    heads = len(lrs)
    lr, decay = (train_features.new_tensor(values).view(1, heads, 1) for values in (lrs, weight_decays))
    weights = train_features.new_zeros(dim + 1, heads, num_classes)  # so that all logits are one matrix product
    momentum = torch.zeros_like(weights)
    steps_per_epoch = -(-n // BATCH_SIZE)
    for epoch in range(epochs):
        order = torch.from_numpy(draws.permutation(0, epoch, n)).to(train_features.device)
        for step, batch in enumerate(order.split(BATCH_SIZE)):
            progress = (epoch + step / steps_per_epoch) / epochs
            images = F.pad(train_features[batch], (0, 1), value=1.0)
            errors = logits(weights, images).softmax(dim=2) - F.one_hot(train_labels[batch], num_classes)[:, None]
            gradient = (images.T @ errors.flatten(1)).view_as(weights) / len(batch) + decay * weights
            momentum.mul_(MOMENTUM).add_(gradient)
            weights -= lr * (0.5 * (1 + math.cos(math.pi * progress))) * (gradient + MOMENTUM * momentum)
    return weights.transpose(0, 1)


def logits(weights: Tensor, images: Tensor) -> Tensor:
    """(n, heads, classes), of weights (dim + 1, heads, classes) and images (n, dim + 1)."""
    return (images @ weights.flatten(1)).view(len(images), *weights.shape[1:])


def accuracies(weights: Tensor, found: Tensor, labels: Tensor) -> Tensor:
    """Each head's accuracy in [0, 1], (num_heads,). `weights` as train_heads returns them."""
    predicted = logits(weights.transpose(0, 1), F.pad(found, (0, 1), value=1.0)).argmax(dim=2)
    return (predicted == labels[:, None]).double().mean(dim=0)


def cross_entropies(weights: Tensor, found: Tensor, labels: Tensor) -> Tensor:
    """Each head's mean cross entropy in nats, (num_heads,)."""
    scores = logits(weights.transpose(0, 1), F.pad(found, (0, 1), value=1.0))
    return -scores.log_softmax(dim=2).gather(2, labels[:, None, None].expand(-1, scores.shape[1], 1)).mean(dim=(0, 2))


if __name__ == "__main__":
    results.command(main, "eval.linear")
