"""InfoNCE with keys of a teacher or neighbors from a queue: MoCo, MoCo v3 and NNCLR.

`ssl_pretrain.models.components` has the `Teacher` and the `Queue` that belong to them.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_pretrain.losses.arguments import (
    check_embeddings,
    check_positive,
    check_queue,
    check_two_images,
)
from ssl_pretrain.losses.contrastive import info_nce
from ssl_pretrain.losses.similarity import upcast


def moco(queries: Tensor, keys: Tensor, queue: Tensor | None, *, temperature: float) -> Tensor:
    """InfoNCE loss of MoCo, with a queue of past keys as negatives.

    Implements equation 1 of He et al., CVPR 2020 (arXiv:1911.05722). No gradient flows to the keys.
    After the step, update the teacher and replace the oldest keys in the queue with these.

    Args:
        queries: Student embeddings of the first view, shape (local_batch, dim). Normalized inside.
        keys: Teacher embeddings of the second view, same shape. Row i is the same image as
            ``queries[i]``. Normalized inside.
        queue: Past keys of unit length, shape (queue_size, dim), the same on all ranks. None takes
            the other keys of the global batch as negatives.
        temperature: Divisor of the cosine similarities. MoCo uses 0.07 (v1) and 0.2 (v2).

    Returns:
        Scalar mean over this rank's queries, in nats. The mean over ranks is the global loss.

    Raises:
        ValueError: If the shapes do not match, the temperature is not positive, or there is neither
            a queue nor a second image in the global batch.

    Example:
        >>> queries, queue = torch.eye(4), torch.zeros(6, 4)
        >>> moco(queries, queries, queue, temperature=1.0)  # ln(1 + 6 / e)
        tensor(1.16...)
    """
    check_embeddings("moco", queries=queries, keys=keys)
    check_positive("moco", temperature=temperature)
    if queue is None:
        check_two_images("moco", queries)
    else:
        check_queue("moco", queue, keys.shape[1])
    return info_nce(queries, keys.detach(), temperature=temperature, queue=queue)


def moco_v3(p_a: Tensor, p_b: Tensor, z_a: Tensor, z_b: Tensor, *, temperature: float) -> Tensor:
    """Symmetric InfoNCE loss of MoCo v3, over the global batch.

    Implements algorithm 1 of Chen, Xie and He, ICCV 2021 (arXiv:2104.02057). The negatives of a
    prediction are the teacher's embeddings of all other images. No gradient flows to the teacher's
    embeddings.

    Args:
        p_a: Student predictions of the first view, shape (local_batch, dim). Normalized inside.
        p_b: Student predictions of the second view, same shape.
        z_a: Teacher embeddings of the first view, same shape.
        z_b: Teacher embeddings of the second view, same shape.
        temperature: Divisor of the cosine similarities. The paper uses 1.0 for ResNets and 0.2 for
            ViTs.

    Returns:
        Scalar sum of both directions times 2 * temperature, as in the paper. The mean over ranks is
        the global loss.

    Raises:
        ValueError: If the shapes differ or are not 2-D, the temperature is not positive, or the
            global batch is a single image.

    Example:
        >>> z = torch.eye(4)
        >>> moco_v3(z, z, z, z, temperature=1.0)  # 4 ln(1 + 3 / e)
        tensor(2.97...)
    """
    check_embeddings("moco_v3", p_a=p_a, p_b=p_b, z_a=z_a, z_b=z_b)
    check_positive("moco_v3", temperature=temperature)
    check_two_images("moco_v3", p_a)
    a_to_b = info_nce(p_a, z_b.detach(), temperature=temperature)
    b_to_a = info_nce(p_b, z_a.detach(), temperature=temperature)
    return 2 * temperature * (a_to_b + b_to_a)


def nnclr(
    p_a: Tensor, p_b: Tensor, z_a: Tensor, z_b: Tensor, queue: Tensor, *, temperature: float
) -> Tensor:
    """Loss of NNCLR: InfoNCE whose queries are nearest neighbors in a queue.

    Implements equations 2 and 3 of Dwibedi et al., ICCV 2021 (arXiv:2104.14548), averaged over both
    directions. The nearest neighbors of one view's embeddings are the queries, and the predictions
    of the other view in the global batch are the keys. After the step, replace the oldest rows of
    the queue with the normalized ``z_a``.

    Args:
        p_a: Predictions from ``z_a``, shape (local_batch, dim). Normalized inside.
        p_b: Predictions from ``z_b``, same shape.
        z_a: Embeddings of the first view, same shape. They only select neighbors.
        z_b: Embeddings of the second view, same shape.
        queue: Past embeddings of unit length, shape (queue_size, dim), the same on all ranks.
        temperature: Divisor of the cosine similarities. The paper uses 0.1.

    Returns:
        Scalar mean over this rank's images and both directions, in nats. The mean over ranks is the
        global loss.

    Raises:
        ValueError: If the shapes do not match, the temperature is not positive, or the global batch
            is a single image.

    Example:
        >>> z = queue = torch.eye(4)
        >>> nnclr(z, z, z, z, queue, temperature=1.0)  # ln(1 + 3 / e)
        tensor(0.74...)
    """
    check_embeddings("nnclr", p_a=p_a, p_b=p_b, z_a=z_a, z_b=z_b)
    check_positive("nnclr", temperature=temperature)
    check_two_images("nnclr", p_a)
    check_queue("nnclr", queue, z_a.shape[1])
    a_to_b = info_nce(nearest_neighbors(z_a, queue), p_b, temperature=temperature)
    b_to_a = info_nce(nearest_neighbors(z_b, queue), p_a, temperature=temperature)
    return (a_to_b + b_to_a) / 2


@torch.no_grad()
def nearest_neighbors(z: Tensor, queue: Tensor) -> Tensor:
    """Return, for each embedding, the row of the queue with the largest cosine.

    Args:
        z: Embeddings, shape (local_batch, dim).
        queue: Past embeddings of unit length, shape (queue_size, dim).
    """
    z = upcast(z)
    with torch.autocast(z.device.type, enabled=False):
        cosines = F.normalize(z) @ queue.to(z.dtype).T
    return queue[cosines.argmax(1)].to(z.dtype)
