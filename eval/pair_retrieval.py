"""Retrieval of the counterpart of an item: recall@k and mean reciprocal rank of pairs.

The items of both sides belong to groups. A caption belongs to the group of its image, so that an
image has several correct captions and a caption has one correct image. The rank of a query is that
of its nearest correct candidate, and other correct candidates before it do not count.

Ties are counted against the query: every wrong candidate that is as similar as the nearest correct
one is ranked before it. Collapsed embeddings, which are all equal, therefore find nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_pretrain.monitoring import weighted_knn

RECALL_CUTOFFS = (1, 5, 10)


@dataclass(frozen=True)
class RetrievalScores:
    """Scores of one direction in percent, and their standard errors.

    Attributes:
        values: Scores by name: "recall@1" and so on, and "MRR".
        standard_errors: Standard errors over the queries by the same names. Queries of a group,
            such as the captions of an image, count as dependent on each other.
    """

    values: dict[str, float]
    standard_errors: dict[str, float]


def score_both_directions(
    images: Tensor,
    texts: Tensor,
    image_of_text: Tensor,
    cutoffs: Sequence[int] = RECALL_CUTOFFS,
    image_groups: Tensor | None = None,
) -> tuple[RetrievalScores, RetrievalScores]:
    """Return the scores of finding the texts of each image, and the image of each text.

    Args:
        images: Embeddings of the images, (num_images, dim), or of other items with texts.
        texts: Embeddings of the texts, (num_texts, dim).
        image_of_text: Index of each text's image, (num_texts,). Every image needs a text.
        cutoffs: Numbers of first candidates for recall.
        image_groups: Group of each image, (num_images,), if the texts of some images are correct
            for others as well. By default, each image is a group of its own.
    """
    if image_groups is None:
        image_groups = torch.arange(len(images), device=image_of_text.device)
    text_groups = image_groups[image_of_text]
    to_texts = find_ranks(cosine_block(images, texts), image_groups, text_groups)
    to_images = find_ranks(cosine_block(texts, images), text_groups, image_groups)
    return (
        score_ranks(to_texts, image_groups, cutoffs),
        score_ranks(to_images, text_groups, cutoffs),
    )


def check_finite(name: str, embeddings: Tensor) -> None:
    """Raise ValueError, with the name of the embeddings, if one of them is not finite."""
    num_bad = int((~embeddings.isfinite().all(dim=1)).sum())
    if num_bad:
        raise ValueError(
            f"{num_bad} of {len(embeddings)} embeddings of the {name} are not finite; evaluate an "
            "earlier checkpoint"
        )


def cosine_block(queries: Tensor, candidates: Tensor) -> Callable[[slice], Tensor]:
    """Return a function that computes the cosines of some queries with all candidates.

    Args:
        queries: Embeddings of the queries, (num_queries, dim). Normalized inside, in float32.
        candidates: Embeddings of the candidates, (num_candidates, dim).

    Raises:
        ValueError: If an embedding is not finite.
    """
    check_finite("queries", queries)
    check_finite("candidates", candidates)
    return _products(F.normalize(queries.float(), dim=1), F.normalize(candidates.float(), dim=1))


def dot_block(queries: Tensor, candidates: Tensor) -> Callable[[slice], Tensor]:
    """Return a function that computes the dot products of some queries with all candidates.

    Args:
        queries: Embeddings of the queries, (num_queries, dim). Compared in float32.
        candidates: Embeddings of the candidates, (num_candidates, dim).

    Raises:
        ValueError: If an embedding is not finite.
    """
    check_finite("queries", queries)
    check_finite("candidates", candidates)
    return _products(queries.float(), candidates.float())


def _products(queries: Tensor, candidates: Tensor) -> Callable[[slice], Tensor]:
    return lambda rows: queries[rows] @ candidates.T


def group_items(texts: Sequence[str], item_of_text: Tensor) -> Tensor:
    """Return the group of each item, int64 (num_items,). Items that share a text are in one group.

    Args:
        texts: The texts of all items. Only texts that agree in every character are equal.
        item_of_text: Index of the item of each text, int64 (num_texts,).
    """
    group_of_item = list(range(int(item_of_text.max()) + 1))

    def find_root(item: int) -> int:
        while group_of_item[item] != item:
            item = group_of_item[item]
        return item

    first_item: dict[str, int] = {}
    for text, item in zip(texts, item_of_text.tolist()):
        group_of_item[find_root(item)] = find_root(first_item.setdefault(text, item))
    return torch.tensor([find_root(item) for item in group_of_item])


def find_ranks(
    similarities: Callable[[slice], Tensor], query_groups: Tensor, candidate_groups: Tensor
) -> Tensor:
    """Return the rank of each query's nearest correct candidate, from 1, int64 (num_queries,).

    At most `weighted_knn.MAX_SIMILARITIES` similarities are in memory at a time.

    Args:
        similarities: Function that returns the similarities of a slice of the queries with all
            candidates, (rows, num_candidates).
        query_groups: Group of each query, int64 (num_queries,).
        candidate_groups: Group of each candidate, int64 (num_candidates,).

    Raises:
        ValueError: If a query has no correct candidate.
    """
    has_candidate = torch.isin(query_groups, candidate_groups)
    if not bool(has_candidate.all()):
        first = int((~has_candidate).nonzero()[0])
        raise ValueError(
            f"{int((~has_candidate).sum())} of {len(query_groups)} queries have no correct "
            f"candidate (first: query {first}); leave them out"
        )
    ranks = [torch.empty(0, dtype=torch.int64)]
    num_rows = max(1, weighted_knn.MAX_SIMILARITIES // max(1, len(candidate_groups)))
    for start in range(0, len(query_groups), num_rows):
        rows = slice(start, start + num_rows)
        block = similarities(rows)
        is_correct = (query_groups[rows, None] == candidate_groups).to(block.device)
        nearest = block.masked_fill(~is_correct, -torch.inf).amax(dim=1, keepdim=True)
        ranks.append(1 + (~is_correct & (block >= nearest)).sum(dim=1).cpu())
    return torch.cat(ranks)


def score_ranks(
    ranks: Tensor, query_groups: Tensor, cutoffs: Sequence[int] = RECALL_CUTOFFS
) -> RetrievalScores:
    """Return recall@k and the mean reciprocal rank, in percent, with standard errors.

    Args:
        ranks: Rank of each query's nearest correct candidate, from 1, (num_queries,).
        query_groups: Group of each query, (num_queries,).
        cutoffs: Values of k.
    """
    assert len(ranks), "retrieval needs a query"
    outcomes = {f"recall@{k}": 100.0 * (ranks <= k).double() for k in cutoffs}
    outcomes["MRR"] = 100.0 / ranks.double()
    return RetrievalScores(
        {name: float(values.mean()) for name, values in outcomes.items()},
        {name: clustered_error(values, query_groups) for name, values in outcomes.items()},
    )


def clustered_error(values: Tensor, groups: Tensor) -> float:
    """Return the standard error of a mean whose values depend on each other within groups.

    If every value has its own group, it is the standard deviation divided by the square root of the
    number of values. It is NaN for a single group.

    Args:
        values: Values, float64 (n,).
        groups: Group of each value, (n,).
    """
    _, indices = groups.to(values.device).unique(return_inverse=True)
    num_groups = int(indices.max()) + 1
    if num_groups < 2:
        return float("nan")
    sums = values.new_zeros(num_groups).index_add(0, indices, values - values.mean())
    correction = num_groups / (num_groups - 1)
    return float((correction * sums.square().sum()).sqrt() / len(values))
