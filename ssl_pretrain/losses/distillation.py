"""Losses of a student that predicts a target: BYOL, SimSiam and DINO.

Each image is compared only with itself, so the ranks exchange nothing. No gradient flows to the
targets.
"""

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from ssl_pretrain.losses.arguments import check_embeddings, check_positive
from ssl_pretrain.losses.similarity import mean_cosine, upcast


def byol(p_a: Tensor, p_b: Tensor, z_a: Tensor, z_b: Tensor) -> Tensor:
    """Loss of BYOL: squared distances of predictions to the teacher's embeddings.

    Implements equation 2 of Grill et al., NeurIPS 2020 (arXiv:2006.07733), summed over both
    directions. The teacher is a moving average of the student, updated after the step. No gradient
    flows to the teacher's embeddings.

    Args:
        p_a: Student predictions of the first view, shape (local_batch, dim). Normalized inside.
        p_b: Student predictions of the second view, same shape.
        z_a: Teacher embeddings of the first view, same shape. Normalized inside.
        z_b: Teacher embeddings of the second view, same shape.

    Returns:
        Scalar mean over this rank's images, from 0 to 8. The mean over ranks is the global loss.

    Raises:
        ValueError: If the shapes differ or are not 2-D.

    Example:
        >>> z = torch.eye(4)
        >>> byol(z, z, -z, z)  # one direction is right, the other is opposite
        tensor(4.)
    """
    check_embeddings("byol", p_a=p_a, p_b=p_b, z_a=z_a, z_b=z_b)
    a_to_b = mean_squared_distance(p_a, z_b.detach())
    b_to_a = mean_squared_distance(p_b, z_a.detach())
    return a_to_b + b_to_a


def mean_squared_distance(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared distance of normalized vectors, which is 2 - 2 * cosine.

    Args:
        prediction: Shape (rows, dim). Normalized inside.
        target: Same shape. Normalized inside.
    """
    prediction, target = F.normalize(upcast(prediction), dim=1), F.normalize(upcast(target), dim=1)
    return (prediction - target).square().sum(1).mean()


def negative_cosine(prediction: Tensor, target: Tensor, *, stop_gradient: bool = True) -> Tensor:
    """Negative cosine similarity of predictions and targets, in one direction.

    Implements equation 1 of Chen and He, CVPR 2021 (arXiv:2011.10566).

    Args:
        prediction: Predictions, shape (local_batch, dim). Normalized inside.
        target: Embeddings of the other view, same shape. Normalized inside.
        stop_gradient: Treat the target as a constant. Without this, SimSiam collapses.

    Returns:
        Scalar mean over this rank's images, from -1 to 1. The mean over ranks is the global loss.

    Raises:
        ValueError: If the shapes differ or are not 2-D.

    Example:
        >>> prediction, target = torch.eye(4), torch.ones(4, 4)
        >>> negative_cosine(prediction, target)
        tensor(-0.5000)
    """
    check_embeddings("negative_cosine", prediction=prediction, target=target)
    return -mean_cosine(prediction, target.detach() if stop_gradient else target)


def simsiam(
    p_a: Tensor, p_b: Tensor, z_a: Tensor, z_b: Tensor, *, stop_gradient: bool = True
) -> Tensor:
    """Loss of SimSiam: `negative_cosine`, averaged over both directions.

    Implements equation 4 of Chen and He, CVPR 2021 (arXiv:2011.10566).

    Args:
        p_a: Predictions from ``z_a``, shape (local_batch, dim). Normalized inside.
        p_b: Predictions from ``z_b``, same shape.
        z_a: Embeddings of the first view, same shape. Normalized inside.
        z_b: Embeddings of the second view, same shape.
        stop_gradient: Treat the embeddings as constants. Without this, SimSiam collapses.

    Returns:
        Scalar mean over this rank's images, from -1 to 1. The mean over ranks is the global loss.

    Raises:
        ValueError: If the shapes differ or are not 2-D.

    Example:
        >>> p, z = torch.eye(4), torch.ones(4, 4)
        >>> simsiam(p, p, z, z)
        tensor(-0.5000)
    """
    check_embeddings("simsiam", p_a=p_a, p_b=p_b, z_a=z_a, z_b=z_b)
    a_to_b = negative_cosine(p_a, z_b, stop_gradient=stop_gradient)
    b_to_a = negative_cosine(p_b, z_a, stop_gradient=stop_gradient)
    return (a_to_b + b_to_a) / 2


def dino(
    student_logits: Tensor,
    teacher_logits: Tensor,
    center: Tensor,
    *,
    temperature: float = 0.1,
    teacher_temperature: float = 0.04,
) -> Tensor:
    """Loss of DINO: cross entropy of every view with the teacher's output for the other views.

    Implements equation 3 of Caron et al., ICCV 2021 (arXiv:2104.14294). The teacher is centered and
    sharpened. No gradient flows to it. After the step, update the teacher and move the center
    toward the mean of the teacher's logits over all ranks (equation 4).

    Args:
        student_logits: Student outputs of all views, shape (local_batch, views, num_prototypes).
            The first two are the global views, which the teacher sees, too.
        teacher_logits: Teacher outputs of the global views, shape (local_batch, 2, num_prototypes).
        center: Moving average of the teacher's logits, shape (num_prototypes,), the same on all
            ranks.
        temperature: Temperature of the student's softmax.
        teacher_temperature: Temperature of the teacher's softmax. The paper raises it from 0.04 to
            0.07.

    Returns:
        Scalar mean over this rank's images and pairs of views, in nats. The mean over ranks is the
        global loss.

    Raises:
        ValueError: If the shapes do not match, or a temperature is not positive.

    Example:
        >>> student_logits, teacher_logits = torch.zeros(8, 6, 4), torch.randn(8, 2, 4)
        >>> dino(student_logits, teacher_logits, torch.zeros(4))  # ln(4)
        tensor(1.38...)
    """
    check_positive("dino", temperature=temperature, teacher_temperature=teacher_temperature)
    _check_logits(student_logits, teacher_logits, center)
    probabilities = teacher_probabilities(teacher_logits.detach(), center, teacher_temperature)
    return cross_entropy_of_views(student_logits, probabilities, temperature)


def teacher_probabilities(
    logits: Tensor, center: Tensor, temperature: float | Tensor
) -> list[Tensor]:
    """Return the centered and sharpened outputs of the teacher, one tensor per view.

    Args:
        logits: Shape (local_batch, views, num_prototypes).
        center: Shape (num_prototypes,).
        temperature: Temperature of the softmax.

    Returns:
        Probabilities of each view, shape (local_batch, num_prototypes).
    """
    return [F.softmax((view - center) / temperature, dim=1) for view in upcast(logits).unbind(1)]


def cross_entropy_of_views(
    student_logits: Tensor, probabilities: Sequence[Tensor], temperature: float
) -> Tensor:
    """Return the mean cross entropy over all pairs of a teacher view and another student view.

    Args:
        student_logits: Shape (local_batch, views, num_prototypes).
        probabilities: Teacher's probabilities for the first views, each
            (local_batch, num_prototypes).
        temperature: Temperature of the student's softmax.

    Returns:
        Scalar mean over images and pairs of views, in nats.
    """
    loss = student_logits.new_zeros((), dtype=upcast(student_logits).dtype)
    num_pairs = 0
    for view, view_logits in enumerate(student_logits.unbind(1)):
        logits = upcast(view_logits) / temperature
        others = [q for teacher_view, q in enumerate(probabilities) if teacher_view != view]
        # The sum over q of -(q * log_softmax(logits)).sum(1), simplified because q sums to 1.
        log_normalizer = logits.logsumexp(dim=1)
        cross_entropy = len(others) * log_normalizer - (sum(others) * logits).sum(1)
        loss = loss + cross_entropy.mean()
        num_pairs += len(others)
    return loss / num_pairs


def _check_logits(student_logits: Tensor, teacher_logits: Tensor, center: Tensor) -> None:
    """Raise ValueError unless the shapes of the arguments of `dino` match."""
    if student_logits.ndim != 3 or student_logits.shape[1] < 2:
        raise ValueError(
            "dino: student_logits must be (local_batch, views, num_prototypes) with at least 2 "
            f"views, got {tuple(student_logits.shape)}"
        )
    local_batch, _, num_prototypes = student_logits.shape
    if teacher_logits.shape != (local_batch, 2, num_prototypes):
        raise ValueError(
            f"dino: teacher_logits must be ({local_batch}, 2, {num_prototypes}), "
            f"got {tuple(teacher_logits.shape)}"
        )
    if center.shape != (num_prototypes,):
        raise ValueError(f"dino: center must be ({num_prototypes},), got {tuple(center.shape)}")
