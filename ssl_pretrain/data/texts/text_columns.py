"""Choose the columns of a table that hold the texts, and clean the texts in a cell."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ssl_pretrain.data.config import MAX_TEXTS, DataConfig
from ssl_pretrain.data.messages import abbreviate

# Titles in lower case, reduced to letters and digits: the sentence or query, its positive, and its
# hard negative. They are those of SimCSE, sentence-transformers, DPR, Tevatron and BGE.
_USUAL_TITLES = (
    (
        *("sent0", "anchor", "query", "question", "sentence1", "sentencea", "text1", "texta"),
        *("premise", "sentence", "text", "definition"),
    ),
    (
        *("sent1", "positive", "pos", "positives", "positivepassage", "positivepassages"),
        *("positivectxs", "answer", "response", "sentence2", "sentenceb", "text2", "textb"),
        *("hypothesis", "passage", "document"),
    ),
    (
        *("hardneg", "hardnegative", "hardnegatives", "hardnegativectxs", "negative", "neg"),
        *("negatives", "negativepassage", "negativepassages"),
    ),
)
_LABEL_TITLES = ("label", "labels", "class", "classlabel")
_NUMBERING_TITLES = ("", "index", "idx", "id", "unnamed0")
NO_LABELS = "none"  # value of data.label_column


class TextColumns(NamedTuple):
    """Positions of the columns of the texts, and of the labels or None."""

    texts: list[int]
    label: int | None


def choose_columns(titles: Sequence[str], config: DataConfig, path: str) -> TextColumns:
    """Choose columns by `data.text_columns`, by their usual titles, or else in order.

    Args:
        titles: Titles of all columns.
        config: Its keys `text_columns` and `label_column` may name columns.
        path: The file, for messages.

    Raises:
        ValueError: If a named column is absent, or the columns cannot be told apart.
    """
    label = _choose_label(titles, config.label_column, path)
    if config.text_columns:
        texts = [_find(titles, name, "text_columns", path) for name in config.text_columns]
        return TextColumns(texts, label)
    keys = [_key(title) for title in titles]
    texts = [next((keys.index(key) for key in role if key in keys), -1) for role in _USUAL_TITLES]
    if -1 not in texts[:2]:
        return TextColumns([column for column in texts if column >= 0], label)
    others = [
        column
        for column, key in enumerate(keys)
        if column != label and key not in _NUMBERING_TITLES and key not in _LABEL_TITLES
    ]
    if texts[0] >= 0 and texts[1:] == [-1, -1]:
        return TextColumns([texts[0]], label)
    if not 1 <= len(others) <= MAX_TEXTS:
        raise ValueError(
            f"data.text_columns: {path} has the columns {abbreviate(titles)}, of which none have "
            "the usual names; name those of the texts, as in "
            f"data.text_columns=[{','.join(list(titles)[:2])}]"
        )
    return TextColumns(others, label)


def has_usual_title(titles: Sequence[str]) -> bool:
    """Return True if a title is one that columns of texts usually have."""
    return any(_key(title) in role for title in titles for role in _USUAL_TITLES)


def split_alternatives(value: Any) -> list[str]:
    """Return the texts of a value: a text, a passage with a title, or a list of either.

    White space around a text is removed, and empty texts are left out.

    Raises:
        TypeError: If the value is of another kind.
    """
    if value is None:
        return []
    if isinstance(value, str):
        return [text] if (text := value.strip()) else []
    if isinstance(value, Mapping) and "text" in value:
        texts = [text for key in ("title", "text") for text in split_alternatives(value.get(key))]
        return [" ".join(texts)] if texts else []
    if isinstance(value, list | tuple):
        return [text for entry in value for text in split_alternatives(entry)]
    raise TypeError(f"{value!r} is no text")


def _choose_label(titles: Sequence[str], name: str, path: str) -> int | None:
    if name == NO_LABELS:
        return None
    if name:
        return _find(titles, name, "label_column", path)
    return next((i for i, title in enumerate(titles) if _key(title) in _LABEL_TITLES), None)


def _find(titles: Sequence[str], name: str, key: str, path: str) -> int:
    if name not in titles:
        raise ValueError(
            f"data.{key}: {path} has no column {name!r}; it has {abbreviate(list(titles))}"
        )
    return titles.index(name)


def _key(title: str) -> str:
    return re.sub(r"[^a-z0-9]", "", title.lower())
