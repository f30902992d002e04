"""Embeddings of sentences: texts in batches through a network of a run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ssl_pretrain.eval import pair_retrieval, run_method
from ssl_pretrain.eval.trained_run import TrainedRun
from ssl_pretrain.views import tokenizers
from ssl_pretrain.views.batch import TextSet

TEXTS_PER_BATCH = 256


@dataclass
class SentenceEncoder:
    """The method of a run, which embeds sentences.

    Attributes:
        run: The run.
        method: The method, in evaluation mode on the run's device.
        tokenize: The run's tokenizer.
    """

    run: TrainedRun
    method: Any
    tokenize: tokenizers.Tokenizer

    @property
    def similarity(self) -> str:
        """Name of the similarity that the method compares by, "cosine" or "dot"."""
        return getattr(self.run.config.method, "similarity", "cosine")

    def embed(self, sentences: Sequence[str], *, second: bool = False) -> Tensor:
        """Return the embeddings that are compared at test time, float32 (n, dim).

        Args:
            sentences: At least one sentence.
            second: Embed the second texts of pairs, which may have an encoder of their own.

        Raises:
            ValueError: If an embedding is not finite.
        """
        network = partial(self.method.embed_texts, second=second)
        embeddings = embed_in_batches(self.run, self.tokenize, network, sentences)
        pair_retrieval.check_finite("sentences", embeddings)
        return embeddings


def build_encoder(run: TrainedRun, is_pretrained: bool = True) -> SentenceEncoder:
    """Build the encoder of a run in evaluation mode.

    Args:
        run: The run, whose method takes no images.
        is_pretrained: True for the weights of the checkpoint, False for random weights from the
            run's seed, whatever weights the run started with.

    Raises:
        ValueError: If the weights do not fit the configuration, or the method has no `embed_texts`.
    """
    method = run_method.build_method(run, is_pretrained, run.config.backbone)
    if not hasattr(method, "embed_texts"):  # a method of the user
        raise ValueError(
            f"{run.path}: method {run.config.method.name} has no function embed_texts(text, *, "
            "second), which evaluations of sentences call; add it, as in methods/simcse.py"
        )
    method.eval().to(run.device)
    return SentenceEncoder(run, method, tokenizers.build(run.config.text))


def describe_encoder(run: TrainedRun) -> dict[str, Any]:
    """Return the protocol entries that all evaluations of sentences share."""
    return {
        "network": f"{run.network} of {run.checkpoint_path.name}, {run.config.text_encoder.name}",
        "random": "random weights from the run's seed",
        "tokens": f"tokenizer {run.config.text.tokenizer}, at most {run.config.text.length} per"
        " text",
        "precision": run.describe_precision(),
    }


@torch.no_grad()
def embed_in_batches(
    run: TrainedRun,
    tokenize: tokenizers.Tokenizer,
    network: Callable[[TextSet], Tensor],
    texts: Sequence[str],
) -> Tensor:
    """Return the embeddings of texts, float32 (n, dim), on the run's device.

    Texts keep their order and their padding, so there is nothing to gain from sorting them.

    Args:
        run: Run that determines the device and the precision.
        tokenize: The run's tokenizer.
        network: Function that returns the embeddings of a batch, (batch, dim).
        texts: At least one text.
    """
    embeddings = []
    for start in range(0, len(texts), TEXTS_PER_BATCH):
        tokens = tokenize(texts[start : start + TEXTS_PER_BATCH])
        ids, valid = torch.from_numpy(tokens.ids).long(), torch.from_numpy(tokens.valid)
        batch = TextSet(ids, valid).upload(run.device)
        with run.execution.forward_context():
            embeddings.append(network(batch).float())
    return torch.cat(embeddings)
