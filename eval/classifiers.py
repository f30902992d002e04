"""Linear classifiers trained side by side on the same features, each with its own learning rate and weight decay."""

from __future__ import annotations

import torch
from torch import Tensor

from ssl_pretrain import distributed, draws

SMALLEST = 1e-5  # batch norm's epsilon


class Classifiers:
    """What torch.optim.SGD makes of each of several linear layers that see the same batches, in one matrix product for all.

    With several ranks each gives its rows of the global batch, and all ranks hold the same weights.

    Args:
        lrs, weight_decays: of each classifier; the decay is of biases too.
        init_std: of the weights, the same draw for every classifier; 0: they begin at zero, as the biases do.
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
        init_std: float = 0.0,
    ):
        heads = len(lrs)
        self.momentum, self.nesterov = momentum, nesterov
        self.lr, self.decay = (like.new_tensor(values).view(1, heads, 1) for values in (lrs, weight_decays))
        self.weights = like.new_zeros(dim + 1, heads, num_classes)  # the last row is the bias
        self._velocity, self._gradient = torch.zeros_like(self.weights), torch.zeros_like(self.weights)
        if init_std:
            generator = torch.Generator().manual_seed(draws.seed_of(0, 0, 0))
            drawn = torch.randn(dim, 1, num_classes, generator=generator, dtype=torch.float64) * init_std
            self.weights[:-1] = drawn.to(like)

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
        errors = errors.flatten(1).div_(count or len(found) * distributed.world_size())
        gradient = self._gradient.flatten(1)
        torch.mm(found.T, errors, out=gradient[:-1])
        torch.sum(errors, dim=0, out=gradient[-1])
        summed = distributed.reduce_sum(self._gradient)
        summed.addcmul_(self.weights, self.decay)
        self._velocity.mul_(self.momentum).add_(summed)
        if self.nesterov:
            self.weights.addcmul_(summed.add_(self._velocity, alpha=self.momentum), self.lr, value=-factor)
        else:
            self.weights.addcmul_(self._velocity, self.lr, value=-factor)


class FeatureNorm:
    """Batch norm of features over the global batch, without scale and shift; running statistics for evaluation (VISSL's eval_mlp)."""

    def __init__(self, dim: int, like: Tensor, momentum: float = 0.1):
        self.mean, self.variance, self.momentum = like.new_zeros(dim), like.new_ones(dim), momentum

    def train(self, found: Tensor) -> Tensor:
        """The batch normalized by its own mean and variance, all ranks' rows together, which also move the running ones."""
        count = len(found) * distributed.world_size()
        mean = distributed.reduce_sum(found.sum(dim=0)) / count
        variance = distributed.reduce_sum((found - mean).square().sum(dim=0)) / count
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
    right = [(logits(weights, some).argmax(dim=2) == truth[:, None]).sum(dim=0) for some, truth in _chunks(weights, found, labels)]
    return torch.stack(right).sum(dim=0).double() / len(found)


def cross_entropies(weights: Tensor, found: Tensor, labels: Tensor) -> Tensor:
    """Each classifier's mean cross entropy in nats, (heads,)."""
    weights = weights.transpose(0, 1).contiguous()
    sums = []
    for some, truth in _chunks(weights, found, labels):
        scores = logits(weights, some)
        sums.append(-scores.log_softmax(dim=2).gather(2, truth[:, None, None].expand(-1, scores.shape[1], 1)).sum(dim=(0, 2)))
    return torch.stack(sums).sum(dim=0) / len(found)


def _chunks(weights: Tensor, found: Tensor, labels: Tensor) -> zip:
    """Rows whose logits of all classifiers are at most 64 MiB."""
    rows = max(1, 2**24 // weights[0].numel())
    return zip(found.split(rows), labels.split(rows))


def best(reached: Tensor, losses: Tensor) -> int:
    """The classifier of the highest accuracy; among equals, of the lowest cross entropy, a diverged one last."""
    losses = losses.nan_to_num(nan=torch.inf)
    return max(range(len(reached)), key=lambda head: (reached[head].item(), -losses[head].item()))
