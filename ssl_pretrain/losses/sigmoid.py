"""Sigmoid loss of image-text pairs over the global batch, as a ring of ranks.

The texts travel from rank to rank, so no rank ever holds more texts than its own batch.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.losses.arguments import check_one_per_image, unit_embeddings
from ssl_pretrain.losses.backend import Backend, backend_for
from ssl_pretrain.losses.half_precision import half_rows, unit_rows
from ssl_pretrain.losses.logit_tiles import iterate_logits
from ssl_pretrain.losses.similarity import upcast

# Logits above it are their own softplus, to the precision of float64. The default is 20.
SOFTPLUS_THRESHOLD = 40.0


def plain_sigmoid_image_text(
    images: Tensor, texts: Tensor, logit_scale: Tensor, logit_bias: Tensor
) -> Tensor:
    """SigLIP's loss of one process, as in the paper. `sigmoid_image_text` computes it in tiles.

    Args:
        images: Embeddings of the images, shape (batch, dim). Normalized inside.
        texts: Embeddings of their texts, same shape.
        logit_scale: Factor of the cosine similarities, expanded to shape (batch,).
        logit_bias: Number added to all logits, expanded to shape (batch,).

    Returns:
        Scalar sum over all pairs divided by the batch size, in nats.
    """
    cosines = F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T
    logits = logit_scale[:, None] * cosines + logit_bias[:, None]
    labels = 2 * torch.eye(len(images), dtype=logits.dtype, device=logits.device) - 1
    return -F.logsigmoid(labels * logits).sum() / len(images)


def sigmoid_image_text(
    images: Tensor, texts: Tensor, logit_scale: Tensor, logit_bias: Tensor
) -> Tensor:
    """Pairwise sigmoid loss of SigLIP, over the global batch.

    Implements equation 1 of Zhai et al., ICCV 2023 (arXiv:2303.15343). Each pair of an image and a
    text is classified as a match or not, so there is no sum of exponentials over the batch. The
    loss and its gradients are computed in the same pass over the pairs. The texts and their
    gradients travel around the ranks and are never gathered.

    Args:
        images: Embeddings of the images, shape (local_batch, dim). Normalized inside.
        texts: Embeddings of their texts, same shape.
        logit_scale: The learned factor of the cosine similarities, expanded to shape
            (local_batch,). The paper starts at 10.
        logit_bias: The learned number added to all logits, expanded to shape (local_batch,). The
            paper starts at -10.

    Returns:
        Scalar mean over this rank's images of the sum over all texts of the global batch, in nats.
        The mean over ranks is the global loss.

    Raises:
        ValueError: If the shapes do not match.

    Example:
        >>> images = texts = torch.eye(4)
        >>> sigmoid_image_text(images, texts, torch.zeros(4), torch.zeros(4))  # 4 ln 2
        tensor(2.77...)
    """
    half_texts = half_rows(texts)
    images, texts = unit_embeddings("sigmoid_image_text", 1.0, images=images, texts=texts)
    check_one_per_image(
        "sigmoid_image_text", len(images), logit_scale=logit_scale, logit_bias=logit_bias
    )
    sent = texts.detach() if half_texts is None else half_texts
    backend = backend_for(images).with_small_plain_tiles()
    with torch.autocast(images.device.type, enabled=False):
        return _SigmoidLoss.apply(
            images * upcast(logit_scale)[:, None],
            texts,
            upcast(logit_bias),
            sent,
            torch.is_grad_enabled(),
            backend,
        )


class _Gradients(NamedTuple):
    """Gradients of the sum of the losses. Those that are not needed are None."""

    images: Tensor | None
    texts: Tensor | None  # the texts that are on this rank now
    bias: Tensor | None


class _SigmoidLoss(torch.autograd.Function):
    """Mean over this rank's images. The forward pass computes the gradients, too."""

    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        texts: Tensor,
        bias: Tensor,
        sent: Tensor,
        is_grad_enabled: bool,
        backend: Backend,
    ) -> Tensor:
        gradients = _Gradients(
            *(
                torch.zeros_like(x) if is_grad_enabled and is_needed else None
                for x, is_needed in zip((images, texts, bias), ctx.needs_input_grad, strict=False)
            )
        )
        losses, gradients = _ring_losses(images, bias, sent, gradients, backend)
        ctx.save_for_backward(*gradients)
        ctx.num_images = len(images)
        return losses.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        # The gradients of the texts are sums over the losses of all ranks, which have the same
        # weight in the global loss. So `grad` is the same number on all ranks.
        gradients = [
            None if total is None else total * (grad / ctx.num_images)
            for total in ctx.saved_tensors
        ]
        return *gradients, None, None, None


def _ring_losses(
    images: Tensor, bias: Tensor, sent: Tensor, gradients: _Gradients, backend: Backend
) -> tuple[Tensor, _Gradients]:
    """Return the loss of each image, summed over all texts, and the gradients of their sum.

    Args:
        images: Embeddings of this rank times the scale of the logits, shape (local_batch, dim).
        bias: Number added to the logits of each image, shape (local_batch,).
        sent: Texts of this rank, of unit length or in half precision.
        gradients: Zeros for the gradients that are needed.
        backend: Backend, which sets the tile size.
    """
    losses = torch.zeros_like(bias)
    for step in range(process_group.world_size()):
        if step > 0:
            sent = collectives.shift_around_ring(sent)
        _add_pairs(losses, gradients, images, unit_rows(sent), bias, step == 0, backend)
        if gradients.texts is not None:
            # The gradients travel with their texts, and arrive home with the last shift.
            gradients = gradients._replace(texts=collectives.shift_around_ring(gradients.texts))
    return losses, gradients


def _add_pairs(
    losses: Tensor,
    gradients: _Gradients,
    images: Tensor,
    texts: Tensor,
    bias: Tensor,
    has_positives: bool,
    backend: Backend,
) -> None:
    """Add the pairs of all images with some texts to the losses and gradients.

    The loss of a negative pair with logit z is softplus(z), and its derivative is sigmoid(z). For
    the positive pairs on the diagonal, if there are any, z and the derivative change sign.
    """
    for tile, logits in iterate_logits(images, texts, 0, (), backend):
        rows, columns = tile.rows, tile.columns
        positives = logits.diagonal(rows.start - columns.start) if has_positives else logits[:0]
        logits.add_(bias[rows, None])
        positives.neg_()
        losses[rows] += F.softplus(logits, threshold=SOFTPLUS_THRESHOLD).sum(1)
        if all(total is None for total in gradients):
            continue
        weights = logits.sigmoid_()
        positives.neg_()
        if gradients.images is not None:
            gradients.images[rows].addmm_(weights, texts[columns])
        if gradients.texts is not None:
            gradients.texts[columns].addmm_(weights.T, images[rows])
        if gradients.bias is not None:
            gradients.bias[rows] += weights.sum(1)
