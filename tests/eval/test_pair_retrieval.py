"""Retrieval of pairs: ranks by brute force, ties, several captions, chunks, and standard errors."""

import numpy as np
import pytest
import torch

from ssl_pretrain.eval import pair_retrieval, tf_idf
from ssl_pretrain.monitoring import weighted_knn

# Three images with two, one and three captions.
IMAGE_OF_TEXT = torch.tensor([2, 0, 0, 1, 2, 2])


@pytest.fixture
def embeddings():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 4, generator=generator), torch.randn(6, 4, generator=generator)


def rank_by_sorting(queries, candidates, query_groups, candidate_groups):
    """Sort the candidates of each query and count the wrong ones before the first correct one."""
    ranks = []
    for query, group in zip(queries.numpy(), query_groups.tolist()):
        cosines = [
            query @ candidate / (np.linalg.norm(query) * np.linalg.norm(candidate))
            for candidate in candidates.numpy()
        ]
        order = sorted(range(len(cosines)), key=lambda index: -cosines[index])
        are_correct = [int(candidate_groups[index]) == group for index in order]
        ranks.append(1 + are_correct.index(True))
    return ranks


def test_ranks_equal_those_by_sorting(embeddings):
    images, texts = embeddings
    groups = torch.arange(3)
    for arguments in (
        (images, texts, groups, IMAGE_OF_TEXT),
        (texts, images, IMAGE_OF_TEXT, groups),
    ):
        queries, candidates, *both_groups = arguments
        block = pair_retrieval.cosine_block(queries, candidates)
        ranks = pair_retrieval.find_ranks(block, *both_groups)
        assert ranks.tolist() == rank_by_sorting(*arguments)


def test_a_query_with_several_correct_candidates_needs_one_of_them():
    similarities = torch.tensor([[0.9, 0.8, 0.7, 0.1], [0.2, 0.3, 0.4, 0.5]])
    groups = torch.tensor([0, 1, 1, 1])
    ranks = pair_retrieval.find_ranks(lambda rows: similarities[rows], torch.tensor([1, 0]), groups)
    assert ranks.tolist() == [2, 4]  # the other correct captions do not push the first one back


def test_items_that_share_a_text_are_in_one_group():
    texts = ["a", "b", "c", "b", "d", "e", "e", "f"]
    item_of_text = torch.tensor([0, 0, 1, 2, 2, 3, 4, 5])
    groups = pair_retrieval.group_items(texts, item_of_text).tolist()
    assert groups[0] == groups[2] and groups[3] == groups[4]
    assert len(set(groups)) == 4


def test_dot_products_prefer_long_candidates():
    queries, candidates = torch.tensor([[1.0, 0]]), torch.tensor([[1.0, 0], [5, 5]])
    rows = slice(0, 1)
    assert pair_retrieval.dot_block(queries, candidates)(rows).tolist() == [[1, 5]]
    assert pair_retrieval.cosine_block(queries, candidates)(rows).argmax() == 0


def test_ties_count_against_the_query():
    similarities = torch.full((3, 5), 0.5)
    groups = torch.arange(5)
    ranks = pair_retrieval.find_ranks(lambda rows: similarities[rows], groups[:3], groups)
    assert ranks.tolist() == [5, 5, 5]


def test_collapsed_embeddings_find_nothing():
    ones, pairs = torch.ones(20, 4), torch.arange(20)
    for scores in pair_retrieval.score_both_directions(ones, ones, pairs):
        assert scores.values["recall@10"] == 0


def test_both_directions_are_scored_with_their_own_queries(embeddings):
    images, texts = embeddings
    to_texts, to_images = pair_retrieval.score_both_directions(
        images, texts, IMAGE_OF_TEXT, cutoffs=[1, 2]
    )
    groups = torch.arange(3)
    for scores, arguments in (
        (to_texts, (images, texts, groups, IMAGE_OF_TEXT)),
        (to_images, (texts, images, IMAGE_OF_TEXT, groups)),
    ):
        ranks = np.array(rank_by_sorting(*arguments))
        assert scores.values == pytest.approx(
            {
                "recall@1": 100 * (ranks <= 1).mean(),
                "recall@2": 100 * (ranks <= 2).mean(),
                "MRR": 100 * (1 / ranks).mean(),
            }
        )


@pytest.mark.parametrize("num_similarities", [1, 3 * 40, 40 * 23])
def test_ranks_do_not_depend_on_the_chunk_size(monkeypatch, num_similarities):
    generator = torch.Generator().manual_seed(1)
    queries, candidates = (torch.randn(n, 5, generator=generator) for n in (23, 40))
    similarities = queries @ candidates.T
    groups = torch.arange(40) % 23
    expected = pair_retrieval.find_ranks(lambda rows: similarities[rows], torch.arange(23), groups)
    largest = 0

    def block(rows):
        nonlocal largest
        largest = max(largest, similarities[rows].numel())
        return similarities[rows]

    monkeypatch.setattr(weighted_knn, "MAX_SIMILARITIES", num_similarities)
    ranks = pair_retrieval.find_ranks(block, torch.arange(23), groups)
    assert ranks.tolist() == expected.tolist()
    assert largest == max(num_similarities, 40)  # at least one query at a time


def test_the_standard_error_of_independent_queries_is_that_of_the_mean():
    ranks = torch.tensor([1, 1, 2, 4, 8])
    scores = pair_retrieval.score_ranks(ranks, torch.arange(5), cutoffs=[1])
    outcomes = {"recall@1": np.array([100, 100, 0, 0, 0]), "MRR": 100 / ranks.numpy()}
    for name, values in outcomes.items():
        expected = values.std(ddof=1) / np.sqrt(5)
        assert scores.standard_errors[name] == pytest.approx(expected)


def test_equal_captions_of_an_image_add_no_certainty():
    values = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    once = pair_retrieval.clustered_error(values, torch.arange(5))
    repeated = values.repeat_interleave(4)
    groups = torch.arange(5).repeat_interleave(4)
    assert pair_retrieval.clustered_error(repeated, groups) == pytest.approx(once)
    assert np.isnan(pair_retrieval.clustered_error(values, torch.zeros(5, dtype=torch.int64)))


def test_embeddings_that_are_not_finite_are_refused():
    bad = torch.ones(3, 2)
    bad[1, 0] = torch.nan
    with pytest.raises(ValueError) as error:
        pair_retrieval.cosine_block(torch.ones(3, 2), bad)
    assert str(error.value) == (
        "1 of 3 embeddings of the candidates are not finite; evaluate an earlier checkpoint"
    )


def test_a_query_without_a_correct_candidate_is_refused():
    groups = torch.tensor([0, 5])
    with pytest.raises(ValueError) as error:
        pair_retrieval.find_ranks(lambda rows: torch.ones(2, 2), groups, torch.tensor([0, 1]))
    assert str(error.value) == (
        "1 of 2 queries have no correct candidate (first: query 1); leave them out"
    )


def test_tf_idf_compares_the_shared_words():
    training_texts = ["a motor vehicle", "a domestic animal", "the act of driving"]
    candidates = ["a vehicle with wheels", "an animal", "driving", "nothing in common"]
    queries = ["which vehicle is it", "he drives"]
    block = tf_idf.tf_idf_block(training_texts, queries, candidates)
    assert block(slice(0, 2)).argmax(dim=1).tolist()[0] == 0
    assert block(slice(1, 2)).abs().max() == 0  # no word in common
    block = tf_idf.tf_idf_block(training_texts, queries, candidates, has_ngrams=True)
    assert block(slice(1, 2)).argmax(dim=1).tolist() == [2]  # driv
