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
    own = torch.arange(len(anchors), device=anchors.device)
    if hard_negatives is not None:
        weights = torch.zeros_like(logits)
        weights[own, len(positives) + own] = hard_negative_weight
        logits = logits + weights
    return F.cross_entropy(logits, own)


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
    named = {"anchors": anchors, "positives": positives}
    if hard_negatives is not None:
        named["hard_negatives"] = hard_negatives
    check_embeddings("sentence_pairs", **named)
    check_positive("sentence_pairs", temperature=temperature)
    if similarity not in ("cosine", "dot"):
        raise ValueError(f"sentence_pairs: similarity must be cosine or dot, got {similarity!r}")
    if hard_negatives is None:
        check_two_images("sentence_pairs", anchors)
    first, *others = (upcast(z) for z in named.values())
    half_anchors = half_candidates = None
    if is_cosine := similarity == "cosine":
        half_anchors, half_candidates = half_rows(anchors), half_rows(*list(named.values())[1:])
        first, *others = (F.normalize(z, dim=1) for z in (first, *others))
    scaled_anchors = first / temperature
    candidates, half_candidates = gather_unit(torch.cat(others), half_candidates)
    lse = log_sum_exp(
        scaled_anchors,
        candidates,
        logit_bound=1 / temperature if is_cosine else float("inf"),
        half=scaled_pair(half_anchors, half_candidates, 1 / temperature),
    )
    if hard_negatives is not None and hard_negative_weight:
        own_logits = (scaled_anchors * others[1]).sum(1)
        own_shares = torch.exp(own_logits - lse)  # in the sums of exponentials
        lse = lse + torch.log1p(math.expm1(hard_negative_weight) * own_shares)
    return (lse - (scaled_anchors * others[0]).sum(1)).mean()
