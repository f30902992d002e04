"""Retrieval of texts by the words that they share, the baseline of learned text embeddings.

The words are weighted by scikit-learn's tf-idf, with logarithmic counts, and compared by cosine.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def tf_idf_block(
    training_texts: Sequence[str],
    queries: Sequence[str],
    candidates: Sequence[str],
    *,
    has_ngrams: bool = False,
) -> Callable[[slice], Tensor]:
    """Return a function that computes similarities for `pair_retrieval.find_ranks`.

    Args:
        training_texts: Texts that determine the vocabulary and the weights.
        queries: Texts of the queries.
        candidates: Texts of the candidates.
        has_ngrams: Compare the sequences of 3 to 5 characters in words, instead of whole words, so
            that inflected forms match.
    """
    vectorizer = _fit(training_texts, has_ngrams)
    query_rows = vectorizer.transform(queries)
    candidate_columns = vectorizer.transform(candidates).T.tocsr()

    def similarities(rows: slice) -> Tensor:
        return torch.from_numpy((query_rows[rows] @ candidate_columns).toarray())

    return similarities


def paired_similarities(
    training_texts: Sequence[str], first: Sequence[str], second: Sequence[str]
) -> np.ndarray:
    """Return the similarity of each pair of texts, float64 (n,). It is 0 if they share no word.

    Args:
        training_texts: Texts that determine the vocabulary and the weights.
        first: First text of each pair.
        second: Second text of each pair.
    """
    vectorizer = _fit(training_texts)
    products = vectorizer.transform(first).multiply(vectorizer.transform(second))
    return np.asarray(products.sum(axis=1)).ravel()


def _fit(training_texts: Sequence[str], has_ngrams: bool = False) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer  # slow to import

    analysis = {"analyzer": "char_wb", "ngram_range": (3, 5)} if has_ngrams else {}
    return TfidfVectorizer(sublinear_tf=True, **analysis).fit(training_texts)
