"""Measure retrieval by frozen features, and list near-duplicates.

Each test image is a query that ranks all training images by cosine similarity. The relevant images
are those of the query's class. mAP is the mean average precision over the queries, and recall@n is
the share of queries with a relevant image among the first n. Raw pixels and a random backbone are
evaluated too. The result is printed and saved to RUN/eval/retrieval.json. Pairs of training or test
images whose cosine similarity is at least --duplicates are listed in RUN/eval/near_duplicates.csv,
which has at most the 1000 nearest pairs.

    python -m ssl_pretrain.eval.retrieval runs/demo
    python -m ssl_pretrain.eval.retrieval runs/demo --duplicates 0.999
"""

import csv
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_pretrain.eval import command_line, results
from ssl_pretrain.eval.frozen import features, named_features
from ssl_pretrain.eval.frozen.evaluation_split import (
    EvaluationSplit,
    describe_splits,
    labeled_splits,
)
from ssl_pretrain.eval.knn import NORMALIZATION
from ssl_pretrain.eval.runs import Run
from ssl_pretrain.monitoring import weighted_knn
from ssl_pretrain.schema import COSINE

RECALL_CUTOFFS = (1, 5, 10)
MAX_PAIRS = 1000
NUM_PRINTED_PAIRS = 10
ROUNDING_ERROR = 1e-6  # error of a cosine in float32
OPTIONS: dict[str, dict[str, Any]] = {
    "--duplicates": {
        "type": COSINE,
        "default": 0.995,
        "metavar": "COSINE",
        "help": "smallest cosine similarity of a listed pair (default: 0.995)",
    },
    **named_features.OPTION,
}

# Cosine similarity, and the positions a < b of two images among all training and test images.
Pair = tuple[float, int, int]


def main(arguments: list[str]) -> None:
    """Run the command-line interface."""
    command_line.evaluate_and_print(
        command_line.build_parser("ssl_pretrain.eval.retrieval", __doc__, OPTIONS),
        arguments,
        lambda run, options: evaluate(run, options.duplicates, options.feature),
    )


def evaluate(
    run: Run, min_cosine: float = 0.995, feature: str = named_features.POOLED
) -> dict[str, Any]:
    """Measure mAP and recall in percent and save them to RUN/eval/retrieval.json.

    Args:
        run: Run to evaluate.
        min_cosine: Smallest cosine similarity of a pair that is listed as near-duplicates.
        feature: Name of the networks' feature, see `named_features`.

    Returns:
        The content of the result file.

    Raises:
        ValueError: If the images have no labels, the backbone does not have the feature, or
            `min_cosine` is not in (0, 1].
    """
    start = time.monotonic()
    if not 0 < min_cosine <= 1:
        raise ValueError(f"--duplicates: {min_cosine} is not in (0, 1]; give one such as 0.995")
    train, test = labeled_splits(run, "the retrieval evaluation")
    rows: list[results.Row] = []
    for representation in features.representations(run, train, feature=feature):
        bank, bank_labels = representation.embed(train)
        queries, labels = representation.embed(test)
        mean = bank.mean(dim=0) if representation.needs_centering else 0.0
        metrics = retrieval_metrics(bank - mean, bank_labels, queries - mean, labels)
        rows.append(results.Row(representation.name, metrics))
        results.print_progress(rows[-1].summary())
    pairs, num_pairs = find_near_duplicates(torch.cat([bank, queries]), min_cosine)
    path = write_pairs(run, train, test, pairs)
    protocol = {
        **describe_splits(run, train, test, feature=feature),
        "normalization": NORMALIZATION,
        "ranking": "each test image ranks all training images; ties in the order of the data set",
        "near duplicates": f"{num_pairs} pairs at cosine {min_cosine:g} or more among training and"
        f" test images; {path.name} has {len(pairs)}",
    }
    seconds, rows = time.monotonic() - start, results.with_better_random_row(rows)
    result = results.save(
        run.path,
        f"retrieval{results.suffix_of_feature(feature)}",
        protocol,
        rows,
        run.provenance(),
        seconds,
        measure=results.measure_of_feature("%", feature),
    )
    with path.open(newline="") as file:
        for similarity, a, b in list(csv.reader(file))[1 : 1 + NUM_PRINTED_PAIRS]:
            results.print_progress(f"near duplicates, cosine {similarity}: {a} and {b}")
    return result


def retrieval_metrics(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor
) -> dict[str, float]:
    """Return mAP and recall@n in percent.

    A query without a relevant image in the bank counts as 0.

    Args:
        bank: Features to rank, (n, dim).
        bank_labels: Classes of the bank's images, (n,).
        queries: Features of the queries, (num_queries, dim).
        labels: Classes of the queries, (num_queries,).
    """
    bank = F.normalize(bank.float(), dim=1)
    total = torch.zeros(1 + len(RECALL_CUTOFFS), dtype=torch.float64, device=bank.device)
    positions = torch.arange(1, len(bank) + 1, device=bank.device)
    block_size = max(1, weighted_knn.MAX_SIMILARITIES // len(bank))
    for block, block_labels in zip(queries.split(block_size), labels.split(block_size)):
        similarities = F.normalize(block.float(), dim=1) @ bank.T
        order = similarities.argsort(dim=1, descending=True, stable=True)
        is_relevant = bank_labels[order] == block_labels[:, None]
        hits = is_relevant.cumsum(dim=1)
        precision_sum = (hits / positions * is_relevant).sum(dim=1, dtype=torch.float64)
        average_precision = precision_sum / hits[:, -1].clamp(min=1)
        recalls = [hits[:, min(n, len(bank)) - 1] > 0 for n in RECALL_CUTOFFS]
        total += torch.stack([values.double().sum() for values in (average_precision, *recalls)])
    names = ["mAP", *(f"recall@{n}" for n in RECALL_CUTOFFS)]
    return dict(zip(names, (100 * total / len(queries)).tolist()))


def find_near_duplicates(features: Tensor, min_cosine: float) -> tuple[list[Pair], int]:
    """Find pairs of images with nearly equal features.

    Args:
        features: Features of all images, (n, dim).
        min_cosine: Smallest cosine similarity of a pair.

    Returns:
        At most MAX_PAIRS pairs, nearest first, and the number of all pairs.
    """
    unit = F.normalize(features.float(), dim=1)
    pairs, num_pairs = torch.zeros(0, 3, dtype=torch.float64), 0
    block_size = max(1, weighted_knn.MAX_SIMILARITIES // len(unit))
    for first in range(0, len(unit), block_size):
        similarities = unit[first : first + block_size] @ unit.T
        are_near = (similarities >= min_cosine - ROUNDING_ERROR).triu(first + 1)  # each pair once
        rows, columns = are_near.nonzero(as_tuple=True)
        num_pairs += len(rows)
        cosines = similarities[rows, columns].double()
        block = torch.stack([cosines, (rows + first).double(), columns.double()], dim=1).cpu()
        pairs = torch.cat([pairs, block])
        pairs = pairs[pairs[:, 0].argsort(descending=True, stable=True)[:MAX_PAIRS]]
    return [(min(1.0, cosine), int(a), int(b)) for cosine, a, b in pairs.tolist()], num_pairs


def write_pairs(run: Run, train: EvaluationSplit, test: EvaluationSplit, pairs: list[Pair]) -> Path:
    """Write RUN/eval/near_duplicates.csv, which has the cosine and the two files of each pair."""

    def file_name(position: int) -> str:
        is_train = position < len(train)
        split, row = (train, position) if is_train else (test, position - len(train))
        return split.source.name(int(split.indices[row]))

    path = run.path / "eval" / "near_duplicates.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["cosine", "a", "b"])
        writer.writerows([f"{cosine:.4f}", file_name(a), file_name(b)] for cosine, a, b in pairs)
    return path


if __name__ == "__main__":
    command_line.execute(main, "ssl_pretrain.eval.retrieval")
