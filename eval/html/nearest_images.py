"""Find the nearest neighbors of a few queries, and project features to two dimensions."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_pretrain import rng
from ssl_pretrain.data.sources import open_source
from ssl_pretrain.eval.frozen import features
from ssl_pretrain.eval.frozen.evaluation_split import SPLIT_SEED, EvaluationSplit
from ssl_pretrain.eval.runs import Run

NUM_QUERIES = 10
NUM_NEIGHBORS = 6
MAX_BANK = 10000  # training images to search for neighbors
MAX_QUERIES = 1000  # images that queries are chosen from, all of which are projected
DIRECTIONS = ("right", "left", "down", "up")

LabeledImage = tuple[np.ndarray, int]  # uint8 (3, size, size), and the label or -1


@dataclass
class Query:
    """One query and the images nearest to it."""

    image: np.ndarray  # after the shift
    label: int
    shift: str  # such as "2 right", in original pixels; empty if the image was not shifted
    by_pixels: list[LabeledImage]
    by_features: list[LabeledImage]


def open_bank_and_queries(run: Run) -> tuple[EvaluationSplit, EvaluationSplit, str]:
    """Return a bank of training images, the images to choose queries from, and their description.

    Queries are test images, or held-out training images if there is no test split.
    """
    train = open_source(run.config.data, "train")
    order = rng.permutation(SPLIT_SEED, 0, len(train), rng.Purpose.SPLIT)
    try:
        queries = open_source(run.config.data, "val")
    except ValueError:
        num_held_out = max(1, min(MAX_QUERIES, len(train) // 10))
        queries, query_order, kind = train, order[:num_held_out], "held-out training images"
        order = order[num_held_out:]
    else:
        query_order = rng.permutation(SPLIT_SEED, 0, len(queries), rng.Purpose.SPLIT)[:MAX_QUERIES]
        kind = "test images"
    bank = EvaluationSplit(run, train, np.sort(order[:MAX_BANK]))
    return bank, EvaluationSplit(run, queries, np.sort(query_order)), kind


def find_neighbors(run: Run, bank: EvaluationSplit, queries: EvaluationSplit) -> list[Query]:
    """Find the neighbors of ten queries, which are of ten classes if there are that many.

    Small images are shifted by one or two original pixels before the search.
    """
    split = queries.subset(_one_row_per_class(queries.labels))
    offsets, names = _shifts(split)
    pixels = torch.cat([views for views, _ in split.batches()])
    images = torch.cat([features.shift(view[None], *by) for view, by in zip(pixels, offsets)])
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

    If there are fewer classes or no labels, the first of the other images complete the ten.
    """
    classes, first = np.unique(labels, return_index=True)
    if len(classes) < NUM_QUERIES:
        rest = np.setdiff1d(np.arange(len(labels)), first)
        return np.concatenate([first, rest])[:NUM_QUERIES]
    return first[np.linspace(0, len(classes) - 1, NUM_QUERIES).round().astype(int)]


def _shifts(split: EvaluationSplit) -> tuple[list[features.Offset], list[str]]:
    """Return the offset of each image in pixels of the view, and its name in original pixels."""
    distances = features.default_shift_distances(split)
    if not distances:
        return [(0, 0)] * len(split), [""] * len(split)
    offsets, names = [], []
    for row in range(len(split)):
        distance, direction = distances[row % len(distances)], row // len(distances) % 4
        offsets.append(features.shift_offsets(split, distance)[direction])
        names.append(f"{distance} {DIRECTIONS[direction]}")
    return offsets, names


def _nearest(bank: Tensor, queries: Tensor) -> Tensor:
    """Return the rows (queries, neighbors) of the bank that are nearest by cosine similarity."""
    similarity = F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T
    return similarity.topk(min(NUM_NEIGHBORS, len(bank)), dim=1).indices


def project(vectors: Tensor) -> np.ndarray:
    """Project vectors (n, dim) to (n, 2) by t-SNE of their directions, with a fixed seed."""
    from sklearn.manifold import TSNE

    values = F.normalize(vectors, dim=1).cpu().numpy()
    if len(values) < 5:
        return np.pad(values, ((0, 0), (0, 2)))[:, :2]
    perplexity = min(30.0, (len(values) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(values)
