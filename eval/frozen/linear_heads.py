"""Linear classifiers trained side by side, each with its own learning rate and weight decay."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from ssl_pretrain import rng
from ssl_pretrain.distributed import collectives, process_group

BN_EPS, BN_MOMENTUM = 1e-5, 0.1
LARC_EPS = 1e-8  # as in apex
MAX_LOGITS = 2**24  # largest number of logits in memory at a time; 64 MiB in float32
Init = Literal["normal", "uniform", "truncated"]
HeadOptimizer = Literal["sgd", "larc", "lars"]


class LinearHeads:
    """Linear layers trained by SGD on the same batches, with one matrix product for all of them.

    Each layer equals one that torch.optim.SGD trains alone. Each rank passes its rows of the global
    batch, and all ranks have the same weights.

    Args:
        dim: Number of features.
        num_classes: Number of classes.
        lrs: Learning rate of each head.
        weight_decays: Weight decay of each head, which also applies to its biases, except with
            LARS.
        like: Tensor with the features' dtype and device.
        nesterov: Use Nesterov momentum.
        momentum: SGD's momentum.
        init: Distribution of the initial weights, which are equal in all heads. "normal" has the
            standard deviation `init_std` and zero biases. "uniform" is nn.Linear's default, also
            for biases. "truncated" is Haiku's default, with zero biases.
        init_std: Standard deviation of normal initial weights. With 0, these weights are zero.
        affine: Train a scale and shift of the features per head, without weight decay, like those
            of a batch norm before the linear layer.
        optimizer: "sgd" is plain SGD. "larc" is SGD with apex's LARC without clipping, which scales
            a gradient's norm to a fraction of its weights' norm, separately for weights and biases.
            "lars" is LARS of MoCo v3 and MAE, which scales the decayed gradient of the weights in
            the same way, and neither scales nor decays biases.
        trust_coefficient: That fraction, for LARC and LARS.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        lrs: list[float],
        weight_decays: list[float],
        *,
        like: Tensor,
        nesterov: bool = True,
        momentum: float = 0.9,
        init: Init = "normal",
        init_std: float = 0.0,
        affine: bool = False,
        optimizer: HeadOptimizer = "sgd",
        trust_coefficient: float = 0.001,
    ):
        num_heads = len(lrs)
        self.momentum, self.nesterov = momentum, nesterov
        self.optimizer, self.trust_coefficient = optimizer, trust_coefficient
        self.lrs, self.weight_decays = (
            like.new_tensor(values).view(1, num_heads, 1) for values in (lrs, weight_decays)
        )
        self._weights = like.new_zeros(dim + 1, num_heads, num_classes)  # the last row is the bias
        self._weights.copy_(initial_weights(dim, num_classes, init, init_std))
        self._velocity = torch.zeros_like(self._weights)
        self._gradient = torch.zeros_like(self._weights)
        self._affine: Tensor | None = None  # scale and shift
        if affine:
            self._affine = like.new_zeros(2, dim, num_heads, 1)
            self._affine[0] = 1
            self._affine_velocity = torch.zeros_like(self._affine)

    @property
    def weights(self) -> Tensor:
        """Weights for features without scale and shift, (dim + 1, heads, classes)."""
        if self._affine is None:
            return self._weights
        scale, shift = self._affine
        inner, bias = self._weights[:-1], self._weights[-1:]
        return torch.cat([scale * inner, bias + (shift * inner).sum(0, keepdim=True)])

    def step(
        self,
        features: Tensor,
        labels: Tensor,
        lr_factor: float,
        global_batch_size: int | None = None,
    ) -> None:
        """Take one step on the mean cross entropy of a batch.

        Args:
            features: This rank's features, (n, dim).
            labels: Classes of this rank's images, (n,).
            lr_factor: Factor of every learning rate in this step.
            global_batch_size: Images on all ranks. Default: n images per rank.
        """
        errors = logits(self.weights, features).softmax(dim=2)
        errors[torch.arange(len(labels), device=labels.device), :, labels] -= 1
        errors = errors.flatten(1)
        errors /= global_batch_size or len(features) * process_group.world_size()
        gradient = self._gradient.flatten(1)
        torch.mm(features.T, errors, out=gradient[:-1])
        torch.sum(errors, dim=0, out=gradient[-1])
        global_gradient = collectives.reduce_sum(self._gradient)
        if self._affine is not None:
            affine_gradient = self._backpropagate(self._affine, global_gradient)
            self._descend(self._affine, self._affine_velocity, affine_gradient, lr_factor)
        if self.optimizer == "larc":
            self._apply_larc(global_gradient[:-1], self._weights[:-1])
            self._apply_larc(global_gradient[-1:], self._weights[-1:])
        elif self.optimizer == "lars":
            self._apply_lars(global_gradient[:-1], self._weights[:-1])
        else:
            global_gradient.addcmul_(self._weights, self.weight_decays)
        self._descend(self._weights, self._velocity, global_gradient, lr_factor)

    def _backpropagate(self, affine: Tensor, gradient: Tensor) -> Tensor:
        """Convert the gradient of `weights` to the gradient of the inner weights, in place.

        Returns:
            The gradient of scale and shift.
        """
        scale, shift = affine
        inner, bias_gradient = self._weights[:-1], gradient[-1:]
        affine_gradient = torch.stack(
            [(gradient[:-1] * inner).sum(2, True), (bias_gradient * inner).sum(2, True)]
        )
        gradient[:-1].mul_(scale).addcmul_(shift, bias_gradient)
        return affine_gradient

    def _apply_larc(self, gradient: Tensor, weights: Tensor) -> None:
        """Apply apex's LARC to the gradient in place, unless it or the weights are zero."""
        weight_norm, gradient_norm = _head_norms(weights), _head_norms(gradient)
        update_norm = gradient_norm + weight_norm * self.weight_decays
        scale = self.trust_coefficient * weight_norm / (update_norm + LARC_EPS)
        is_scaled = (weight_norm > 0) & (gradient_norm > 0)
        gradient.addcmul_(weights, self.weight_decays * is_scaled)
        gradient.mul_(torch.where(is_scaled, scale, 1.0))

    def _apply_lars(self, gradient: Tensor, weights: Tensor) -> None:
        """Decay and scale the gradient in place. Zero gradients or weights are not scaled."""
        gradient.addcmul_(weights, self.weight_decays)
        weight_norm, update_norm = _head_norms(weights), _head_norms(gradient)
        is_scaled = (weight_norm > 0) & (update_norm > 0)
        scale = self.trust_coefficient * weight_norm / update_norm
        gradient.mul_(torch.where(is_scaled, scale, 1.0))

    def _descend(
        self, weights: Tensor, velocity: Tensor, gradient: Tensor, lr_factor: float
    ) -> None:
        velocity.mul_(self.momentum).add_(gradient)
        step = gradient.add_(velocity, alpha=self.momentum) if self.nesterov else velocity
        weights.addcmul_(step, self.lrs, value=-lr_factor)


def _head_norms(values: Tensor) -> Tensor:
    """Return the Euclidean norm of each head's values, (1, heads, 1), of (rows, heads, classes)."""
    return torch.linalg.vector_norm(values, dim=(0, 2), keepdim=True)


def initial_weights(dim: int, num_classes: int, init: Init, init_std: float) -> Tensor:
    """Return the weights before the first step, float64 (dim + 1, 1, classes).

    The seed is fixed, so every call draws the same weights.
    """
    generator = torch.Generator().manual_seed(rng.derive_seed(0, 0, 0))
    shape = dim + 1, 1, num_classes
    weights = torch.zeros(shape, dtype=torch.float64)
    if init == "uniform":
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
        return (2 * uniform - 1) / dim**0.5
    if init == "truncated":
        std = 1 / dim**0.5  # before truncation at two standard deviations
        nn.init.trunc_normal_(weights[:-1], std=std, a=-2 * std, b=2 * std, generator=generator)
    elif init_std:
        normal = torch.randn(dim, *shape[1:], generator=generator, dtype=torch.float64)
        weights[:-1] = normal * init_std
    return weights


class FeatureNorm:
    """Batch norm of features over the global batch, with running statistics for evaluation.

    The scale and shift that VISSL's eval_mlp trains belong to the heads (`affine`), because each
    head has its own.
    """

    def __init__(self, dim: int, like: Tensor, eps: float = BN_EPS):
        self.eps = eps
        self.mean, self.variance = like.new_zeros(dim), like.new_ones(dim)

    def normalize_batch(self, features: Tensor) -> Tensor:
        """Normalize by the mean and variance over all ranks, and update the running statistics."""
        count = len(features) * process_group.world_size()
        mean = collectives.reduce_sum(features.sum(dim=0)) / count
        variance = collectives.reduce_sum((features - mean).square().sum(dim=0)) / count
        self.mean.lerp_(mean, BN_MOMENTUM)
        self.variance.lerp_(variance * count / max(1, count - 1), BN_MOMENTUM)
        return (features - mean) / (variance + self.eps).sqrt()

    def __call__(self, features: Tensor) -> Tensor:
        """Normalize features (n, dim) by the running mean and variance."""
        return (features - self.mean) / (self.variance + self.eps).sqrt()


def logits(weights: Tensor, features: Tensor) -> Tensor:
    """Return the logits (n, heads, classes) of heads with weights (dim + 1, heads, classes)."""
    flat = weights.flatten(1)
    return torch.addmm(flat[-1], features, flat[:-1]).view(len(features), *weights.shape[1:])


def scores(weights: Tensor, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return accuracy in [0, 1] and mean cross entropy in nats of each head, both (heads,).

    Args:
        weights: Weights (heads, dim + 1, classes). The last row is the bias.
        features: Features, (n, dim).
        labels: Classes of the images, (n,).
    """
    weights = weights.transpose(0, 1).contiguous()
    num_rows = max(1, MAX_LOGITS // weights[0].numel())
    num_correct, losses = [], []
    for chunk, chunk_labels in zip(features.split(num_rows), labels.split(num_rows)):
        chunk_logits = logits(weights, chunk)
        num_correct.append((chunk_logits.argmax(dim=2) == chunk_labels[:, None]).sum(dim=0))
        index = chunk_labels[:, None, None].expand(-1, chunk_logits.shape[1], 1)
        losses.append(-chunk_logits.log_softmax(dim=2).gather(2, index).sum(dim=(0, 2)))
    accuracies = torch.stack(num_correct).sum(dim=0).double() / len(features)
    return accuracies, torch.stack(losses).sum(dim=0) / len(features)


def best_setting(accuracies: Sequence[float], losses: Sequence[float]) -> int:
    """Return the index of the highest accuracy. The lowest cross entropy breaks ties.

    A cross entropy of NaN counts as infinite.
    """
    sort_keys = list(zip(accuracies, -np.nan_to_num(losses, nan=np.inf)))
    return max(range(len(sort_keys)), key=sort_keys.__getitem__)


def edge_note(lr: float, lrs: Sequence[float]) -> str:
    """Return a note if a chosen learning rate is the smallest or largest of several, else ""."""
    is_at_edge = len(set(lrs)) > 1 and lr in (min(lrs), max(lrs))
    return ", at the edge of the grid" if is_at_edge else ""


def setting_name(lr: float, weight_decay: float) -> str:
    """Return the name of a setting in the result tables."""
    return f"lr {lr:g}, wd {weight_decay:g}"
