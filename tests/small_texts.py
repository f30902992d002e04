"""A small text encoder and random captions, for the tests of methods with texts."""

from dataclasses import replace

import torch

from ssl_pretrain.methods.base import (
    Method,
    MethodConfig,
    SentenceMethodConfig,
    TextMethodConfig,
)
from ssl_pretrain.models import text_encoders
from ssl_pretrain.models.components import Backbone
from ssl_pretrain.models.text_encoders import TextEncoder, TextEncoderConfig
from ssl_pretrain.views.batch import Batch, TextSet

VOCABULARY_SIZE, LENGTH = 20, 6
END = VOCABULARY_SIZE - 1  # CLIP's end token has the largest number


def build_text_encoder(**settings: object) -> TextEncoder:
    config = TextEncoderConfig(**{"width": 8, "layers": 2, "heads": 2, **settings})
    return text_encoders.build(config, VOCABULARY_SIZE, LENGTH)


def build_method(config: MethodConfig, backbone: Backbone, dropout: float = 0.1) -> Method:
    """Build a method, with a small text encoder if it takes texts.

    Methods of sentences have a BERT with this rate of dropout.
    """
    if isinstance(config, SentenceMethodConfig):
        return config.build_for_sentences(build_text_encoder(name="bert", dropout=dropout))
    if isinstance(config, TextMethodConfig):
        return config.build_with_texts(backbone, build_text_encoder())
    return config.build(backbone)


def random_texts(rows: int, step: int, num_texts: int = 1) -> tuple[TextSet, ...]:
    """Return texts of different lengths, each with an end token and padding of 0."""
    generator = torch.Generator().manual_seed(1000 + step)
    sets = []
    for _ in range(num_texts):
        ids = torch.randint(1, END, (rows, LENGTH), generator=generator)
        lengths = torch.randint(2, LENGTH + 1, (rows, 1), generator=generator)
        positions = torch.arange(LENGTH)
        ids[positions == lengths - 1] = END
        valid = positions < lengths
        sets.append(TextSet(ids * valid, valid))
    return tuple(sets)


def with_texts(batch: Batch, texts: tuple[TextSet, ...]) -> Batch:
    return replace(batch, texts=texts)
