"""Sigmoid loss of image-text pairs over the global batch, as a ring of ranks.

The text embeddings travel from rank to rank, so no rank ever holds those of the whole batch.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.losses.arguments import check_embeddings, check_one_per_image
from ssl_pretrain.losses.backend import Backend, backend_for
from ssl_pretrain.losses.half_precision import ScaledRows, half_rows
from ssl_pretrain.losses.logit_tiles import iterate_scaled_logits
from ssl_pretrain.losses.similarity import inverse_lengths, normalization_gradient, upcast

# In float64, softplus(x) equals x above this value. PyTorch's default of 20 suits float32.
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
    check_embeddings("sigmoid_image_text", images=images, texts=texts)
    check_one_per_image(
        "sigmoid_image_text", len(images), logit_scale=logit_scale, logit_bias=logit_bias
    )
    backend = backend_for(images).with_small_plain_tiles()
    half_texts = half_rows(texts)
    images, texts = upcast(images), upcast(texts)
    with torch.autocast(images.device.type, enabled=False):
        return _SigmoidLoss.apply(
            images,
            texts,
            upcast(logit_scale),
            upcast(logit_bias),
            texts.detach() if half_texts is None else half_texts,
            torch.is_grad_enabled(),
            backend,
        )


class _Gradients(NamedTuple):
    """Gradients of the sum of the losses. Those that are not needed are None."""

    images: Tensor | None  # with respect to the normalized images times the scale
    texts: Tensor | None  # with respect to the normalized texts that are on this rank now
    bias: Tensor | None


class _SigmoidLoss(torch.autograd.Function):
    """Mean over this rank's images. The forward pass computes the gradients, too."""

    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        texts: Tensor,
        scale: Tensor,
        bias: Tensor,
        sent: Tensor,
        is_grad_enabled: bool,
        backend: Backend,
    ) -> Tensor:
        needs = [is_grad_enabled and is_needed for is_needed in ctx.needs_input_grad]
        totals = _Gradients(
            torch.zeros_like(images) if needs[0] or needs[2] else None,
            torch.zeros_like(texts) if needs[1] else None,
            torch.zeros_like(bias) if needs[3] else None,
        )
        anchors = ScaledRows(images, scale * inverse_lengths(images))
        losses, totals = _ring_losses(anchors, sent, bias, totals, backend)
        images_grad, texts_grad, bias_grad = totals
        scale_grad = None
        if images_grad is not None:
            images_grad, scale_grad = normalization_gradient(images, scale, images_grad)
        if texts_grad is not None:
            one = torch.ones_like(scale)
            texts_grad, _ = normalization_gradient(texts, one, texts_grad)
        ctx.save_for_backward(images_grad, texts_grad, scale_grad, bias_grad)
        return losses.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        # The gradients of the texts are sums over the losses of all ranks, which have the same
        # weight in the global loss. So `grad` is the same number on all ranks.
        num_images = next(len(total) for total in ctx.saved_tensors if total is not None)
        factor = grad / num_images
        gradients = [None if total is None else total * factor for total in ctx.saved_tensors]
        return *gradients, None, None, None


def _ring_losses(
    images: ScaledRows, sent: Tensor, bias: Tensor, gradients: _Gradients, backend: Backend
) -> tuple[Tensor, _Gradients]:
    """Return the loss of each image, summed over all texts, and the gradients of their sum.

    Args:
        images: Images of this rank with their factors, which contain the scale of the logits.
        sent: Texts of this rank, in the data type that ranks send.
        bias: Number added to the logits of each image, shape (local_batch,).
        gradients: Zeros for the gradients that are needed.
        backend: Backend, which sets the tile size.
    """
    losses = torch.zeros_like(bias)
    for step in range(process_group.world_size()):
        if step > 0:
            sent = collectives.shift_around_ring(sent)
        texts = ScaledRows(sent, inverse_lengths(sent))
        _add_pairs(losses, gradients, images, texts, bias, step == 0, backend)
        if gradients.texts is not None:
            # The gradients travel with their texts, and arrive home with the last shift.
            gradients = gradients._replace(texts=collectives.shift_around_ring(gradients.texts))
    return losses, gradients


def _add_pairs(
    losses: Tensor,
    gradients: _Gradients,
    images: ScaledRows,
    texts: ScaledRows,
    bias: Tensor,
    has_positives: bool,
    backend: Backend,
) -> None:
    """Add the pairs of all images with some texts to the losses and gradients.

    The loss of a negative pair with logit z is softplus(z), and its derivative is sigmoid(z). For
    the positive pairs on the diagonal, if there are any, z and the derivative change sign.
    """
    for tile in iterate_scaled_logits(images, texts, backend):
        logits = tile.logits.add_(bias[tile.rows, None])
        diagonal = logits.diagonal(tile.rows.start - tile.columns.start)
        positives = diagonal if has_positives else diagonal[:0]
        positives.neg_()
        losses[tile.rows] += F.softplus(logits, threshold=SOFTPLUS_THRESHOLD).sum(1)
        if all(total is None for total in gradients):
            continue
        weights = logits.sigmoid_()
        positives.neg_()
        if gradients.images is not None:
            gradients.images[tile.rows].addmm_(weights, tile.candidates)
        if gradients.texts is not None:
            gradients.texts[tile.columns].addmm_(weights.T, tile.anchors)
        if gradients.bias is not None:
            gradients.bias[tile.rows] += weights.sum(1)
