"""SimCSE (Gao et al., EMNLP 2021, arXiv:2104.08821), and other training on pairs of sentences.

Sentences alone: a sentence is encoded twice, and only dropout makes the two embeddings differ. The
other sentences of the global batch are negatives. Pairs and triplets: the second sentence is the
positive, and the third one a hard negative, as in supervised SimCSE.

Other settings give related methods. The mean of the tokens without a projector is the architecture
of Sentence-BERT (arXiv:1908.10084), trained with the negatives of the batch instead of its losses.
Two encoders with dot products are dense passage retrieval (arXiv:2004.04906). The projector and the
defaults follow princeton-nlp/SimCSE at 49fa580 (simcse/models.py).
"""

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ssl_pretrain.losses import similarity
from ssl_pretrain.losses.sentence_pairs import sentence_pairs
from ssl_pretrain.methods.base import Embeddings, LossOutput, Method, SentenceMethodConfig
from ssl_pretrain.models import text_encoders
from ssl_pretrain.models.text_encoders import TextEncoder
from ssl_pretrain.schema import DIMENSIONLESS, setting
from ssl_pretrain.views.batch import Batch, TextSet

SMALL_CONFIG = {"temperature": 0.05}
PROJECTOR_STD = 0.02  # standard deviation of BERT's initial weights
NUM_TEXTS = {"sentences": 1, "pairs": 2, "triplets": 3}  # by `method.texts`


@dataclass
class Config(SentenceMethodConfig):
    """Configuration of SimCSE. The defaults are those of the unsupervised variant."""

    name: str = "simcse"
    texts: Literal["sentences", "pairs", "triplets"] = setting(
        "sentences",
        "sentences: each is encoded twice with different dropout. pairs: the second text is the "
        "positive. triplets: the third one is a hard negative.",
    )
    temperature: float = setting(0.05, "Divisor of the similarities.")
    similarity: Literal["cosine", "dot"] = setting(
        "cosine", "How embeddings are compared. dot: without normalization, as in DPR."
    )
    hard_negative_weight: float = setting(
        0.0,
        "Logarithm of the weight of an anchor's own hard negative, for triplets. It is added to "
        "the logit, so that 0 means a weight of 1.",
        minimum=-100,
        maximum=100,
        unit=DIMENSIONLESS,
    )
    encoders: Literal["shared", "separate"] = setting(
        "shared",
        "shared: one encoder for all texts. separate: one for the first text and another one for "
        "the others, as in DPR. Both start with the same weights.",
    )
    projector: Literal["tanh", "none"] = setting(
        "tanh",
        "tanh: a linear layer and tanh on the features during training, as in SimCSE. none: the "
        "features themselves, as in Sentence-BERT and DPR.",
    )
    evaluation_output: Literal["auto", "features", "projected"] = setting(
        "auto",
        "What evaluations compare. auto: features for sentences and the projector's output for "
        "pairs and triplets, as the authors do.",
    )

    @property
    def num_texts(self) -> int:
        """Number of texts per item."""
        return NUM_TEXTS[self.texts]

    def check(self, run: Any, world_size: int) -> None:
        """Raise ValueError if settings contradict each other."""
        encoder = run.text_encoder
        if self.texts == "sentences" and not text_encoders.has_dropout(encoder):
            raise ValueError(
                "method.texts: sentences makes the two embeddings of a sentence differ by dropout, "
                f"and text_encoder.name={encoder.name} with text_encoder.dropout="
                f"{encoder.dropout:g} has none; set text_encoder.name=bert and "
                "text_encoder.dropout=0.1"
            )
        if self.texts == "sentences" and self.encoders == "separate":
            raise ValueError(
                "method.encoders: separate needs two texts per item, and method.texts is "
                "sentences; set method.texts=pairs"
            )
        if self.texts != "triplets" and self.hard_negative_weight:
            raise ValueError(
                f"method.hard_negative_weight: {self.hard_negative_weight:g} needs hard negatives, "
                f"and method.texts is {self.texts}; set method.texts=triplets"
            )
        if self.evaluation_output == "projected" and self.projector == "none":
            raise ValueError(
                "method.evaluation_output: projected needs a projector, and method.projector is "
                "none; set method.projector=tanh"
            )

    def build_for_sentences(self, text_encoder: TextEncoder) -> Method:
        """Build SimCSE on top of a text encoder."""
        return SimCSE(self, text_encoder)


class SimCSE(Method):
    """Contrastive learning of sentences, pairs or triplets.

    Args:
        config: Configuration of the method.
        text_encoder: Encoder of the first text, and of the others if it is shared.
    """

    couples = "embeddings"
    negatives = "texts"

    def __init__(self, config: Config, text_encoder: TextEncoder):
        super().__init__(config, text_encoder)
        self.projector = _projector(text_encoder.feature_dim, config.projector)
        self.has_two_encoders = config.encoders == "separate"
        if self.has_two_encoders:
            self.second_encoder = copy.deepcopy(text_encoder)
            self.second_projector = copy.deepcopy(self.projector)
        uses_projector = config.texts != "sentences" and config.projector != "none"
        if config.evaluation_output != "auto":
            uses_projector = config.evaluation_output == "projected"
        self.evaluates_projector = uses_projector

    def forward(self, batch: Batch) -> Embeddings:
        """Return the embeddings of the anchors, the positives and any hard negatives.

        Each has the shape (local_batch, dim). Texts that share an encoder go through it together.
        """
        texts = list(batch.texts)
        if len(texts) != self.config.num_texts:
            raise ValueError(
                f"simcse: method.texts={self.config.texts} takes {self.config.num_texts} texts per "
                f"item, got {len(texts)}; set data.text_columns"
            )
        if self.config.texts == "sentences":
            texts = [texts[0], texts[0]]
        if self.has_two_encoders:
            embeddings = self._encode(texts[:1]) + self._encode(texts[1:], second=True)
        else:
            embeddings = self._encode(texts)
        return dict(zip(("z_a", "z_b", "z_negative"), embeddings))

    def loss(self, embeddings: Embeddings, targets: Embeddings) -> LossOutput:
        """Return the cross entropy of each anchor with its positive."""
        z_a, z_b = embeddings["z_a"], embeddings["z_b"]
        loss = sentence_pairs(
            z_a,
            z_b,
            embeddings.get("z_negative"),
            temperature=self.config.temperature,
            similarity=self.config.similarity,
            hard_negative_weight=self.config.hard_negative_weight,
        )
        logs = {
            "sentence_pairs": loss,
            "positive_cosine": similarity.mean_cosine(z_a.detach(), z_b.detach()),
        }
        return LossOutput(loss, logs)

    def embed_texts(self, text: TextSet, *, second: bool = False) -> Tensor:
        """Return the embeddings that evaluations compare, (n, dim).

        Args:
            text: The texts.
            second: True to use the encoder of the second text, if there are two encoders.
        """
        encoder, projector = self._networks(second)
        embeddings: Tensor = encoder(text.ids, text.valid)
        return projector(embeddings) if self.evaluates_projector else embeddings

    def _encode(self, texts: list[TextSet], second: bool = False) -> list[Tensor]:
        """Return the projected embeddings of several texts per item."""
        encoder, projector = self._networks(second)
        ids = torch.cat([text.ids for text in texts])
        valid = torch.cat([text.valid for text in texts])
        return list(projector(encoder(ids, valid)).chunk(len(texts)))

    def _networks(self, second: bool) -> tuple[nn.Module, nn.Module]:
        if second and self.has_two_encoders:
            return self.second_encoder, self.second_projector
        return self.backbone, self.projector


def _projector(width: int, kind: str) -> nn.Module:
    if kind == "none":
        return nn.Identity()
    linear = nn.Linear(width, width)
    nn.init.normal_(linear.weight, std=PROJECTOR_STD)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(linear, nn.Tanh())
