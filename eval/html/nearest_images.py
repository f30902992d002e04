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
MAX_BANK = 10000  # number of training images that are searched for neighbors
MAX_QUERIES = 1000  # number of images to choose the queries from; all of them are projected
DIRECTIONS = ("right", "left", "down", "up")

LabeledImage = tuple[np.ndarray, int]  # image, uint8 (3, size, size), and label, -1 if unknown


@dataclass
class Query:
    """One query and its nearest neighbors, the nearest first."""

    image: np.ndarray  # uint8 (3, size, size), after the shift
    label: int  # -1 if unknown
    shift: str  # in original pixels, such as "2 right"; empty if the image was not shifted
    by_pixels: list[LabeledImage]  # neighbors by raw pixels
    by_features: list[LabeledImage]  # neighbors by learned features


def open_bank_and_queries(run: Run) -> tuple[EvaluationSplit, EvaluationSplit, str]:
    """Return the bank of training images, the images to choose queries from, and their name.

    The queries are "test images", or "held-out training images" if there is no test split.
    """
    train = open_source(run.config.data, "train")
    bank_rows = rng.permutation(SPLIT_SEED, 0, len(train), rng.Purpose.SPLIT)
    try:
        source = open_source(run.config.data, "val")
    except ValueError:
        num_held_out = max(1, min(MAX_QUERIES, len(train) // 10))
        source, query_rows, name = train, bank_rows[:num_held_out], "held-out training images"
        bank_rows = bank_rows[num_held_out:]
    else:
        query_rows = rng.permutation(SPLIT_SEED, 0, len(source), rng.Purpose.SPLIT)[:MAX_QUERIES]
        name = "test images"
    bank = EvaluationSplit(run, train, np.sort(bank_rows[:MAX_BANK]))
    return bank, EvaluationSplit(run, source, np.sort(query_rows)), name


def find_neighbors(run: Run, bank: EvaluationSplit, queries: EvaluationSplit) -> list[Query]:
    """Find the neighbors of ten queries, each from a different class if there are ten classes.

    Small images are shifted by one or two original pixels before the search.
    """
    split = queries.subset(_one_row_per_class(queries.labels))
    offsets, names = _shifts(split)
    pixels = torch.cat([views for views, _ in split.batches()])
    images = torch.cat(
        [features.shift(view[None], *offset) for view, offset in zip(pixels, offsets)]
    )
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

    If there are fewer classes or no labels, the first of the remaining images complete the ten.
    """
    classes, first_rows = np.unique(labels, return_index=True)
    if len(classes) < NUM_QUERIES:
        other_rows = np.setdiff1d(np.arange(len(labels)), first_rows)
        return np.concatenate([first_rows, other_rows])[:NUM_QUERIES]
    return first_rows[np.linspace(0, len(classes) - 1, NUM_QUERIES).round().astype(int)]


def _shifts(split: EvaluationSplit) -> tuple[list[features.Offset], list[str]]:
    """Return each image's offset in view pixels, and its description in original pixels."""
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
    """Return the bank's rows with the largest cosine similarity, shape (queries, neighbors)."""
    similarity = F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T
    return similarity.topk(min(NUM_NEIGHBORS, len(bank)), dim=1).indices


def project(vectors: Tensor) -> np.ndarray:
    """Project vectors (n, dim) to points (n, 2) by t-SNE of their directions, with a fixed seed."""
    from sklearn.manifold import TSNE

    values = F.normalize(vectors, dim=1).cpu().numpy()
    if len(values) < 5:
        return np.pad(values, ((0, 0), (0, 2)))[:, :2]
    perplexity = min(30.0, (len(values) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(values)
