"""Retrieve the second text of each pair by the first.

The first text of every held-out item is a query that ranks the second texts of all held-out items
by the run's `method.similarity`. recall@k is the share of queries with a correct text
among the first k, and MRR is the mean of 1 / rank of the first correct text. Equal second texts
count as one, and an item with several second texts needs one of them. If the first text of an item
has alternatives, only the first one is a query, so that every item counts equally. Two baselines
compare words, or parts of words, weighted by tf-idf. The result is printed and saved to
RUN/eval/text_pairs.json.

    python -m ssl_pretrain.eval.text_pairs runs/simcse_nli
    # a run of single sentences on pairs of WordNet
    python -m ssl_pretrain.eval.text_pairs runs/simcse_wiki data.source=wordnet data.root= \
        'data.text_columns=[example,definition]'
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ssl_pretrain import rng
from ssl_pretrain.data.image_source import Source
from ssl_pretrain.eval import command_line, pair_retrieval, results, tf_idf
from ssl_pretrain.eval.frozen import sentences
from ssl_pretrain.eval.frozen.evaluation_split import UnlabeledError, open_split
from ssl_pretrain.eval.trained_run import TrainedRun
from ssl_pretrain.schema import POSITIVE_INT

MAX_TRAINING_ITEMS = 100_000  # training items whose texts determine the weights of words
BASELINES = {  # rows of the table, and whether they compare parts of words
    "shared words (tf-idf)": False,
    "shared parts of words (tf-idf)": True,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "--queries-per-item": {
        "type": POSITIVE_INT,
        "default": 1,
        "metavar": "N",
        "help": "alternatives of each first text that are queries, at most (default: 1)",
    },
}


@dataclass(frozen=True)
class TextPairs:
    """Queries and candidates. A candidate is correct for the queries of its group.

    Attributes:
        queries: First texts.
        query_groups: Group of each query, int64 (num_queries,).
        candidates: Second texts, which are all different.
        candidate_groups: Group of each candidate, int64 (num_candidates,).
    """

    queries: list[str]
    query_groups: Tensor
    candidates: list[str]
    candidate_groups: Tensor

    def with_distractors(self, texts: Sequence[str]) -> "TextPairs":
        """Return the same queries with more texts as wrong candidates."""
        known = set(self.candidates)
        more = [text for text in dict.fromkeys(texts) if text not in known]
        new_groups = 1 + int(self.candidate_groups.max()) + torch.arange(len(more))
        return replace(
            self,
            candidates=[*self.candidates, *more],
            candidate_groups=torch.cat([self.candidate_groups, new_groups]),
        )

    def score(self, similarities: Callable[[slice], Tensor]) -> pair_retrieval.RetrievalScores:
        """Return recall and MRR. `pair_retrieval.find_ranks` says what `similarities` is."""
        ranks = pair_retrieval.find_ranks(similarities, self.query_groups, self.candidate_groups)
        return pair_retrieval.score_ranks(ranks, self.query_groups)

    def score_shared_words(
        self, training_texts: Sequence[str], *, has_ngrams: bool
    ) -> pair_retrieval.RetrievalScores:
        """Return the scores of tf-idf, see `tf_idf.tf_idf_block`."""
        return self.score(
            tf_idf.tf_idf_block(
                training_texts, self.queries, self.candidates, has_ngrams=has_ngrams
            )
        )


def main(arguments: list[str]) -> None:
    """Run the command-line interface."""
    command_line.evaluate_sentences_and_print(
        command_line.build_sentence_parser("ssl_pretrain.eval.text_pairs", __doc__, OPTIONS),
        arguments,
        lambda run, options: evaluate(run, options.queries_per_item),
    )


def evaluate(run: TrainedRun, queries_per_item: int = 1) -> dict[str, Any]:
    """Measure recall and MRR in percent and save them to RUN/eval/text_pairs.json.

    Args:
        run: Run to evaluate.
        queries_per_item: Largest number of queries per item.

    Returns:
        The content of the result file.

    Raises:
        ValueError: If there is no validation split with pairs, or an embedding is not finite.
    """
    start = time.monotonic()
    source = open_split(run, "val")
    if source.num_texts < 2:
        raise UnlabeledError(
            f"data.text_columns: the items of {source.full_path} have {source.num_texts or 'no'} "
            "text, and pairs need two; name the columns of two texts, as in "
            "data.text_columns=[example,definition], or give a file of pairs in data.val"
        )
    pairs = collect_pairs(source, queries_per_item)
    training_texts = read_second_texts(open_split(run, "train"), MAX_TRAINING_ITEMS)
    rows = []
    for name, has_ngrams in BASELINES.items():
        rows.append(_row(name, pairs.score_shared_words(training_texts, has_ngrams=has_ngrams)))
    for name in ("random, as built", "pretrained"):
        encoder = sentences.build_encoder(run, is_pretrained=name == "pretrained")
        rows.append(_row(name, pairs.score(_similarities(encoder, pairs))))
        similarity = encoder.similarity  # the same for both rows
    protocol = {
        **sentences.describe_encoder(run),
        "pairs": f"{source.full_path}: {len(source):,} held-out items, {len(pairs.queries):,}"
        f" queries, at most {queries_per_item} per item, and {len(pairs.candidates):,} different"
        " candidates",
        "ranking": f"by the {similarity} of embeddings; ties count against the query; a"
        " third text of an item is left out",
        "tf-idf": f"cosine of weighted words, or of sequences of 3 to 5 characters; the weights"
        f" come from {len(training_texts):,} texts of the training split",
        "deviation": "standard error over the queries; items that share a second text depend on"
        " each other",
    }
    seconds = time.monotonic() - start
    return results.save(run.path, "text_pairs", protocol, rows, run.provenance(), seconds, "%")


def collect_pairs(source: Source, queries_per_item: int = 1) -> TextPairs:
    """Return the queries and candidates of a source whose items have two texts or more."""
    queries: list[str] = []
    item_of_query: list[int] = []
    answers: list[str] = []
    item_of_answer: list[int] = []
    for item in range(len(source)):
        first, second = source.texts(item)[:2]
        own_queries = first[:queries_per_item]
        queries += own_queries
        item_of_query += [item] * len(own_queries)
        answers += second
        item_of_answer += [item] * len(second)
    groups = pair_retrieval.group_items(answers, torch.tensor(item_of_answer))
    item_of_candidate = dict(zip(answers, item_of_answer))  # any of the items that share it
    return TextPairs(
        queries,
        groups[item_of_query],
        list(item_of_candidate),
        groups[list(item_of_candidate.values())],
    )


def read_second_texts(source: Source, max_items: int) -> list[str]:
    """Return the second texts of at most `max_items` random items, or their only texts."""
    column = min(1, source.num_texts - 1)
    order = rng.permutation(0, 0, len(source), rng.Purpose.SUBSET)
    return [text for item in order[:max_items].tolist() for text in source.texts(item)[column]]


def _similarities(encoder: sentences.SentenceEncoder, pairs: TextPairs) -> Callable[..., Tensor]:
    """Return the similarities of the queries with the candidates, for `TextPairs.score`."""
    is_dot = encoder.similarity == "dot"
    block = pair_retrieval.dot_block if is_dot else pair_retrieval.cosine_block
    return block(encoder.embed(pairs.queries), encoder.embed(pairs.candidates, second=True))


def _row(name: str, scores: pair_retrieval.RetrievalScores) -> results.Row:
    """Return a row of the table and print it."""
    row = results.Row(name, scores.values, scores.standard_errors)
    results.print_progress(row.summary())
    return row


if __name__ == "__main__":
    command_line.execute(main, "ssl_pretrain.eval.text_pairs")
