"""What a run's features look like: nearest neighbours of ten queries, and a projection to two dimensions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_pretrain import rng
from ssl_pretrain.data.image_source import Source
from ssl_pretrain.data.sources import open_source
from ssl_pretrain.eval.frozen import features, shifts
from ssl_pretrain.eval.frozen.evaluation_split import SPLIT_SEED, EvaluationSplit
from ssl_pretrain.eval.runs import Run
from ssl_pretrain.rng import Purpose

NUM_QUERIES = 10
NUM_NEIGHBOURS = 6
MAX_BANK = 10000  # training images that neighbours are looked for in
MAX_PROJECTED = 1000


@dataclass
class Neighbours:
    """One query, as it was asked, and the images nearest to it. Pixels uint8 (3, size, size); labels -1 for none."""

    query: np.ndarray
    label: int
    moved: str  # "2 right", in original pixels; "" where it was not
    by_pixels: list[tuple[np.ndarray, int]]
    by_features: list[tuple[np.ndarray, int]]


def open_parts(run: Run) -> tuple[EvaluationSplit, EvaluationSplit, str]:
    """(bank, queries, what they are): training and test images, or two parts of the training images where there is no test part."""
    train = open_source(run.config.data, "train")
    order = rng.permutation(SPLIT_SEED, 0, len(train), Purpose.SPLIT)
    try:
        test = open_source(run.config.data, "val")
    except ValueError:
        aside = max(1, min(MAX_PROJECTED, len(train) // 10))
        return (
            _part(run, train, order[aside:][:MAX_BANK]),
            _part(run, train, order[:aside]),
            "held-out training images",
        )
    chosen = rng.permutation(SPLIT_SEED, 0, len(test), Purpose.SPLIT)[:MAX_PROJECTED]
    return _part(run, train, order[:MAX_BANK]), _part(run, test, chosen), "test images"


def _part(run: Run, source: Source, numbers: np.ndarray) -> EvaluationSplit:
    return EvaluationSplit(run, source, np.sort(numbers))


def neighbours(run: Run, bank: EvaluationSplit, queries: EvaluationSplit) -> list[Neighbours]:
    """Ten queries, of ten classes where there are as many; those of small images are moved by 1 or 2 original pixels."""
    chosen = EvaluationSplit(run, queries.source, queries.indices[_one_of_each(queries.labels)])
    pixels = torch.cat([images for images, _ in chosen.batches()])
    offsets, names = _moves(run, chosen)
    asked = torch.cat(
        [shifts.shift(image[None], *offset) for image, offset in zip(pixels, offsets)]
    )
    bank_features, labels = features.extract(run.backbone, bank)
    bank_pixels, _ = features.raw_pixels(bank)
    mean = bank_pixels.mean(dim=0)
    with torch.no_grad():
        query_features = run.backbone(features.normalize(run, asked)).float()
    by_features = _nearest(bank_features, query_features)
    by_pixels = _nearest(bank_pixels - mean, features.flatten_views(run, asked) - mean)
    wanted = np.unique(torch.cat([by_features, by_pixels]).cpu().numpy())
    shown = torch.cat(
        [images for images, _ in EvaluationSplit(run, bank.source, bank.indices[wanted]).batches()]
    ).numpy()
    views = dict(zip(wanted.tolist(), shown))
    return [
        Neighbours(
            asked[row].numpy(),
            int(chosen.labels[row]),
            names[row],
            *(
                [(views[int(number)], int(labels[number])) for number in found[row].tolist()]
                for found in (by_pixels, by_features)
            ),
        )
        for row in range(len(asked))
    ]


def _one_of_each(labels: np.ndarray) -> np.ndarray:
    """Rows of ten queries: the first of each class, classes evenly spaced where there are more; without labels, the first ten."""
    classes, first = np.unique(labels, return_index=True)
    if len(classes) < NUM_QUERIES:
        rest = np.setdiff1d(np.arange(len(labels)), first)
        return np.concatenate([first, rest])[:NUM_QUERIES]
    return first[np.linspace(0, len(classes) - 1, NUM_QUERIES).round().astype(int)]


def _moves(run: Run, chosen: EvaluationSplit) -> tuple[list[tuple[int, int]], list[str]]:
    distances = shifts.default_distances(chosen)
    if not distances:
        return [(0, 0)] * len(chosen), [""] * len(chosen)
    offsets, names = [], []
    for row in range(len(chosen)):
        distance, direction = distances[row % len(distances)], row // len(distances) % 4
        offsets.append(shifts.directions(chosen, distance)[direction])
        names.append(f"{distance} {('right', 'left', 'down', 'up')[direction]}")
    return offsets, names


def _nearest(bank: Tensor, queries: Tensor) -> Tensor:
    return (
        (F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T)
        .topk(min(NUM_NEIGHBOURS, len(bank)), dim=1)
        .indices
    )


def project(found: Tensor) -> np.ndarray:
    """Features (n, dim) in two dimensions, (n, 2): t-SNE of the rows at length 1, from a PCA start with a fixed seed."""
    from sklearn.manifold import TSNE

    values = F.normalize(found, dim=1).cpu().numpy()
    if len(values) < 5:
        return np.pad(values, ((0, 0), (0, 2)))[:, :2]
    tsne = TSNE(
        perplexity=min(30.0, (len(values) - 1) / 3),
        init="pca",
        learning_rate="auto",
        random_state=0,
    )
    return tsne.fit_transform(values)
