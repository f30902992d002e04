"""The captions of images: the usual names of their columns, their values, and a compact table."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

NO_CAPTIONS = "none"  # value of data.caption_column
# Usual names of a column, or of the key of a dict, most usual first.
CAPTION_COLUMNS = ("caption", "captions", "text", "title", "sentence", "sentences", "description")


def clean_captions(value: object) -> list[str]:
    """Return the captions in a value without surrounding white space.

    A text is one caption, and a list of texts has several. Blank texts, and values of other types,
    are no captions. Every caption can be encoded in UTF-8.
    """
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, (list, tuple)):
        return []
    texts = (_encodable(text.strip()) for text in values if isinstance(text, str))
    return [text for text in texts if text]


def _encodable(text: str) -> str:
    """Return a text with a question mark for each half of a character that has only one."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def are_captions(value: object) -> bool:
    """Return True for a text, a list of texts, and None, which is a missing caption."""
    is_list = isinstance(value, (list, tuple)) and all(isinstance(text, str) for text in value)
    return value is None or isinstance(value, str) or is_list


@dataclass(frozen=True)
class PackedCaptions:
    """The captions of n images in three arrays, which are fast to send to a loader worker."""

    packed_texts: np.ndarray  # uint8, concatenated captions in UTF-8
    text_ends: np.ndarray  # int64, end of each caption in `packed_texts`
    image_ends: np.ndarray  # int64 (n,), end of each image's captions in `text_ends`

    @classmethod
    def pack(cls, captions: Iterable[Sequence[str]]) -> Self:
        """Pack the captions of images, one sequence per image."""
        encoded = [[text.encode() for text in texts] for texts in captions]
        texts = list(itertools.chain.from_iterable(encoded))
        return cls(
            np.frombuffer(b"".join(texts), np.uint8),
            np.cumsum([len(text) for text in texts], dtype=np.int64),
            np.cumsum([len(texts_of_image) for texts_of_image in encoded], dtype=np.int64),
        )

    def captions(self, index: int) -> list[str]:
        """Return the captions of one image."""
        first, last = int(self.image_ends[index - 1]) if index else 0, int(self.image_ends[index])
        ends = self.text_ends[first:last].tolist()
        starts = [int(self.text_ends[first - 1]) if first else 0, *ends]
        texts = (self.packed_texts[start:end].tobytes() for start, end in zip(starts, ends))
        return [text.decode() for text in texts]

    def take(self, indices: np.ndarray) -> Self:
        """Return the captions of the images at `indices`, in that order."""
        return self.pack(self.captions(index) for index in indices.tolist())

    def identity(self) -> bytes:
        """Return bytes that differ between different captions."""
        columns = (self.image_ends, self.text_ends, self.packed_texts)
        return b"captions" + b"".join(column.tobytes() for column in columns)
