"""NT-Xent with other sums over the negatives: decoupled, debiased, and with hard negatives.

The anchors of this rank are compared with the candidates of all ranks, in tiles.
"""

import math

import torch
from torch import Tensor

from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.losses.arguments import (
    check_not_negative,
    check_positive,
    check_two_images,
    unit_embeddings,
)
from ssl_pretrain.losses.half_precision import half_rows
from ssl_pretrain.losses.similarity import upcast
from ssl_pretrain.losses.tiles import symmetric_log_sum_exp


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
        temperature: Divisor of the cosine similarities. The paper uses 0.1.
        sigma: Temperature of the weights. The paper uses 0.5. None weights all pairs equally.

    Returns:
        Scalar mean over this rank's 2 * local_batch anchors, in nats. The mean over ranks is the
        global loss.

    Raises:
        ValueError: If the shapes differ or are not 2-D, `temperature` or `sigma` is not positive,
            or the global batch is a single image.

    Example:
        >>> same = torch.ones(8, 4)
        >>> decoupled(same, same, temperature=0.1)  # ln(14)
        tensor(2.63...)
    """
    half = half_rows(z_a, z_b)
    z_a, z_b = unit_embeddings("decoupled", temperature, z_a=z_a, z_b=z_b)
    if sigma is not None:
        check_positive("decoupled", sigma=sigma)
    negatives = _log_sum_over_negatives("decoupled", z_a, z_b, half, 1 / temperature)
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
        temperature: Divisor of the cosine similarities. The authors' code uses 0.5.
        tau_plus: Probability, in [0, 1), that a negative has the anchor's class. The authors' code
            uses 0.1. With 0 this is `nt_xent`.

    Returns:
        Scalar mean over this rank's 2 * local_batch anchors, in nats. The mean over ranks is the
        global loss.

    Raises:
        ValueError: If the shapes differ or are not 2-D, `temperature` is not positive, `tau_plus`
            is outside [0, 1), or the global batch is a single image.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> z_a, z_b = torch.randn(2, 8, 16)
        >>> debiased(z_a, z_b, temperature=0.5, tau_plus=0.1)
        tensor(2.56...)
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
        temperature: Divisor of the cosine similarities. The authors' code uses 0.5.
        tau_plus: Probability, in [0, 1), that a negative has the anchor's class. The authors' code
            uses 0.1.
        beta: Concentration on hard negatives. The authors' code uses 1. With 0 this is `debiased`.

    Returns:
        Scalar mean over this rank's 2 * local_batch anchors, in nats. The mean over ranks is the
        global loss.

    Raises:
        ValueError: If the shapes differ or are not 2-D, `temperature` is not positive, `tau_plus`
            is outside [0, 1), `beta` is negative, or the global batch is a single image.

    Example:
        >>> same = torch.ones(8, 4)
        >>> hard_negative(same, same, temperature=0.5, tau_plus=0.0, beta=1.0)  # ln(15)
        tensor(2.70...)
    """
    name = "hard_negative" if beta else "debiased"  # for messages
    if not 0 <= tau_plus < 1:
        raise ValueError(f"{name}: tau_plus must be in [0, 1), got {tau_plus}")
    check_not_negative(name, beta=beta)
    half = half_rows(z_a, z_b)
    # One conversion, so that the gradients of both sums are added in float32.
    z_a, z_b = upcast(z_a), upcast(z_b)
    unit_a, unit_b = unit_embeddings(name, temperature, z_a=z_a, z_b=z_b)
    num_negatives = 2 * len(z_a) * process_group.world_size() - 2
    negatives = _log_sum_over_negatives(name, unit_a, unit_b, half, (1.0 + beta) / temperature)
    positive = _positive_logits(unit_a, unit_b, temperature)
    if beta:  # log of the sum of weight * exp(s), divided by the mean weight
        # Normalizing again makes autograd add the gradients in the order of earlier versions.
        unit_a, unit_b = unit_embeddings(name, temperature, z_a=z_a, z_b=z_b)
        log_weights = _log_sum_over_negatives(name, unit_a, unit_b, half, beta / temperature)
        negatives = negatives - log_weights + math.log(num_negatives)
    # All terms are divided by the sum over negatives, so nothing overflows at low temperatures.
    relative_positive = torch.exp(positive - negatives)
    estimate = (1 - tau_plus * num_negatives * relative_positive) / (1 - tau_plus)
    minimum = num_negatives * torch.exp(-1 / temperature - negatives)
    corrected_sum = torch.maximum(estimate, minimum)
    # Reusing relative_positive would round the gradient in another way than earlier versions.
    relative_denominator = torch.exp(positive - negatives) + corrected_sum
    return (torch.log(relative_denominator) + negatives - positive).mean()


def _positive_logits(z_a: Tensor, z_b: Tensor, temperature: float) -> Tensor:
    """Return the logit of each anchor with its positive, shape (2 * local_batch,)."""
    return ((z_a * z_b).sum(1) / temperature).repeat(2)


def _log_sum_over_negatives(
    name: str, z_a: Tensor, z_b: Tensor, half: Tensor | None, scale: float
) -> Tensor:
    """Return the log of each anchor's sum over negatives of exp(scale * cosine).

    The shape is (2 * local_batch,).
    """
    check_two_images(name, z_a)
    num_images = len(z_a)
    offsets = (0, num_images, -num_images)  # to the anchor itself and to its positive
    negatives, _ = symmetric_log_sum_exp(
        torch.cat([z_a, z_b]), scale=scale, excluded_offsets=offsets, half=half
    )
    return negatives
