"""Retrieval of texts by the words that they share, the baseline of learned text embeddings.

The words are weighted by scikit-learn's tf-idf, with logarithmic counts, and compared by cosine.
"""

from collections.abc import Callable, Sequence

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
    from sklearn.feature_extraction.text import TfidfVectorizer  # slow to import

    analysis = {"analyzer": "char_wb", "ngram_range": (3, 5)} if has_ngrams else {}
    vectorizer = TfidfVectorizer(sublinear_tf=True, **analysis).fit(training_texts)
    query_rows = vectorizer.transform(queries)
    candidate_columns = vectorizer.transform(candidates).T.tocsr()

    def similarities(rows: slice) -> Tensor:
        return torch.from_numpy((query_rows[rows] @ candidate_columns).toarray())

    return similarities
