"""Find the definition of an example sentence in WordNet by the words that they share.

PYTHONPATH=. OMP_NUM_THREADS=1 .venv/bin/python tests/bench/wordnet_tf_idf.py

Each synset of the validation split has one query, its first example. The candidates are the
definitions of the validation split, or of all synsets. Equal definitions are one candidate. The
vocabulary and the weights come from the definitions of the training split, of all synsets and not
only of those with examples. In the second half, the definitions are preceded by their words.
"""

from ssl_pretrain.data.config import DataConfig
from ssl_pretrain.data.sources import open_source
from ssl_pretrain.eval import text_pairs


def measure(column: str, has_ngrams: bool) -> None:
    """Print the scores among the validation definitions and among all of them."""
    val = open_source(DataConfig(source="wordnet", text_columns=["example", column]), "val")
    train = open_source(DataConfig(source="wordnet", text_columns=[column]), "train")
    training_texts = text_pairs.read_second_texts(train, len(train))
    pairs = text_pairs.collect_pairs(val)
    for name, searched in (("validation", pairs), ("all", pairs.with_distractors(training_texts))):
        scores = searched.score_shared_words(training_texts, has_ngrams=has_ngrams)
        numbers = ", ".join(
            f"{key} {value:.1f} ± {scores.standard_errors[key]:.1f}"
            for key, value in scores.values.items()
        )
        kind = "3 to 5 characters" if has_ngrams else "words"
        print(
            f"{column}, {kind}, {len(pairs.queries)} queries, {name} {len(searched.candidates)}: "
            f"{numbers}"
        )


if __name__ == "__main__":
    for column in ("definition", "entry"):
        for has_ngrams in (False, True):
            measure(column, has_ngrams)
