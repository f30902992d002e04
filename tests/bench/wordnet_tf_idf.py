"""Find the definition of an example sentence in WordNet by the words that they share.

PYTHONPATH=. OMP_NUM_THREADS=1 .venv/bin/python tests/bench/wordnet_tf_idf.py

Each synset of the validation split has one query, its first example. The candidates are the
definitions of the validation split, or of all synsets. Equal definitions are one candidate. The
vocabulary and the weights come from the definitions of the training split. In the second half, the
definitions are preceded by their words.
"""

import torch

from ssl_pretrain.data.config import DataConfig
from ssl_pretrain.data.sources import open_source
from ssl_pretrain.eval import pair_retrieval, tf_idf


def read_texts(split: str, column: str) -> list[str]:
    """Return the first alternative of a text of every synset in a split."""
    columns = list(dict.fromkeys(["example", column])) if split == "val" else [column]
    source = open_source(DataConfig(source="wordnet", text_columns=columns), split)
    return [source.texts(index)[columns.index(column)][0] for index in range(len(source))]


def measure(column: str, has_ngrams: bool) -> None:
    """Print the scores among the validation definitions and among all of them."""
    queries, answers = read_texts("val", "example"), read_texts("val", column)
    training_texts = read_texts("train", column)
    for name, texts in (("validation", answers), ("all", [*answers, *training_texts])):
        candidates = list(dict.fromkeys(texts))
        groups = {text: group for group, text in enumerate(candidates)}
        query_groups = torch.tensor([groups[text] for text in answers])
        block = tf_idf.tf_idf_block(training_texts, queries, candidates, has_ngrams=has_ngrams)
        ranks = pair_retrieval.find_ranks(block, query_groups, torch.arange(len(candidates)))
        scores = pair_retrieval.score_ranks(ranks, query_groups)
        numbers = ", ".join(
            f"{key} {value:.1f} ± {scores.standard_errors[key]:.1f}"
            for key, value in scores.values.items()
        )
        kind = "3 to 5 characters" if has_ngrams else "words"
        print(f"{column}, {kind}, {len(queries)} queries, {name} {len(candidates)}: {numbers}")


if __name__ == "__main__":
    for column in ("definition", "entry"):
        for has_ngrams in (False, True):
            measure(column, has_ngrams)
