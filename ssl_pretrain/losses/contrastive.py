"""Contrastive losses over the global batch.

The anchors of this rank are compared with the candidates of all ranks, in tiles. Every function
returns the mean over this rank's anchors, in nats. The mean over ranks is the loss of the global
batch, and DDP's average of the gradients is the gradient of one process on the whole batch.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.losses.similarity import upcast
from ssl_pretrain.losses.tiles import log_sum_exp, symmetric_log_sum_exp


def plain_nt_xent(z_a: Tensor, z_b: Tensor, *, temperature: float) -> Tensor:
    """NT-Xent of one process, as in the paper. `nt_xent` computes the same loss in tiles."""
    z = F.normalize(torch.cat([z_a, z_b]), dim=1)
    logits = z @ z.T / temperature
    diagonal = torch.eye(len(z), dtype=torch.bool, device=z.device)
    positive = torch.arange(len(z), device=z.device).roll(len(z_a))
    return F.cross_entropy(logits.masked_fill(diagonal, float("-inf")), positive)


def nt_xent(z_a: Tensor, z_b: Tensor, *, temperature: float) -> Tensor:
    """Normalized temperature-scaled cross entropy loss of SimCLR, over the global batch.

    Implements equation 1 of Chen et al., ICML 2020 (arXiv:2002.05709). Each embedding has one
    positive, the other view of its image, and 2N - 2 negatives gathered from all ranks.

    Args:
        z_a: Embeddings of the first view, shape (local_batch, dim). Normalized inside.
        z_b: Embeddings of the second view, same shape. Row i is the same image as ``z_a[i]``.
        temperature: Divisor of the cosine similarities. The paper uses 0.1 to 0.5.

    Returns:
        Scalar mean over this rank's 2 * local_batch anchors, in nats. The mean over ranks is the
        global loss.

    Raises:
        ValueError: If the shapes differ or are not 2-D, or the temperature is not positive.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> z_a, z_b = torch.randn(2, 8, 16)
        >>> nt_xent(z_a, z_b, temperature=0.2)
        tensor(2.79...)
    """
    z_a, z_b = _unit_pair("nt_xent", "z_a", z_a, "z_b", z_b, temperature)
    lse, _ = symmetric_log_sum_exp(torch.cat([z_a, z_b]), scale=1 / temperature)
    return lse.mean() - (z_a * z_b).sum(1).mean() / temperature


def info_nce(
    queries: Tensor, keys: Tensor, *, temperature: float, queue: Tensor | None = None
) -> Tensor:
    """InfoNCE loss of MoCo: the cross entropy of each query with its own key.

    Implements equation 1 of He et al., CVPR 2020 (arXiv:1911.05722). The negatives are the rows of
    the queue. Without a queue they are all other keys of all ranks, as in MoCo v3 and NNCLR. Only
    queries are anchors, so symmetric losses call this function twice.

    Args:
        queries: Embeddings, shape (local_batch, dim). Normalized inside.
        keys: Embeddings of the same shape, which may require gradients. Row i is the positive of
            ``queries[i]``.
        temperature: Divisor of the cosine similarities. MoCo uses 0.07 (v1), 0.2 (v2) and 1.0 (v3).
        queue: Past keys of unit length, shape (queue_size, dim), the same on all ranks.

    Returns:
        Scalar mean over this rank's queries, in nats. The mean over ranks is the global loss.

    Raises:
        ValueError: If the shapes differ or are not 2-D, or the temperature is not positive.

    Example:
        >>> queries = keys = torch.eye(4)
        >>> info_nce(queries, keys, temperature=1.0)
        tensor(0.74...)
    """
    queries, keys = _unit_pair("info_nce", "queries", queries, "keys", keys, temperature)
    anchors, bound = queries / temperature, 1 / temperature
    positive = (queries * keys).sum(1) / temperature
    if queue is None:
        return (log_sum_exp(anchors, collectives.gather(keys), logit_bound=bound) - positive).mean()
    if queue.ndim != 2 or queue.shape[1] != keys.shape[1]:
        raise ValueError(
            f"info_nce: the queue must be (queue_size, {keys.shape[1]}), got {tuple(queue.shape)}"
        )
    negatives = log_sum_exp(anchors, queue.to(queries.dtype), logit_bound=bound)
    return (torch.logaddexp(negatives, positive) - positive).mean()


def supervised_contrastive(
    z_a: Tensor, z_b: Tensor, labels: Tensor, *, temperature: float
) -> Tensor:
    """Supervised contrastive loss, over the global batch.

    Implements equation 2, L_out, of Khosla et al., NeurIPS 2020 (arXiv:2004.11362), where the mean
    over positives is outside the logarithm. The positives of an embedding are all other embeddings
    with its label, on all ranks, including the other view of its image. The authors also multiply
    the loss by temperature / base_temperature. Here methods/supcon.py does that.

    Args:
        z_a: Embeddings of the first view, shape (local_batch, dim). Normalized inside.
        z_b: Embeddings of the second view, same shape.
        labels: Class of each image, integers of shape (local_batch,).
        temperature: Divisor of the cosine similarities. The paper uses 0.1.

    Returns:
        Scalar mean over this rank's 2 * local_batch anchors, in nats. The mean over ranks is the
        global loss.

    Raises:
        ValueError: If the shapes do not match, or the temperature is not positive.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> z_a, z_b = torch.randn(2, 8, 16)
        >>> supervised_contrastive(z_a, z_b, torch.arange(8) % 2, temperature=0.2)
        tensor(3.53...)
    """
    z_a, z_b = _unit_pair("supervised_contrastive", "z_a", z_a, "z_b", z_b, temperature)
    if labels.shape != (len(z_a),):
        raise ValueError(
            f"supervised_contrastive: labels must be ({len(z_a)},), one per image, "
            f"got {tuple(labels.shape)}"
        )
    lse, positives = symmetric_log_sum_exp(
        torch.cat([z_a, z_b]), scale=1 / temperature, labels=labels.repeat(2)
    )
    return (lse - positives).mean()


def decoupled(
    z_a: Tensor, z_b: Tensor, *, temperature: float, sigma: float | None = None
) -> Tensor:
    """Decoupled contrastive loss: NT-Xent without the positive in the denominator.

    Implements equation 6 of Yeh et al., ECCV 2022 (arXiv:2110.06848), and with `sigma` equation 7,
    DCLW. DCLW multiplies the positive's term by 2 - exp(s_i / sigma) / mean_j exp(s_j / sigma),
    where s_i is the cosine of a pair and the mean is over the global batch.

    Args:
        z_a: Embeddings of the first view, shape (local_batch, dim). Normalized inside.
        z_b: Embeddings of the second view, same shape.
        temperature: Divisor of the cosine similarities.
        sigma: Temperature of the weights. None weights all pairs equally.

    Returns:
        Scalar mean over this rank's 2 * local_batch anchors, in nats. The mean over ranks is the
        global loss.

    Raises:
        ValueError: As for `nt_xent`, or if the global batch is a single image without negatives.

    Example:
        >>> same = torch.ones(8, 4)
        >>> decoupled(same, same, temperature=0.1)  # ln(14)
        tensor(2.63...)
    """
    z_a, z_b = _unit_pair("decoupled", "z_a", z_a, "z_b", z_b, temperature)
    negatives = _log_sum_over_negatives("decoupled", z_a, z_b, 1 / temperature)
    positive = _positive_logits(z_a, z_b, temperature)
    if sigma is None:
        return (negatives - positive).mean()
    similarity = torch.exp((z_a * z_b).sum(1) / sigma)
    global_batch_size = len(z_a) * process_group.world_size()
    weights = 2 - similarity * global_batch_size / collectives.reduce_sum(similarity.sum())
    return (negatives - weights.repeat(2) * positive).mean()


def debiased(z_a: Tensor, z_b: Tensor, *, temperature: float, tau_plus: float) -> Tensor:
    """Debiased contrastive loss: NT-Xent corrected for negatives of the anchor's own class.

    Implements equation 8 of Chuang et al., NeurIPS 2020 (arXiv:2007.00224). The sum over N
    negatives is replaced by
    max((sum - N * tau_plus * positive) / (1 - tau_plus), N * exp(-1 / temperature)).

    Args:
        z_a: Embeddings of the first view, shape (local_batch, dim). Normalized inside.
        z_b: Embeddings of the second view, same shape.
        temperature: Divisor of the cosine similarities.
        tau_plus: Probability, in [0, 1), that a negative has the anchor's class. 0 means NT-Xent.

    Returns:
        Scalar mean over this rank's 2 * local_batch anchors, in nats. The mean over ranks is the
        global loss.

    Raises:
        ValueError: As for `decoupled`, or if `tau_plus` is outside [0, 1).

    Example:
        >>> _ = torch.manual_seed(0)
        >>> z_a, z_b = torch.randn(2, 8, 16)
        >>> loss = debiased(z_a, z_b, temperature=0.5, tau_plus=0.0)
        >>> torch.allclose(loss, nt_xent(z_a, z_b, temperature=0.5))
        True
    """
    return hard_negative(z_a, z_b, temperature=temperature, tau_plus=tau_plus, beta=0.0)


def hard_negative(
    z_a: Tensor, z_b: Tensor, *, temperature: float, tau_plus: float, beta: float
) -> Tensor:
    """Contrastive loss with hard negatives: `debiased`, where close negatives count for more.

    Implements equation 4 of Robinson et al., ICLR 2021 (arXiv:2010.04592). A negative with logit s
    is weighted by exp(beta * s), divided by the mean of these weights.

    Args:
        z_a: Embeddings of the first view, shape (local_batch, dim). Normalized inside.
        z_b: Embeddings of the second view, same shape.
        temperature: Divisor of the cosine similarities.
        tau_plus: Probability, in [0, 1), that a negative has the class of the anchor.
        beta: Concentration on hard negatives. 0 means `debiased`.

    Returns:
        Scalar mean over this rank's 2 * local_batch anchors, in nats. The mean over ranks is the
        global loss.

    Raises:
        ValueError: As for `debiased`, or if `beta` is negative.

    Example:
        >>> same = torch.ones(8, 4)
        >>> hard_negative(same, same, temperature=0.5, tau_plus=0.0, beta=1.0)  # ln(15)
        tensor(2.70...)
    """
    name = "hard_negative" if beta else "debiased"
    if not 0 <= tau_plus < 1:
        raise ValueError(f"{name}: tau_plus must be in [0, 1), got {tau_plus}")
    if beta < 0:
        raise ValueError(f"{name}: beta must be >= 0, got {beta}")
    unit_a, unit_b = _unit_pair(name, "z_a", z_a, "z_b", z_b, temperature)
    num_negatives = 2 * len(z_a) * process_group.world_size() - 2
    negatives = _log_sum_over_negatives(name, unit_a, unit_b, (1.0 + beta) / temperature)
    positive = _positive_logits(unit_a, unit_b, temperature)
    if beta:  # log of the sum of weight * exp(s), divided by the mean weight
        # Normalizing again makes autograd add the gradients in the order of earlier versions.
        unit_a, unit_b = _unit_pair(name, "z_a", z_a, "z_b", z_b, temperature)
        log_weights = _log_sum_over_negatives(name, unit_a, unit_b, beta / temperature)
        negatives = negatives - log_weights + math.log(num_negatives)
    # All terms are divided by the sum over negatives, so nothing overflows at low temperatures.
    relative_positive = torch.exp(positive - negatives)
    estimate = (1 - tau_plus * num_negatives * relative_positive) / (1 - tau_plus)
    minimum = num_negatives * torch.exp(-1 / temperature - negatives)
    corrected_sum = torch.maximum(estimate, minimum)
    relative_denominator = torch.exp(positive - negatives) + corrected_sum
    return (torch.log(relative_denominator) + negatives - positive).mean()


def image_text(images: Tensor, texts: Tensor, logit_scale: Tensor) -> Tensor:
    """Symmetric image-text loss of CLIP, over the global batch.

    Implements figure 3 of Radford et al., ICML 2021 (arXiv:2103.00020), the mean of both
    directions.

    Args:
        images: Embeddings of the images, shape (local_batch, dim). Normalized inside.
        texts: Embeddings of their texts, same shape.
        logit_scale: The learned 1 / temperature, expanded to shape (local_batch,).

    Returns:
        Scalar mean over this rank's pairs, in nats. The mean over ranks is the global loss.

    Raises:
        ValueError: If the shapes do not match.

    Example:
        >>> images = texts = torch.eye(4)
        >>> image_text(images, texts, torch.ones(4))
        tensor(0.74...)
    """
    images, texts = _unit_pair("image_text", "images", images, "texts", texts, 1.0)
    if logit_scale.shape != (len(images),):
        raise ValueError(
            f"image_text: logit_scale must be ({len(images)},), one per image, "
            f"got {tuple(logit_scale.shape)}"
        )
    scale = upcast(logit_scale)
    positive = scale * (images * texts).sum(1)
    to_texts = log_sum_exp(images * scale[:, None], collectives.gather(texts))
    to_images = log_sum_exp(texts * scale[:, None], collectives.gather(images))
    return ((to_texts + to_images) / 2 - positive).mean()


def _positive_logits(z_a: Tensor, z_b: Tensor, temperature: float) -> Tensor:
    """Return the logit of each anchor with its positive, shape (2 * local_batch,)."""
    return ((z_a * z_b).sum(1) / temperature).repeat(2)


def _log_sum_over_negatives(name: str, z_a: Tensor, z_b: Tensor, scale: float) -> Tensor:
    """Return the log of each anchor's sum over negatives of exp(scale * cosine).

    The shape is (2 * local_batch,).
    """
    num_images = len(z_a)
    if num_images * process_group.world_size() < 2:
        raise ValueError(
            f"{name}: needs at least 2 images in the global batch, got 1, which has no negative"
        )
    offsets = (0, num_images, -num_images)  # to the anchor itself and to its positive
    negatives, _ = symmetric_log_sum_exp(
        torch.cat([z_a, z_b]), scale=scale, excluded_offsets=offsets
    )
    return negatives


def _unit_pair(
    name: str, name_a: str, a: Tensor, name_b: str, b: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Check two tensors of embeddings and return them in float32 or wider, with unit length."""
    if a.shape != b.shape or a.ndim != 2:
        shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
        raise ValueError(
            f"{name}: {name_a} and {name_b} must share one (local_batch, dim) shape, got {shapes}"
        )
    if temperature <= 0:
        raise ValueError(f"{name}: temperature must be > 0, got {temperature}")
    return F.normalize(upcast(a), dim=1), F.normalize(upcast(b), dim=1)
