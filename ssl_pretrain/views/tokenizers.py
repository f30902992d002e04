"""Turn texts into tokens with a tokenizer of open_clip or of transformers."""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple, Protocol

import numpy as np

from ssl_pretrain.system import optional_packages
from ssl_pretrain.system.error_text import first_line
from ssl_pretrain.views.text_recipe import TextConfig

CLIP = "clip"
CLIP_VOCABULARY_SIZE = 49408


class TokenArrays(NamedTuple):
    """The tokens of several texts, as arrays that processes send to each other."""

    ids: np.ndarray  # int32 (n, length)
    valid: np.ndarray  # bool (n, length), False for padding


class Tokenizer(Protocol):
    """A picklable function of texts that returns their tokens."""

    @property
    def vocabulary_size(self) -> int:
        """Vocabulary size."""
        ...

    def __call__(self, texts: Sequence[str]) -> TokenArrays:
        """Return the tokens of each text."""
        ...


class ClipTokenizer:
    """CLIP's byte pair encoding, by open_clip.

    A text is cleaned, lowercased, and wrapped in start and end tokens. A text that is too long is
    cut and keeps its end token. The padding is 0.
    """

    vocabulary_size = CLIP_VOCABULARY_SIZE

    def __init__(self, length: int):
        optional_packages.require("text.tokenizer", "open_clip", "text")
        from open_clip.tokenizer import SimpleTokenizer

        self._tokenizer = SimpleTokenizer(context_length=length)

    def __call__(self, texts: Sequence[str]) -> TokenArrays:
        """Return the tokens of each text, up to its end token."""
        ids = self._tokenizer(list(texts)).numpy().astype(np.int32)
        ends = np.argmax(ids == self._tokenizer.eot_token_id, axis=1)
        return TokenArrays(ids, np.arange(ids.shape[1]) <= ends[:, None])


class TransformersTokenizer:
    """A tokenizer of the Hugging Face Hub or of a folder, by transformers."""

    def __init__(self, name: str, length: int):
        self._tokenizer, self._length = _load(name), length

    @property
    def vocabulary_size(self) -> int:
        """Vocabulary size."""
        return len(self._tokenizer)

    def __call__(self, texts: Sequence[str]) -> TokenArrays:
        """Return the tokens of each text, with the tokenizer's own padding."""
        tokens = self._tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=self._length
        )
        valid = np.array(tokens["attention_mask"], np.bool_)
        return TokenArrays(np.array(tokens["input_ids"], np.int32), valid)


def build(config: TextConfig) -> Tokenizer:
    """Return the tokenizer of a configuration.

    Raises:
        ValueError: If a package is missing, or the tokenizer cannot be loaded.
    """
    if config.tokenizer == CLIP:
        return ClipTokenizer(config.length)
    return TransformersTokenizer(config.tokenizer, config.length)


def vocabulary_size(config: TextConfig) -> int:
    """Return the number of different tokens.

    Raises:
        ValueError: If a package is missing, or the tokenizer cannot be loaded.
    """
    if config.tokenizer == CLIP:
        return CLIP_VOCABULARY_SIZE
    return build(config).vocabulary_size


@cache
def _load(name: str) -> Any:
    optional_packages.require("text.tokenizer", "transformers", "text")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # the library raises many kinds of errors
        reason = first_line(error)
        raise ValueError(
            f"text.tokenizer: {name!r} cannot be loaded ({reason}); give clip, the name of a "
            "tokenizer on the Hugging Face Hub, or a folder with a tokenizer"
        ) from error
    tokenizer.padding_side = "right"  # the first token of a text is at position 0
    if tokenizer.pad_token is None:
        raise ValueError(
            f"text.tokenizer: {name} has no token for padding; choose another tokenizer"
        )
    return tokenizer
