"""Contrastive loss of pairs of sentences, or of queries and passages, over the global batch."""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_pretrain.losses.arguments import check_embeddings, check_positive, check_two_images
from ssl_pretrain.losses.half_precision import gather_unit, half_rows, scaled_pair
from ssl_pretrain.losses.similarity import upcast
from ssl_pretrain.losses.tiles import log_sum_exp

Similarity = Literal["cosine", "dot"]


def plain_sentence_pairs(
    anchors: Tensor,
    positives: Tensor,
    hard_negatives: Tensor | None = None,
    *,
    temperature: float,
    similarity: Similarity = "cosine",
    hard_negative_weight: float = 0.0,
) -> Tensor:
    """Loss of one process, as in the paper. `sentence_pairs` computes the same loss in tiles."""
    candidates = positives if hard_negatives is None else torch.cat([positives, hard_negatives])
    if similarity == "cosine":
        anchors, candidates = F.normalize(anchors, dim=1), F.normalize(candidates, dim=1)
    logits = anchors @ candidates.T / temperature
    labels = torch.arange(len(anchors), device=anchors.device)  # column of each anchor's positive
    if hard_negatives is not None:
        logits[labels, len(positives) + labels] += hard_negative_weight
    return F.cross_entropy(logits, labels)


def sentence_pairs(
    anchors: Tensor,
    positives: Tensor,
    hard_negatives: Tensor | None = None,
    *,
    temperature: float,
    similarity: Similarity = "cosine",
    hard_negative_weight: float = 0.0,
) -> Tensor:
    """Cross entropy of each sentence with its positive among all positives and hard negatives.

    With cosines it is equation 1 of SimCSE (Gao et al., EMNLP 2021, arXiv:2104.08821), or equation
    5 with hard negatives. With dot products at temperature 1 it is equation 2 of dense passage
    retrieval (Karpukhin et al., EMNLP 2020, arXiv:2004.04906). Only the first sentences are
    anchors.

    Args:
        anchors: Embeddings of the sentences or queries, shape (local_batch, dim).
        positives: Embeddings of their positives or passages, same shape.
        hard_negatives: Embeddings of one hard negative each, same shape. None for pairs.
        temperature: Divisor of the similarities. SimCSE uses 0.05.
        similarity: "cosine" normalizes the embeddings inside, "dot" does not.
        hard_negative_weight: Number added to the logit of an anchor's own hard negative. It is the
            logarithm of that negative's weight.

    Returns:
        Scalar mean over this rank's anchors, in nats. The mean over ranks is the global loss.

    Raises:
        ValueError: If the shapes do not match, the temperature is not positive, the similarity is
            unknown, or there is neither a hard negative nor a second item in the global batch.

    Example:
        >>> anchors = positives = torch.eye(4)
        >>> sentence_pairs(anchors, positives, temperature=1.0)  # ln(1 + 3 / e)
        tensor(0.74...)
    """
    candidates = {"positives": positives}
    if hard_negatives is not None:
        candidates["hard_negatives"] = hard_negatives
    check_embeddings("sentence_pairs", anchors=anchors, **candidates)
    check_positive("sentence_pairs", temperature=temperature)
    if similarity not in ("cosine", "dot"):
        raise ValueError(f"sentence_pairs: similarity must be cosine or dot, got {similarity!r}")
    if hard_negatives is None:
        check_two_images("sentence_pairs", anchors)
    is_cosine = similarity == "cosine"
    half_anchors = half_rows(anchors) if is_cosine else None
    half_candidates = half_rows(*candidates.values()) if is_cosine else None
    scaled_anchors = _comparable(anchors, is_cosine) / temperature
    own = {name: _comparable(z, is_cosine) for name, z in candidates.items()}
    all_candidates, half_candidates = gather_unit(torch.cat(list(own.values())), half_candidates)
    lse = log_sum_exp(
        scaled_anchors,
        all_candidates,
        logit_bound=1 / temperature if is_cosine else float("inf"),
        half=scaled_pair(half_anchors, half_candidates, 1 / temperature),
    )
    if hard_negatives is not None and hard_negative_weight:
        negative_logits = (scaled_anchors * own["hard_negatives"]).sum(1)
        # A new weight of one term multiplies the sum by 1 + (weight - 1) * probability of the term.
        probabilities = torch.exp(negative_logits - lse)
        lse = lse + torch.log1p(math.expm1(hard_negative_weight) * probabilities)
    positive_logits = (scaled_anchors * own["positives"]).sum(1)
    return (lse - positive_logits).mean()


def _comparable(embeddings: Tensor, is_cosine: bool) -> Tensor:
    """Return embeddings whose dot products are the similarities, in float32 or wider."""
    embeddings = upcast(embeddings)
    return F.normalize(embeddings, dim=1) if is_cosine else embeddings
