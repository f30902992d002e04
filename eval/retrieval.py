"""Retrieval by a run's features, and images that are nearly the same: `python -m ssl_pretrain.eval.retrieval RUN`."""

from __future__ import annotations

import csv
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_pretrain.eval import results, runs
from ssl_pretrain.eval.frozen import evaluation_split, features
from ssl_pretrain.eval.frozen.evaluation_split import Part
from ssl_pretrain.eval.results import Row
from ssl_pretrain.eval.runs import Run
from ssl_pretrain.monitoring import weighted_knn
from ssl_pretrain.schema import COSINE

RECALLS = (1, 5, 10)
MOST_PAIRS = 1000
HELP = f"""How well a run's frozen features retrieve images of the query's class, and which images are nearly the same.

Each test image ranks all training images by cosine similarity. mAP: mean over queries of the average precision of the
ranking, an image of the query's class being right. recall@n: share of queries with one right image or more among the first
n. Raw pixels and the untrained network stand beside it. The numbers and their protocol are printed and kept in
RUN/eval/retrieval.json; pairs of images, training and test, whose features' cosine reaches --duplicates are listed with
their files in RUN/eval/near_duplicates.csv, the nearest {MOST_PAIRS} at most.

    python -m ssl_pretrain.eval.retrieval runs/demo
    python -m ssl_pretrain.eval.retrieval runs/demo --duplicates 0.999"""


def main(arguments: list[str]) -> None:
    parser = runs.parser("ssl_pretrain.eval.retrieval", HELP)
    parser.add_argument(
        "--duplicates",
        type=COSINE,
        default=0.995,
        metavar="COSINE",
        help="of a pair to be listed (default: 0.995)",
    )
    options = parser.parse_intermixed_args(arguments)
    run = runs.load_run(options.run, options.checkpoint, options.overrides, options.device)
    result = evaluate(run, options.duplicates)
    print(
        f"\n{results.text(result)}\n\n{result['seconds']:.0f} s; kept in {run.path / 'eval/retrieval.json'}"
    )


def evaluate(run: Run, duplicates: float = 0.995) -> dict[str, Any]:
    """mAP and recalls in percent of raw pixels, the random backbone and the pretrained one; see HELP. Kept in RUN/eval/retrieval.json.

    Raises:
        ValueError: the images have no labels, or `duplicates` is not in (0, 1].
    """
    began = time.monotonic()
    if not 0 < duplicates <= 1:
        raise ValueError(f"--duplicates: {duplicates} is not a cosine in (0, 1]; 0.995 is usual")
    train, test = evaluation_split.labelled_parts(run, "the retrieval evaluation")
    rows: list[Row] = []
    for judged in features.judged(run, train):
        (bank, bank_labels), (queries, labels) = judged.embed(train), judged.embed(test)
        mean = bank.mean(dim=0) if judged.centred else 0.0
        rows.append(Row(judged.name, measures(bank - mean, bank_labels, queries - mean, labels)))
        results.say(
            f"{judged.name}: "
            + ", ".join(f"{column} {value:.1f} %" for column, value in rows[-1].metrics.items())
        )
        if judged.name == "pretrained":
            pairs, total = near_duplicates(torch.cat([bank, queries]), duplicates)
    path = write_pairs(run, train, test, pairs)
    protocol = {
        **evaluation_split.protocol(run, train, test),
        "normalization": "features scaled to length 1, not centred; raw pixels centred on the training mean first",
        "ranking": "each test image ranks all training images; images at the same similarity in the order of the data set",
        "near duplicates": f"{total} pairs at cosine {duplicates:g} or more among training and test images; {path.name} has {len(pairs)}",
    }
    result = results.save(
        run.path,
        "retrieval",
        protocol,
        results.with_better_random(rows),
        run.about(),
        time.monotonic() - began,
        "%",
    )
    for similarity, a, b in [*csv.reader(path.open(newline=""))][1:11]:
        results.say(f"near duplicates, cosine {similarity}: {a} and {b}")
    return result


def measures(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor
) -> dict[str, float]:
    """{"mAP", "recall@1", ...} in percent. A query whose class has no image in the bank counts as 0."""
    bank, total = (
        F.normalize(bank.float(), dim=1),
        torch.zeros(1 + len(RECALLS), dtype=torch.float64, device=bank.device),
    )
    places = torch.arange(1, len(bank) + 1, device=bank.device)
    for chunk, truth in zip(
        *(
            each.split(max(1, weighted_knn.MAX_SIMILARITIES // len(bank)))
            for each in (queries, labels)
        )
    ):
        order = (F.normalize(chunk.float(), dim=1) @ bank.T).argsort(
            dim=1, descending=True, stable=True
        )
        right = bank_labels[order] == truth[:, None]
        hits = right.cumsum(dim=1)
        precision = (hits / places * right).sum(dim=1, dtype=torch.float64) / hits[:, -1].clamp(
            min=1
        )
        total += torch.stack(
            [
                precision.sum(),
                *((hits[:, min(n, len(bank)) - 1] > 0).double().sum() for n in RECALLS),
            ]
        )
    shares = (100 * total / len(queries)).tolist()
    return dict(zip(("mAP", *(f"recall@{n}" for n in RECALLS)), shares))


def near_duplicates(vectors: Tensor, least: float) -> tuple[list[tuple[float, int, int]], int]:
    """([(cosine, a, b), ...] with a < b, the nearest first, at most MOST_PAIRS; how many pairs there are)."""
    unit = F.normalize(vectors.float(), dim=1)
    kept, total = torch.zeros(0, 3, dtype=torch.float64), 0
    for first, similar in _blocks(unit):
        rows, columns = (similar >= least - 1e-6).nonzero(
            as_tuple=True
        )  # as float32's rounding has it
        later = columns > rows + first
        rows, columns = rows[later], columns[later]
        total += len(rows)
        kept = torch.cat(
            [
                kept,
                torch.stack(
                    [similar[rows, columns].double(), (rows + first).double(), columns.double()],
                    dim=1,
                ).cpu(),
            ]
        )
        if len(kept) > MOST_PAIRS:
            kept = kept[kept[:, 0].argsort(descending=True, stable=True)[:MOST_PAIRS]]
    kept = kept[kept[:, 0].argsort(descending=True, stable=True)]
    return [(min(1.0, cosine), int(a), int(b)) for cosine, a, b in kept.tolist()], total


def _blocks(unit: Tensor) -> Iterator[tuple[int, Tensor]]:
    rows = max(1, weighted_knn.MAX_SIMILARITIES // len(unit))
    for first in range(0, len(unit), rows):
        yield first, unit[first : first + rows] @ unit.T


def write_pairs(run: Run, train: Part, test: Part, pairs: list[tuple[float, int, int]]) -> Path:
    """RUN/eval/near_duplicates.csv: cosine and the two files of each pair."""

    def name(number: int) -> str:
        part, own = (train, number) if number < len(train) else (test, number - len(train))
        return part.source.name(int(part.numbers[own]))

    path = run.path / "eval" / "near_duplicates.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["cosine", "a", "b"])
        writer.writerows([f"{cosine:.4f}", name(a), name(b)] for cosine, a, b in pairs)
    return path


if __name__ == "__main__":
    results.command(main, "ssl_pretrain.eval.retrieval")
