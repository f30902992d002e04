"""Linear classifiers trained side by side on the same features, each with its own learning rate and weight decay."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ssl_pretrain import rng
from ssl_pretrain.distributed import collectives, process_group

SMALLEST = 1e-5  # batch norm's epsilon
LARC_EPS = 1e-8  # apex's
Start = Literal["normal", "uniform", "truncated"]


class Classifiers:
    """What torch.optim.SGD makes of each of several linear layers that see the same batches, in one matrix product for all.

    With several ranks each gives its rows of the global batch, and all ranks hold the same weights.

    Args:
        lrs, weight_decays: of each classifier; the decay is of biases too.
        start: Distribution of the first weights, the same draw for every classifier. "normal": deviation `init_std`, biases 0,
            all at zero if it is 0. "uniform": nn.Linear's default, biases too. "truncated": Haiku's default, biases 0.
        affine: Give each classifier a trained scale and shift of its features, without weight decay, as the batch norm
            before a linear layer has them.
        trust: LARC's coefficient, without clipping: a gradient is scaled to this share of its weights' norm, weights and
            biases apart. 0: plain SGD.
        like: gives the features' type and device.
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
        start: Start = "normal",
        init_std: float = 0.0,
        affine: bool = False,
        trust: float = 0.0,
    ):
        heads = len(lrs)
        self.momentum, self.nesterov, self.trust = momentum, nesterov, trust
        self.lr, self.decay = (
            like.new_tensor(values).view(1, heads, 1) for values in (lrs, weight_decays)
        )
        self._weights = like.new_zeros(dim + 1, heads, num_classes)  # the last row is the bias
        self._weights.copy_(first_weights(dim, num_classes, start, init_std))
        self._velocity, self._gradient = (
            torch.zeros_like(self._weights),
            torch.zeros_like(self._weights),
        )
        self._affine = like.new_zeros(2, dim, heads, 1) if affine else None  # scale and shift
        if self._affine is not None:
            self._affine[0] = 1
            self._affine_velocity = torch.zeros_like(self._affine)

    @property
    def weights(self) -> Tensor:
        """(dim + 1, heads, classes): what multiplies the features, scale and shift included; the last row is the bias."""
        if self._affine is None:
            return self._weights
        scale, shift = self._affine
        return torch.cat(
            [
                scale * self._weights[:-1],
                self._weights[-1:] + (shift * self._weights[:-1]).sum(0, keepdim=True),
            ]
        )

    def logits(self, found: Tensor) -> Tensor:
        """(n, heads, classes) of features (n, dim)."""
        return logits(self.weights, found)

    def step(self, found: Tensor, labels: Tensor, factor: float, count: int | None = None) -> None:
        """One step on the mean cross entropy of a batch.

        Args:
            found: this rank's features, (n, dim).
            labels: their classes, (n,).
            factor: of every learning rate now.
            count: images of all ranks; default: as many on each as here.
        """
        errors = self.logits(found).softmax(dim=2)
        errors[torch.arange(len(labels), device=labels.device), :, labels] -= 1
        errors = errors.flatten(1).div_(count or len(found) * process_group.world_size())
        gradient = self._gradient.flatten(1)
        torch.mm(found.T, errors, out=gradient[:-1])
        torch.sum(errors, dim=0, out=gradient[-1])
        summed = collectives.reduce_sum(self._gradient)
        of_affine = self._through_affine(summed) if self._affine is not None else None
        if self.trust:
            self._adapt(summed[:-1], self._weights[:-1])
            self._adapt(summed[-1:], self._weights[-1:])
        else:
            summed.addcmul_(self._weights, self.decay)
        self._descend(self._weights, self._velocity, summed, factor)
        if self._affine is not None and of_affine is not None:
            self._descend(self._affine, self._affine_velocity, of_affine, factor)

    def _through_affine(self, gradient: Tensor) -> Tensor:
        """Turn the gradient of `weights` into that of the weights behind scale and shift, and return that of those two."""
        assert self._affine is not None, "called with an affine norm alone"
        scale, shift = self._affine
        of_bias = gradient[-1:]
        of_affine = torch.stack(
            [
                (gradient[:-1] * self._weights[:-1]).sum(2, True),
                (of_bias * self._weights[:-1]).sum(2, True),
            ]
        )
        gradient[:-1].mul_(scale).addcmul_(shift, of_bias)
        return of_affine

    def _adapt(self, gradient: Tensor, weights: Tensor) -> None:
        """LARC of apex: leaves gradients of zero weights, and those that are zero, as they are, and does not decay them."""
        of_weights, of_gradient = (
            torch.linalg.vector_norm(each, dim=(0, 2), keepdim=True) for each in (weights, gradient)
        )
        adapted = self.trust * of_weights / (of_gradient + of_weights * self.decay + LARC_EPS)
        moves = (of_weights > 0) & (of_gradient > 0)
        gradient.addcmul_(weights, self.decay * moves).mul_(torch.where(moves, adapted, 1.0))

    def _descend(self, weights: Tensor, velocity: Tensor, gradient: Tensor, factor: float) -> None:
        velocity.mul_(self.momentum).add_(gradient)
        step = gradient.add_(velocity, alpha=self.momentum) if self.nesterov else velocity
        weights.addcmul_(step, self.lr, value=-factor)


def first_weights(dim: int, num_classes: int, start: Start, init_std: float) -> Tensor:
    """float64 (dim + 1, 1, classes): the weights before the first step, always the same draw; see `Classifiers`."""
    generator = torch.Generator().manual_seed(rng.seed_of(0, 0, 0))
    weights = torch.zeros(dim + 1, 1, num_classes, dtype=torch.float64)
    if start == "uniform":
        return (
            2 * torch.rand(weights.shape, generator=generator, dtype=torch.float64) - 1
        ) / dim**0.5
    if start == "truncated":
        std = 1 / dim**0.5  # before the cut at two deviations
        nn.init.trunc_normal_(weights[:-1], std=std, a=-2 * std, b=2 * std, generator=generator)
    elif init_std:
        weights[:-1] = (
            torch.randn(dim, 1, num_classes, generator=generator, dtype=torch.float64) * init_std
        )
    return weights


class FeatureNorm:
    """Batch norm of features over the global batch; running statistics for evaluation.

    Scale and shift, which VISSL's eval_mlp trains, are the classifiers' (`affine`), as each has its own.
    """

    def __init__(self, dim: int, like: Tensor, momentum: float = 0.1):
        self.mean, self.variance, self.momentum = like.new_zeros(dim), like.new_ones(dim), momentum

    def train(self, found: Tensor) -> Tensor:
        """The batch normalized by its own mean and variance, all ranks' rows together, which also move the running ones."""
        count = len(found) * process_group.world_size()
        mean = collectives.reduce_sum(found.sum(dim=0)) / count
        variance = collectives.reduce_sum((found - mean).square().sum(dim=0)) / count
        self.mean.lerp_(mean, self.momentum)
        self.variance.lerp_(variance * count / max(1, count - 1), self.momentum)
        return (found - mean) / (variance + SMALLEST).sqrt()

    def __call__(self, found: Tensor) -> Tensor:
        return (found - self.mean) / (self.variance + SMALLEST).sqrt()


def logits(weights: Tensor, found: Tensor) -> Tensor:
    """(n, heads, classes), of weights (dim + 1, heads, classes) and features (n, dim)."""
    flat = weights.flatten(1)
    return torch.addmm(flat[-1], found, flat[:-1]).view(len(found), *weights.shape[1:])


def accuracies(weights: Tensor, found: Tensor, labels: Tensor) -> Tensor:
    """Each classifier's accuracy in [0, 1], (heads,). `weights` (heads, dim + 1, classes)."""
    weights = weights.transpose(0, 1).contiguous()
    right = [
        (logits(weights, some).argmax(dim=2) == truth[:, None]).sum(dim=0)
        for some, truth in _chunks(weights, found, labels)
    ]
    return torch.stack(right).sum(dim=0).double() / len(found)


def cross_entropies(weights: Tensor, found: Tensor, labels: Tensor) -> Tensor:
    """Each classifier's mean cross entropy in nats, (heads,)."""
    weights = weights.transpose(0, 1).contiguous()
    sums = []
    for some, truth in _chunks(weights, found, labels):
        scores = logits(weights, some)
        sums.append(
            -scores.log_softmax(dim=2)
            .gather(2, truth[:, None, None].expand(-1, scores.shape[1], 1))
            .sum(dim=(0, 2))
        )
    return torch.stack(sums).sum(dim=0) / len(found)


def _chunks(weights: Tensor, found: Tensor, labels: Tensor) -> zip:
    """Rows whose logits of all classifiers are at most 64 MiB."""
    rows = max(1, 2**24 // weights[0].numel())
    return zip(found.split(rows), labels.split(rows))


def best(reached: Tensor, losses: Tensor) -> int:
    """The classifier of the highest accuracy; among equals, of the lowest cross entropy, a diverged one last."""
    losses = losses.nan_to_num(nan=torch.inf)
    return max(range(len(reached)), key=lambda head: (reached[head].item(), -losses[head].item()))
