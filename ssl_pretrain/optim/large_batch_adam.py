"""LAMB and Adan, whose bias corrections are computed on the device.

timm's implementations count the steps in Python, so they would also count a step that is masked on
the device.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ssl_pretrain.distributed import collectives
from ssl_pretrain.optim import scaling
from ssl_pretrain.optim.masked import Chunk, MaskedOptimizer, State


class LAMB(MaskedOptimizer):
    """Layer-wise adaptive moments (You et al., ICLR 2020, arXiv:1904.00962, algorithm 2).

    The update of an adapted tensor is trust * u with u = m / (sqrt(v) + eps) + weight_decay * p,
    where m and v are Adam's moments with bias correction, and trust = |p| / |u|, or 1 if a norm is
    zero. Groups with `adapt: False` have trust 1. The gradient is not clipped.

    Args:
        params: Parameters, or groups of them.
        betas: Decay rates of the two moments.
        eps: Number added to the root of the second moment.
    """

    def __init__(self, params: Iterable[Any], *, betas: Sequence[float], eps: float):
        super().__init__(params, betas=tuple(betas), eps=eps, adapt=True)

    def update(self, group: dict[str, Any], chunk: Chunk) -> None:
        """Update copies of weights and states in place."""
        _, weights, gradients, states = chunk
        beta1, beta2 = group["betas"]
        means, squares = (_moments(states, key, weights) for key in ("exp_avg", "exp_avg_sq"))
        steps = _count_steps(states, weights[0])
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, value=1 - beta2)
        roots = _roots(squares, steps, beta2, group["eps"])
        updates = _corrected_ratios(means, roots, steps, beta1)
        if group["weight_decay"]:
            torch._foreach_add_(updates, weights, alpha=group["weight_decay"])
        factors = torch.full_like(steps, group["lr"], dtype=weights[0].dtype)
        if group["adapt"]:
            norms = collectives.tensor_norms(weights, updates, sharded_as=chunk.params[0])
            trust = norms[0] / norms[1]
            nonzero = (norms[0] > 0) & (norms[1] > 0)
            factors = factors * torch.where(nonzero, trust, torch.ones_like(trust))
        scaling.scale(updates, factors)
        torch._foreach_sub_(weights, updates)


class Adan(MaskedOptimizer):
    """Adaptive Nesterov momentum (Xie et al., TPAMI 2024, arXiv:2208.06677, algorithm 1).

    Weight decay is proximal, p = p / (1 + lr * weight_decay), as in the paper.

    Args:
        params: Parameters, or groups of them.
        betas: Decay rates of the gradient, of its difference from the previous gradient, and of
            the second moment. These are 1 - beta in the paper.
        eps: Number added to the root of the second moment.
    """

    def __init__(self, params: Iterable[Any], *, betas: Sequence[float], eps: float):
        super().__init__(params, betas=tuple(betas), eps=eps)

    def update(self, group: dict[str, Any], chunk: Chunk) -> None:
        """Update copies of weights and states in place."""
        _, weights, gradients, states = chunk
        beta1, beta2, beta3 = group["betas"]
        keys = ("exp_avg", "exp_avg_diff", "exp_avg_sq", "previous_gradient")
        means, differences, squares, previous = (_moments(states, key, weights) for key in keys)
        steps = _count_steps(states, weights[0])
        change = list(torch._foreach_sub(gradients, previous))
        scaling.scale(change, (steps > 1).to(weights[0].dtype))  # 0 in the first step
        torch._foreach_copy_(previous, gradients)
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_lerp_(differences, change, 1 - beta2)
        torch._foreach_mul_(change, beta2)
        torch._foreach_add_(change, gradients)
        torch._foreach_mul_(squares, beta3)
        torch._foreach_addcmul_(squares, change, change, value=1 - beta3)
        roots = _roots(squares, steps, beta3, group["eps"])
        for moments, beta, factor in ((means, beta1, 1.0), (differences, beta2, beta2)):
            updates = _corrected_ratios(moments, roots, steps, beta)
            torch._foreach_add_(weights, updates, alpha=-group["lr"] * factor)
        torch._foreach_div_(weights, 1 + group["lr"] * group["weight_decay"])


def _moments(states: list[State], key: str, weights: list[Tensor]) -> list[Tensor]:
    """Return the tensor `key` of every state. Missing ones are added as zeros."""
    for state, weight in zip(states, weights):
        if key not in state:
            state[key] = torch.zeros_like(weight)
    return [state[key] for state in states]


def _count_steps(states: list[State], example: Tensor) -> Tensor:
    """Add this step to every parameter's number of steps and return them, shape (len(states),)."""
    for state in states:
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=example.device)
    steps = [state["step"] for state in states]
    torch._foreach_add_(steps, 1)
    return torch.stack(steps).double()


def _roots(squares: list[Tensor], steps: Tensor, beta: float, eps: float) -> list[Tensor]:
    """Return sqrt(square / (1 - beta**step)) + eps for every parameter."""
    roots = list(torch._foreach_sqrt(squares))
    scaling.scale(roots, (1 - beta**steps).rsqrt().to(roots[0].dtype))
    torch._foreach_add_(roots, eps)
    return roots


def _corrected_ratios(
    moments: list[Tensor], roots: list[Tensor], steps: Tensor, beta: float
) -> list[Tensor]:
    """Return moment / (1 - beta**step) / root for every parameter."""
    ratios = list(torch._foreach_div(moments, roots))
    scaling.scale(ratios, (1 - beta**steps).reciprocal().to(ratios[0].dtype))
    return ratios
