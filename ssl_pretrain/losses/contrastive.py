"""Contrastive losses over the global batch.

The anchors of this rank are compared with the candidates of all ranks, in tiles. Every function
returns the mean over this rank's anchors, in nats.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_pretrain.losses.arguments import (
    check_embeddings,
    check_labels,
    check_one_per_image,
    check_queue,
    check_two_images,
    unit_embeddings,
)
from ssl_pretrain.losses.half_precision import (
    gather_unit,
    half_pair,
    half_rows,
    scaled_pair,
)
from ssl_pretrain.losses.log_odds import log_odds
from ssl_pretrain.losses.similarity import upcast
from ssl_pretrain.losses.tiles import log_sum_exp, symmetric_log_sum_exp
from ssl_pretrain.losses.two_way_tiles import two_way_log_sum_exp


def plain_nt_xent(z_a: Tensor, z_b: Tensor, *, temperature: float) -> Tensor:
    """NT-Xent of one process, as in the paper. `nt_xent` computes the same loss in tiles.

    Args:
        z_a: Embeddings of the first view, shape (batch, dim). Normalized inside.
        z_b: Embeddings of the second view, same shape.
        temperature: Divisor of the cosine similarities.

    Returns:
        Scalar mean over the 2 * batch anchors, in nats.
    """
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
        ValueError: If the shapes differ or are not 2-D, the temperature is not positive, or the
            global batch is a single image.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> z_a, z_b = torch.randn(2, 8, 16)
        >>> nt_xent(z_a, z_b, temperature=0.2)
        tensor(2.79...)
    """
    half = half_rows(z_a, z_b)
    z_a, z_b = unit_embeddings("nt_xent", temperature, z_a=z_a, z_b=z_b)
    check_two_images("nt_xent", z_a)
    lse, _ = symmetric_log_sum_exp(torch.cat([z_a, z_b]), scale=1 / temperature, half=half)
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
        ValueError: If the shapes do not match, the temperature is not positive, or there is neither
            a queue nor a second image in the global batch.

    Example:
        >>> queries = keys = torch.eye(4)
        >>> info_nce(queries, keys, temperature=1.0)  # ln(1 + 3 / e)
        tensor(0.74...)
    """
    half_queries, half_keys = half_rows(queries), half_rows(keys)
    queries, keys = unit_embeddings("info_nce", temperature, queries=queries, keys=keys)
    anchors, bound = queries / temperature, 1 / temperature
    positive = (queries * keys).sum(1) / temperature
    if queue is None:
        check_two_images("info_nce", queries)
        all_keys, half_keys = gather_unit(keys, half_keys)
        half = scaled_pair(half_queries, half_keys, 1 / temperature)
        return (log_sum_exp(anchors, all_keys, logit_bound=bound, half=half) - positive).mean()
    check_queue("info_nce", queue, keys.shape[1])
    negatives = log_sum_exp(anchors, queue.to(queries.dtype), logit_bound=bound)
    return (torch.logaddexp(negatives, positive) - positive).mean()


def plain_temperature_free(z_a: Tensor, z_b: Tensor) -> Tensor:
    """Temperature-free loss of one process. `temperature_free` computes the same loss in tiles.

    Args:
        z_a: Embeddings of the first view, shape (batch, dim). Normalized inside.
        z_b: Embeddings of the second view, same shape.

    Returns:
        Scalar mean over the 2 * batch anchors, in nats.
    """
    z = F.normalize(torch.cat([z_a, z_b]), dim=1)
    diagonal = torch.eye(len(z), dtype=torch.bool, device=z.device)
    # The diagonal is excluded. A cosine of 0 there keeps its gradient finite.
    logits = 2 * torch.atanh((z @ z.T).masked_fill(diagonal, 0.0))
    positive = torch.arange(len(z), device=z.device).roll(len(z_a))
    return F.cross_entropy(logits.masked_fill(diagonal, float("-inf")), positive)


def temperature_free(z_a: Tensor, z_b: Tensor) -> Tensor:
    """NT-Xent with log-odds of the cosine similarities as logits, over the global batch.

    Implements the loss of Kim and Kim, 2025 (arXiv:2501.17683). The logit of a pair with cosine c
    is log((1 + c) / (1 - c)) = 2 artanh(c) instead of c / temperature. It covers all real numbers,
    and its slope is 2 at c = 0 and rises without bound towards c = 1 and c = -1.

    Cosines are clamped to 1 - 1e-6 in magnitude, where the logit is 14.5. Pairs beyond have no
    gradient: their embeddings are equal to float32's precision.

    Args:
        z_a: Embeddings of the first view, shape (local_batch, dim). Normalized inside.
        z_b: Embeddings of the second view, same shape. Row i is the same image as ``z_a[i]``.

    Returns:
        Scalar mean over this rank's 2 * local_batch anchors, in nats. The mean over ranks is the
        global loss.

    Raises:
        ValueError: If the shapes differ or are not 2-D, or the global batch is a single image.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> z_a, z_b = torch.randn(2, 8, 16)
        >>> temperature_free(z_a, z_b)
        tensor(2.58...)
    """
    half = half_rows(z_a, z_b)
    z_a, z_b = unit_embeddings("temperature_free", 1.0, z_a=z_a, z_b=z_b)
    check_two_images("temperature_free", z_a)
    lse, _ = symmetric_log_sum_exp(torch.cat([z_a, z_b]), scale=1.0, half=half, uses_log_odds=True)
    return lse.mean() - log_odds((z_a * z_b).sum(1)).mean()


def supervised_contrastive(
    z_a: Tensor, z_b: Tensor, labels: Tensor, *, temperature: float
) -> Tensor:
    """Supervised contrastive loss, over the global batch.

    Implements equation 2, L_out, of Khosla et al., NeurIPS 2020 (arXiv:2004.11362), where the mean
    over positives is outside the logarithm. The positives of an embedding are all other embeddings
    with its label, on all ranks, including the other view of its image. The authors' code also
    multiplies the loss by temperature / 0.07, which this function does not.

    Args:
        z_a: Embeddings of the first view, shape (local_batch, dim). Normalized inside.
        z_b: Embeddings of the second view, same shape.
        labels: Class of each image, integers of shape (local_batch,).
        temperature: Divisor of the cosine similarities. The paper uses 0.1.

    Returns:
        Scalar mean over this rank's 2 * local_batch anchors, in nats. The mean over ranks is the
        global loss.

    Raises:
        ValueError: If the shapes do not match, the labels are not integers, the temperature is not
            positive, or the global batch is a single image.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> z_a, z_b = torch.randn(2, 8, 16)
        >>> supervised_contrastive(z_a, z_b, torch.arange(8) % 2, temperature=0.2)
        tensor(3.53...)
    """
    half = half_rows(z_a, z_b)
    z_a, z_b = unit_embeddings("supervised_contrastive", temperature, z_a=z_a, z_b=z_b)
    check_labels("supervised_contrastive", labels, len(z_a))
    check_two_images("supervised_contrastive", z_a)
    lse, positives = symmetric_log_sum_exp(
        torch.cat([z_a, z_b]), scale=1 / temperature, labels=labels.repeat(2), half=half
    )
    return (lse - positives).mean()


def plain_image_text(images: Tensor, texts: Tensor, logit_scale: Tensor) -> Tensor:
    """CLIP's loss of one process, as in the paper. `image_text` computes the same loss in tiles.

    Args:
        images: Embeddings of the images, shape (batch, dim). Normalized inside.
        texts: Embeddings of their texts, same shape.
        logit_scale: The learned 1 / temperature, expanded to shape (batch,).

    Returns:
        Scalar mean over both directions and the batch, in nats.
    """
    cosines = F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T
    logits = logit_scale[:, None] * cosines
    labels = torch.arange(len(images), device=images.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def image_text(images: Tensor, texts: Tensor, logit_scale: Tensor) -> Tensor:
    """Symmetric image-text loss of CLIP, over the global batch.

    Implements figure 3 of Radford et al., ICML 2021 (arXiv:2103.00020), the mean of both
    directions. Each logit is computed once for both, and only the texts are gathered from all
    ranks.

    Args:
        images: Embeddings of the images, shape (local_batch, dim). Normalized inside.
        texts: Embeddings of their texts, same shape.
        logit_scale: The learned 1 / temperature, expanded to shape (local_batch,).

    Returns:
        Scalar mean over this rank's pairs, in nats. The mean over ranks is the global loss.

    Raises:
        ValueError: If the shapes do not match, or the global batch is a single image.

    Example:
        >>> images = texts = torch.eye(4)
        >>> image_text(images, texts, torch.ones(4))  # ln(1 + 3 / e)
        tensor(0.74...)
    """
    check_embeddings("image_text", images=images, texts=texts)
    check_one_per_image("image_text", len(images), logit_scale=logit_scale)
    check_two_images("image_text", images)
    scale = upcast(logit_scale)
    to_texts, to_images, positive = two_way_log_sum_exp(
        upcast(images),
        upcast(texts),
        scale,
        logit_bound=_largest_logit(scale),
        half=half_pair(images, texts),
    )
    return ((to_texts + to_images) / 2 - positive).mean()


def _largest_logit(scale: Tensor) -> float:
    """Return the largest scale, or infinity on devices for which the host would have to wait."""
    return scale.detach().abs().max().item() if scale.device.type == "cpu" else float("inf")
