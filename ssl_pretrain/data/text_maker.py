"""Draw the texts of items, such as one of an image's captions, and turn them into tokens."""

import numpy as np

from ssl_pretrain import rng
from ssl_pretrain.data.image_source import Source
from ssl_pretrain.data.images import UnreadableImage
from ssl_pretrain.views import text_recipe, tokenizers
from ssl_pretrain.views.text_recipe import TextConfig
from ssl_pretrain.views.tokenizers import TokenArrays, Tokenizer


class TextMaker:
    """Chooses and tokenizes the texts of a source's items, in the workers.

    A text is a pure function of seed, epoch and item, as a view is. A maker without a configuration
    makes no texts, for methods that take none.

    Args:
        source: The items.
        config: How texts are chosen and tokenized, or None.
        seed: Seed of the run.

    Raises:
        ValueError: If the source has no such texts, or the tokenizer cannot be loaded.
    """

    def __init__(self, source: Source, config: TextConfig | None = None, seed: int = 0):
        self.source, self.config, self.seed = source, config, seed
        self.num_texts, self.length = 0, 0
        self._tokenizer: Tokenizer | None = None
        self._texts_ahead: dict[int, list[list[str]]] = {}
        if config is None:
            return
        _check_source(source, config)
        self.num_texts = count_texts(source, config)
        self.length = config.length
        self._tokenizer = tokenizers.build(config)

    def read_ahead(self, index: int) -> str:
        """Read an item's texts for the next call of `make`.

        Reading them may be a request to an object store, so they are kept until then.

        Returns:
            Why the texts are missing, or an empty string if they are not.
        """
        if self.config is None:
            return ""
        try:
            alternatives = self._read(index)
        except UnreadableImage as error:
            return str(error)
        if not all(alternatives):
            missing = "caption" if self.config.captions == "stored" else "class"
            return f"{self.source.name(index)}: it has no {missing}"
        self._texts_ahead[index] = alternatives
        return ""

    def make(
        self, shown_indices: np.ndarray, epoch: int, indices: np.ndarray
    ) -> tuple[TokenArrays, ...]:
        """Return the tokens of several items, one set per text of an item.

        Args:
            shown_indices: Indices of the items, or of those that replace them, (n,).
            epoch: Number of completed passes over the data.
            indices: Indices of the items, which determine the choice among several captions, (n,).
        """
        if self._tokenizer is None:
            return ()
        texts = [
            self._draw(shown_index, epoch, index)
            for shown_index, index in zip(shown_indices.tolist(), indices.tolist(), strict=True)
        ]
        return tuple(self._tokenizer(slot) for slot in zip(*texts, strict=True))

    def empty(self, num_items: int) -> tuple[TokenArrays, ...]:
        """Return arrays for the tokens of a number of items, without values."""
        shape = (num_items, self.length)
        return tuple(
            TokenArrays(np.empty(shape, np.int32), np.empty(shape, np.bool_))
            for _ in range(self.num_texts)
        )

    def _draw(self, shown_index: int, epoch: int, index: int) -> list[str]:
        """Return one of the alternatives of each text of an item."""
        texts = []
        alternatives_by_slot = self._texts_ahead.pop(shown_index, None) or self._read(shown_index)
        for slot, alternatives in enumerate(alternatives_by_slot):
            number = rng.uniform(self.seed, epoch, index, slot, rng.Purpose.CAPTION, 1)[0, 0]
            texts.append(alternatives[int(number * len(alternatives))])
        return texts

    def _read(self, index: int) -> list[list[str]]:
        """Return the texts from which one is drawn, for each text of an item."""
        assert self.config is not None, "a maker without a configuration makes no texts"
        if self.config.captions == "stored":
            return self.source.texts(index)
        label = self.source.label(index)
        if label < 0:
            return [[]]
        return [text_recipe.fill_templates(self.config, self.source.classes[label])]


def count_texts(source: Source, config: TextConfig) -> int:
    """Return the number of texts per item. The name of a class in a template is one text."""
    return 1 if config.captions == "class_names" else source.num_texts


def _check_source(source: Source, config: TextConfig) -> None:
    """Raise ValueError if a source has no texts of the configured kind."""
    if config.captions == "stored" and not source.num_texts:
        raise ValueError(
            f"text.captions: {source.full_path} has no captions; give shards with .txt or .json, "
            "or a table with data.caption_column, or set text.captions=class_names"
        )
    if config.captions == "class_names" and not source.classes:
        raise ValueError(
            f"text.captions: class_names needs classes, and {source.full_path} has none; put the "
            "images in one folder per class, or set text.captions=stored"
        )
