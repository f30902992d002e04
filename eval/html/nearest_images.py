"""Find the nearest neighbors of a few queries, and project features to two dimensions."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_pretrain import rng
from ssl_pretrain.eval.frozen import features
from ssl_pretrain.eval.frozen.evaluation_split import SPLIT_SEED, EvaluationSplit, open_images
from ssl_pretrain.eval.runs import Run
from ssl_pretrain.monitoring.shown_bands import to_rgb

NUM_QUERIES = 10
NUM_NEIGHBORS = 6
MAX_BANK_IMAGES = 10000  # training images that are searched for neighbors
MAX_QUERY_CANDIDATES = 1000  # images to choose the queries from; all of them are projected
DIRECTIONS = ("right", "left", "down", "up")

LabeledImage = tuple[np.ndarray, int]  # picture, uint8 (3, height, width), and label, -1 if unknown


@dataclass
class Query:
    """One query and its nearest neighbors, the nearest first."""

    image: np.ndarray  # picture, uint8 (3, height, width), after the shift
    label: int  # -1 if unknown
    shift: str  # in original pixels, such as "2 right"; empty if the image was not shifted
    pixel_neighbors: list[LabeledImage]  # nearest by raw pixels
    feature_neighbors: list[LabeledImage]  # nearest by learned features


def open_bank_and_query_candidates(run: Run) -> tuple[EvaluationSplit, EvaluationSplit, str]:
    """Return the bank of training images, the candidates for queries, and their kind.

    The kind is "test images", or "held-out training images" if there is no test split.
    """
    train = open_images(run, "train")
    bank_rows = rng.permutation(SPLIT_SEED, 0, len(train), rng.Purpose.SPLIT)
    try:
        source = open_images(run, "val")
    except ValueError:
        num_held_out = max(1, min(MAX_QUERY_CANDIDATES, len(train) // 10))
        source, candidate_rows, kind = train, bank_rows[:num_held_out], "held-out training images"
        bank_rows = bank_rows[num_held_out:]
    else:
        rows = rng.permutation(SPLIT_SEED, 0, len(source), rng.Purpose.SPLIT)
        candidate_rows, kind = rows[:MAX_QUERY_CANDIDATES], "test images"
    bank = EvaluationSplit(run, train, np.sort(bank_rows[:MAX_BANK_IMAGES]))
    return bank, EvaluationSplit(run, source, np.sort(candidate_rows)), kind


def find_neighbors(
    run: Run, bank: EvaluationSplit, query_candidates: EvaluationSplit
) -> list[Query]:
    """Choose ten queries, of different classes if there are ten, and find their neighbors.

    Small images are shifted by one or two original pixels before the search.
    """
    split = query_candidates.subset(_query_rows(query_candidates.labels))
    offsets, shifts = _query_shifts(split)
    pixels = torch.cat([views for views, _ in split.batches()])
    images = torch.cat(
        [features.shift(view[None], *offset) for view, offset in zip(pixels, offsets)]
    )
    bank_features, labels = features.extract(run.backbone, bank)
    bank_pixels, _ = features.raw_pixels(bank)
    mean = bank_pixels.mean(dim=0)
    query_features = features.compute(run, run.backbone, features.normalize(run, images))
    feature_rows = _nearest_rows(bank_features, query_features)
    pixel_rows = _nearest_rows(bank_pixels - mean, features.flatten_views(run, images) - mean)
    rows = np.unique(torch.cat([feature_rows, pixel_rows]).cpu().numpy())
    views = torch.cat([views for views, _ in bank.subset(rows).batches()])
    bands = run.config.log.bands
    picture_of_row = dict(zip(rows.tolist(), to_rgb(views, bands).numpy()))

    def labeled_images(rows: Tensor) -> list[LabeledImage]:
        return [(picture_of_row[row], int(labels[row])) for row in rows.tolist()]

    return [
        Query(query, int(label), shift, labeled_images(by_pixels), labeled_images(by_features))
        for query, label, shift, by_pixels, by_features in zip(
            to_rgb(images, bands).numpy(), split.labels, shifts, pixel_rows, feature_rows
        )
    ]


def _query_rows(labels: np.ndarray) -> np.ndarray:
    """Return the rows of ten queries: the first image of each of ten evenly spaced classes.

    If there are fewer classes or no labels, the first of the remaining images complete the ten.
    """
    classes, first_rows = np.unique(labels, return_index=True)
    if len(classes) < NUM_QUERIES:
        other_rows = np.setdiff1d(np.arange(len(labels)), first_rows)
        return np.concatenate([first_rows, other_rows])[:NUM_QUERIES]
    return first_rows[np.linspace(0, len(classes) - 1, NUM_QUERIES).round().astype(int)]


def _query_shifts(split: EvaluationSplit) -> tuple[list[features.Offset], list[str]]:
    """Return each image's offset in view pixels, and its description in original pixels."""
    distances = features.default_shift_distances(split)
    if not distances:
        return [(0, 0)] * len(split), [""] * len(split)
    offsets, descriptions = [], []
    for row in range(len(split)):
        distance, direction = distances[row % len(distances)], row // len(distances) % 4
        offsets.append(features.shift_offsets(split, distance)[direction])
        descriptions.append(f"{distance} {DIRECTIONS[direction]}")
    return offsets, descriptions


def _nearest_rows(bank: Tensor, queries: Tensor) -> Tensor:
    """Return the bank's rows with the largest cosine similarity, shape (queries, neighbors)."""
    similarity = F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T
    return similarity.topk(min(NUM_NEIGHBORS, len(bank)), dim=1).indices


def tsne_perplexity(num_vectors: int) -> float:
    """Return the perplexity of a projection, which must be below the number of vectors."""
    return min(30.0, (num_vectors - 1) / 3)


def project_by_tsne(vectors: Tensor) -> np.ndarray:
    """Project vectors (n, dim) to points (n, 2) by t-SNE of their directions, with a fixed seed."""
    from sklearn.manifold import TSNE

    values = F.normalize(vectors, dim=1).cpu().numpy()
    if len(values) < 5:
        return np.pad(values, ((0, 0), (0, 2)))[:, :2]
    tsne = TSNE(perplexity=tsne_perplexity(len(values)), init="pca", random_state=0)
    return tsne.fit_transform(values)
