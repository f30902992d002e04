"""Loss of SwAV: the prototypes assigned to one view are predicted from the other views."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_pretrain.distributed import collectives
from ssl_pretrain.losses.arguments import check_positive
from ssl_pretrain.losses.similarity import upcast


def swav(
    scores: Tensor,
    *,
    temperature: float = 0.1,
    epsilon: float = 0.05,
    num_iterations: int = 3,
    queue_scores: Tensor | None = None,
) -> Tensor:
    """Loss of SwAV: cross entropy between the assignments of a global view and the other views.

    Implements equations 1 and 2 of Caron et al., NeurIPS 2020 (arXiv:2006.09882). `sinkhorn`
    assigns the images of the global batch to prototypes. No gradient flows through the assignments.

    Args:
        scores: Cosines of the embeddings with the prototypes, shape
            (local_batch, views, num_prototypes). The first two views are the global ones, which
            are assigned.
        temperature: Divisor of the scores in the predictions.
        epsilon: Weight of the entropy of the assignments. The authors also use 0.03.
        num_iterations: Iterations of Sinkhorn-Knopp.
        queue_scores: Cosines of past embeddings of the global views with the prototypes, shape
            (rows, 2, num_prototypes). They take part in the assignments. Every rank passes the same
            number of rows, and each row is passed by one rank only.

    Returns:
        Scalar mean over this rank's images and pairs of views, in nats. The mean over ranks is the
        global loss.

    Raises:
        ValueError: If the shapes do not match, or a number is not positive.

    Example:
        >>> swav(torch.zeros(8, 4, 5))  # ln(5), the loss after a collapse
        tensor(1.60...)
    """
    check_positive("swav", temperature=temperature, epsilon=epsilon, num_iterations=num_iterations)
    _check_scores(scores, queue_scores)
    scores = upcast(scores)
    assignments = []
    for view in (0, 1):
        rows = scores.detach()[:, view]
        if queue_scores is not None:
            rows = torch.cat([rows, queue_scores.detach()[:, view].to(rows.dtype)])
        q = sinkhorn(rows, epsilon=epsilon, num_iterations=num_iterations)
        assignments.append(q[: len(scores)])
    return swapped_prediction(scores, assignments, temperature)


def sinkhorn(
    scores: Tensor,
    valid: Tensor | None = None,
    *,
    epsilon: float = 0.05,
    num_iterations: int = 3,
) -> Tensor:
    """Assign this rank's rows to prototypes, so that all prototypes get an equal share.

    Implements equation 3 of Caron et al., NeurIPS 2020 (arXiv:2006.09882), with the Sinkhorn-Knopp
    algorithm over the rows of all ranks.

    Args:
        scores: Cosines of embeddings and prototypes, shape (rows, num_prototypes).
        valid: 1 for the rows that count and 0 for the others, shape (rows,). By default all count.
        epsilon: Weight of the assignments' entropy. A large value makes them uniform.
        num_iterations: Rounds of normalizing prototypes and rows.

    Returns:
        Assignments in float32 or wider, shape (rows, num_prototypes). Each row sums to 1. With
        enough iterations, all prototypes have the same sum over the rows of all ranks.

    Raises:
        ValueError: If the scores are not 2-D, or a number is not positive.

    Example:
        >>> sinkhorn(torch.tensor([[1.0, 0.9], [1.0, 0.2]]), epsilon=0.5, num_iterations=100)
        tensor([[0.33..., 0.66...],
                [0.66..., 0.33...]])
    """
    check_positive("sinkhorn", epsilon=epsilon, num_iterations=num_iterations)
    if scores.ndim != 2:
        raise ValueError(
            f"sinkhorn: scores must be (rows, num_prototypes), got {tuple(scores.shape)}"
        )
    scores = upcast(scores)  # exp(1 / 0.05) overflows float16
    valid = scores.new_ones(len(scores)) if valid is None else valid
    q = torch.exp(scores / epsilon) * valid[:, None]
    q = q / collectives.reduce_sum(q.sum())
    for _ in range(num_iterations):
        q = q / (collectives.reduce_sum(q.sum(0)) * q.shape[1])
        q = q / (q.sum(1, keepdim=True) + (1 - valid[:, None]))
    return q


def swapped_prediction(scores: Tensor, assignments: Sequence[Tensor], temperature: float) -> Tensor:
    """Return the mean cross entropy between the assignments of a view and every other view.

    Args:
        scores: Shape (local_batch, views, num_prototypes).
        assignments: Assignments of the first views, each (local_batch, num_prototypes).
        temperature: Divisor of the scores.

    Returns:
        Scalar mean over images and pairs of views, in nats.
    """
    num_views = scores.shape[1]
    loss = scores.new_zeros(())
    for assigned_view, q in enumerate(assignments):
        for view in range(num_views):
            if view != assigned_view:
                log_p = F.log_softmax(scores[:, view] / temperature, dim=1)
                loss = loss - (q * log_p).sum(1).mean()  # equation 2
    return loss / (len(assignments) * (num_views - 1))


def _check_scores(scores: Tensor, queue_scores: Tensor | None) -> None:
    """Raise ValueError unless the shapes of the arguments of `swav` match."""
    if scores.ndim != 3 or scores.shape[1] < 2:
        raise ValueError(
            "swav: scores must be (local_batch, views, num_prototypes) with at least 2 views, "
            f"got {tuple(scores.shape)}"
        )
    if queue_scores is not None and (
        queue_scores.ndim != 3 or queue_scores.shape[1:] != (2, scores.shape[2])
    ):
        raise ValueError(
            f"swav: queue_scores must be (rows, 2, {scores.shape[2]}), "
            f"got {tuple(queue_scores.shape)}"
        )
