"""Losses of the form "logits of anchors against candidates". This rank's anchors meet the candidates of all ranks, by tiles.

Every function returns this rank's mean over its anchors, in nats. The mean over ranks is the global loss, which is what
DDP's averaging needs; its gradient is that of one process on the whole batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.losses.tiles import log_sum_exp, log_sum_exp_among


def nt_xent(z_a: Tensor, z_b: Tensor, *, temperature: float) -> Tensor:
    """Normalized-temperature cross entropy: eq. 1 of SimCLR (Chen et al., ICML 2020, arXiv:2002.05709).

    Row i of `z_a` has one positive, row i of `z_b`, and 2N - 2 negatives: every other
    embedding of both views on all ranks, N = local_batch * world_size.

    Args:
        z_a: embeddings of view a, (local_batch, dim). Normalized here, so any scale.
        z_b: embeddings of view b, same shape; row i is the same image as z_a[i].
        temperature: divides cosine similarities, so dimensionless; the paper uses 0.1 to 0.5.

    Returns:
        The mean over this rank's 2 * local_batch anchors.

    Raises:
        ValueError: the shapes differ or are not 2-D, or temperature is not positive.
    """
    z_a, z_b = _unit_pair("nt_xent", "z_a", z_a, "z_b", z_b, temperature)
    lse, _ = log_sum_exp_among(torch.cat([z_a, z_b]), scale=1 / temperature)
    return (
        lse.mean() - (z_a * z_b).sum(1).mean() / temperature
    )  # SimCLR's method multiplies by 2, as its authors sum both directions


def info_nce(
    queries: Tensor, keys: Tensor, *, temperature: float, queue: Tensor | None = None
) -> Tensor:
    """Cross entropy of each query with its own key: eq. 1 of MoCo (He et al., CVPR 2020, arXiv:1911.05722).

    The negatives are the queue's rows; without a queue they are all other keys of all ranks (MoCo v3, NNCLR). One
    direction: MoCo v3 adds info_nce(queries_b, keys_a) itself.

    Args:
        queries: (local_batch, dim). Normalized here.
        keys: (local_batch, dim); row i is the positive of queries[i]. With a graph, they get their gradient.
        temperature: divides cosine similarities; 0.07 (v1), 0.2 (v2), 1.0 (v3 ResNet-50).
        queue: (queue_size, dim) past keys, unit length, the same on all ranks.

    Raises:
        ValueError: the shapes differ or are not 2-D, or temperature is not positive.
    """
    queries, keys = _unit_pair("info_nce", "queries", queries, "keys", keys, temperature)
    positive = (queries * keys).sum(1) / temperature
    if queue is None:
        return (
            log_sum_exp(queries / temperature, collectives.gather(keys), bound=1 / temperature)
            - positive
        ).mean()
    if queue.ndim != 2 or queue.shape[1] != keys.shape[1]:
        raise ValueError(
            f"info_nce: the queue must be (queue_size, {keys.shape[1]}), got {tuple(queue.shape)}"
        )
    negatives = log_sum_exp(queries / temperature, queue.to(queries.dtype), bound=1 / temperature)
    return (torch.logaddexp(negatives, positive) - positive).mean()


def supervised_contrastive(
    z_a: Tensor, z_b: Tensor, labels: Tensor, *, temperature: float
) -> Tensor:
    """SupCon: eq. 2 (L_out) of Khosla et al. (NeurIPS 2020, arXiv:2004.11362), the mean over positives outside the logarithm.

    An anchor's positives are all other embeddings of its label on all ranks, its own other view among them.

    Args:
        z_a, z_b: embeddings of the two views, (local_batch, dim). Normalized here.
        labels: (local_batch,) integers, in any number an image's class.
        temperature: divides cosine similarities; the paper uses 0.1.

    Returns:
        The mean over 2 * local_batch anchors; its authors multiply by temperature / base_temperature, and so does the method.

    Raises:
        ValueError: the shapes differ or are not 2-D, the labels are not (local_batch,), or temperature is not positive.
    """
    z_a, z_b = _unit_pair("supervised_contrastive", "z_a", z_a, "z_b", z_b, temperature)
    if labels.shape != (len(z_a),):
        raise ValueError(
            f"supervised_contrastive: labels must be ({len(z_a)},), one an image, got {tuple(labels.shape)}"
        )
    lse, positives = log_sum_exp_among(
        torch.cat([z_a, z_b]), scale=1 / temperature, labels=labels.repeat(2)
    )
    return (lse - positives).mean()


def decoupled(
    z_a: Tensor, z_b: Tensor, *, temperature: float, sigma: float | None = None
) -> Tensor:
    """Decoupled contrastive learning: eq. 6 of Yeh et al. (ECCV 2022, arXiv:2110.06848); with `sigma` eq. 7, DCLW.

    NT-Xent without the positive in the denominator. DCLW weighs the positive's term by 2 - exp(s_i / sigma) / its mean
    over the global batch, s_i the pair's cosine.

    Args: as `nt_xent`.

    Raises:
        ValueError: as `nt_xent`, or there is a single image, which has no negative.
    """
    z_a, z_b, negatives, positive = _negatives_and_positive("decoupled", z_a, z_b, temperature, 1.0)
    if sigma is None:
        return (negatives - positive).mean()
    closeness = torch.exp((z_a * z_b).sum(1) / sigma)
    weights = 2 - closeness * (len(z_a) * process_group.world_size()) / collectives.reduce_sum(
        closeness.sum()
    )
    return (negatives - weights.repeat(2) * positive).mean()


def debiased(z_a: Tensor, z_b: Tensor, *, temperature: float, tau_plus: float) -> Tensor:
    """Debiased contrastive loss: eq. 8 of Chuang et al. (NeurIPS 2020, arXiv:2007.00224).

    Subtracts from the negatives' sum what same-class images contribute: with N = 2 * global_batch - 2,
    Ng = max((negatives - N * tau_plus * positive) / (1 - tau_plus), N * exp(-1 / temperature)).

    Args: as `nt_xent`, and
        tau_plus: the probability that a negative is of the anchor's class, in [0, 1); 0 is NT-Xent.

    Raises:
        ValueError: as `decoupled`, or tau_plus outside [0, 1).
    """
    return hard_negative(z_a, z_b, temperature=temperature, tau_plus=tau_plus, beta=0.0)


def hard_negative(
    z_a: Tensor, z_b: Tensor, *, temperature: float, tau_plus: float, beta: float
) -> Tensor:
    """Contrastive learning with hard negatives: eq. 4 of Robinson et al. (ICLR 2021, arXiv:2010.04592).

    `debiased`, each negative exp(s) weighted by exp(beta * s) over the weights' mean.

    Args: as `debiased`, and
        beta: concentration on hard negatives; 0 is `debiased`.

    Raises:
        ValueError: as `debiased`, or beta is negative.
    """
    name = "hard_negative" if beta else "debiased"
    if not 0 <= tau_plus < 1:
        raise ValueError(f"{name}: tau_plus must be in [0, 1), got {tau_plus}")
    if beta < 0:
        raise ValueError(f"{name}: beta must be >= 0, got {beta}")
    num_negatives = 2 * len(z_a) * process_group.world_size() - 2
    _, _, negatives, positive = _negatives_and_positive(name, z_a, z_b, temperature, 1.0 + beta)
    if beta:  # sum of weight * exp(s) over the mean weight, in logarithms
        negatives = (
            negatives
            - _negatives_and_positive(name, z_a, z_b, temperature, beta)[2]
            + math.log(num_negatives)
        )
    # Ng over the negatives' sum, so that nothing overflows at low temperatures
    debiased_share = (1 - tau_plus * num_negatives * torch.exp(positive - negatives)) / (
        1 - tau_plus
    )
    least = num_negatives * torch.exp(-1 / temperature - negatives)
    share = torch.maximum(debiased_share, least)
    return (torch.log(torch.exp(positive - negatives) + share) + negatives - positive).mean()


def image_text(images: Tensor, texts: Tensor, logit_scale: Tensor) -> Tensor:
    """Symmetric image-text loss: figure 3 of CLIP (Radford et al., ICML 2021, arXiv:2103.00020): the mean of both directions.

    Args:
        images, texts: embeddings of the pairs, (local_batch, dim). Normalized here.
        logit_scale: (local_batch,), the learned 1 / temperature, one value expanded to a row an image.

    Raises:
        ValueError: the shapes differ or are not 2-D.
    """
    images, texts = _unit_pair("image_text", "images", images, "texts", texts, 1.0)
    if logit_scale.shape != (len(images),):
        raise ValueError(
            f"image_text: logit_scale must be ({len(images)},), a row an image, got {tuple(logit_scale.shape)}"
        )
    scale = _precise(logit_scale)
    positive = scale * (images * texts).sum(1)
    to_texts = log_sum_exp(images * scale[:, None], collectives.gather(texts))
    to_images = log_sum_exp(texts * scale[:, None], collectives.gather(images))
    return ((to_texts + to_images) / 2 - positive).mean()


def _negatives_and_positive(
    name: str, z_a: Tensor, z_b: Tensor, temperature: float, power: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unit embeddings; log of each anchor's sum over negatives of exp(power * s), and s with its positive: (2 * local_batch,)."""
    z_a, z_b = _unit_pair(name, "z_a", z_a, "z_b", z_b, temperature)
    rows = len(z_a)
    if rows * process_group.world_size() < 2:
        raise ValueError(
            f"{name}: needs at least 2 images in the global batch, got 1: it would have no negative"
        )
    negatives, _ = log_sum_exp_among(
        torch.cat([z_a, z_b]), scale=power / temperature, excluded=(0, rows, -rows)
    )
    return z_a, z_b, negatives, ((z_a * z_b).sum(1) / temperature).repeat(2)


def _unit_pair(
    name: str, name_a: str, a: Tensor, name_b: str, b: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    if a.shape != b.shape or a.ndim != 2:
        shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
        raise ValueError(
            f"{name}: {name_a} and {name_b} must share one (local_batch, dim) shape, got {shapes}"
        )
    if temperature <= 0:
        raise ValueError(f"{name}: temperature must be > 0, got {temperature}")
    return F.normalize(_precise(a), dim=1), F.normalize(_precise(b), dim=1)


def _precise(z: Tensor) -> Tensor:
    return (
        z if z.dtype == torch.float64 else z.float()
    )  # similarities in float32 whatever the autocast
