"""The nearest neighbors of a few queries, and a projection of features to two dimensions."""

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
NUM_NEIGHBORS = 6
MAX_BANK = 10000  # training images among which neighbors are searched
MAX_PROJECTED = 1000
DIRECTIONS = ("right", "left", "down", "up")

LabeledImage = tuple[np.ndarray, int]  # uint8 (3, size, size), and the label, -1 for none


@dataclass
class Query:
    """One query, shifted as it was searched for, and the images nearest to it."""

    image: np.ndarray
    label: int
    shift: str  # "2 right", in original pixels; empty if the image was not shifted
    by_pixels: list[LabeledImage]
    by_features: list[LabeledImage]


def open_bank_and_queries(run: Run) -> tuple[EvaluationSplit, EvaluationSplit, str]:
    """Return a bank of training images, the queries, and what the queries are.

    Queries are test images, or held-out training images where there is no test split.
    """
    train = open_source(run.config.data, "train")
    order = rng.permutation(SPLIT_SEED, 0, len(train), Purpose.SPLIT)
    try:
        test = open_source(run.config.data, "val")
    except ValueError:
        num_held_out = max(1, min(MAX_PROJECTED, len(train) // 10))
        bank = _split(run, train, order[num_held_out:][:MAX_BANK])
        return bank, _split(run, train, order[:num_held_out]), "held-out training images"
    test_order = rng.permutation(SPLIT_SEED, 0, len(test), Purpose.SPLIT)[:MAX_PROJECTED]
    return _split(run, train, order[:MAX_BANK]), _split(run, test, test_order), "test images"


def _split(run: Run, source: Source, indices: np.ndarray) -> EvaluationSplit:
    return EvaluationSplit(run, source, np.sort(indices))


def find_neighbors(run: Run, bank: EvaluationSplit, queries: EvaluationSplit) -> list[Query]:
    """Find the neighbors of ten queries, of ten classes where there are as many.

    Queries of small images are shifted by one or two original pixels.
    """
    split = queries.subset(_one_row_per_class(queries.labels))
    offsets, names = _shifts(split)
    pixels = torch.cat([images for images, _ in split.batches()])
    images = torch.cat([shifts.shift(view[None], *move) for view, move in zip(pixels, offsets)])
    bank_features, labels = features.extract(run.backbone, bank)
    bank_pixels, _ = features.raw_pixels(bank)
    mean = bank_pixels.mean(dim=0)
    with torch.no_grad():
        query_features = run.backbone(features.normalize(run, images)).float()
    by_features = _nearest(bank_features, query_features)
    by_pixels = _nearest(bank_pixels - mean, features.flatten_views(run, images) - mean)
    rows = np.unique(torch.cat([by_features, by_pixels]).cpu().numpy())
    views = torch.cat([views for views, _ in bank.subset(rows).batches()]).numpy()
    view_of_row = dict(zip(rows.tolist(), views))

    def labeled(neighbors: Tensor) -> list[LabeledImage]:
        return [(view_of_row[row], int(labels[row])) for row in neighbors.tolist()]

    return [
        Query(image.numpy(), int(label), name, labeled(pixel_rows), labeled(feature_rows))
        for image, label, name, pixel_rows, feature_rows in zip(
            images, split.labels, names, by_pixels, by_features
        )
    ]


def _one_row_per_class(labels: np.ndarray) -> np.ndarray:
    """Return the rows of ten queries: the first image of each of ten evenly spaced classes.

    With fewer classes, or without labels, other images follow in order.
    """
    classes, first = np.unique(labels, return_index=True)
    if len(classes) < NUM_QUERIES:
        rest = np.setdiff1d(np.arange(len(labels)), first)
        return np.concatenate([first, rest])[:NUM_QUERIES]
    return first[np.linspace(0, len(classes) - 1, NUM_QUERIES).round().astype(int)]


def _shifts(split: EvaluationSplit) -> tuple[list[shifts.Offset], list[str]]:
    """Return an offset per image, in pixels of the view, and its name in original pixels."""
    distances = shifts.default_distances(split)
    if not distances:
        return [(0, 0)] * len(split), [""] * len(split)
    offsets, names = [], []
    for row in range(len(split)):
        distance, direction = distances[row % len(distances)], row // len(distances) % 4
        offsets.append(shifts.directions(split, distance)[direction])
        names.append(f"{distance} {DIRECTIONS[direction]}")
    return offsets, names


def _nearest(bank: Tensor, queries: Tensor) -> Tensor:
    similarity = F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T
    return similarity.topk(min(NUM_NEIGHBORS, len(bank)), dim=1).indices


def project(vectors: Tensor) -> np.ndarray:
    """Project vectors (n, dim) to (n, 2) by t-SNE of the rows at length 1.

    The start is a PCA and the seed is fixed.
    """
    from sklearn.manifold import TSNE

    values = F.normalize(vectors, dim=1).cpu().numpy()
    if len(values) < 5:
        return np.pad(values, ((0, 0), (0, 2)))[:, :2]
    perplexity = min(30.0, (len(values) - 1) / 3)
    tsne = TSNE(perplexity=perplexity, init="pca", learning_rate="auto", random_state=0)
    return tsne.fit_transform(values)
