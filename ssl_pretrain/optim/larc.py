"""LARC, layer-wise adaptive rate control, on momentum SGD: the optimizer of SwAV and of solo-learn's CIFAR-10 recipes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ssl_pretrain.distributed import collectives


class LARC(torch.optim.Optimizer):
    """Follows NVIDIA/apex at 0bfb8300 (apex/parallel/LARC.py) around momentum SGD (v = m v + u, p = p - lr v).

    u = rate * (gradient + weight_decay * weight), rate = trust_coefficient * |weight| / (|gradient| + weight_decay * |weight| + 1e-8):
    the sum of norms, where LARS takes the norm of the sum. Where a norm is zero, u is the gradient. Groups with
    `adapt: False` are plain momentum SGD.

    Args:
        clip: rate = min(rate / lr, 1), so that no tensor moves by more than lr times its gradient (LARC proper).
    """

    def __init__(
        self, params: Iterable[Any], *, momentum: float, trust_coefficient: float, clip: bool
    ):
        self.found_inf: Tensor | None = None
        self.grad_scale: Tensor | None = None
        self.clip = clip
        defaults = {
            "lr": 0.0,
            "weight_decay": 0.0,
            "adapt": True,
            "momentum": momentum,
            "trust_coefficient": trust_coefficient,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._step_group(group, params)

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        whole = [p.grad for p in params if p.grad is not None]
        weights, updates = collectives.shards(params), collectives.shards(whole)
        if group["adapt"]:
            weight_norm, gradient_norm = collectives.norms(params, whole)
            rate = (
                group["trust_coefficient"]
                * weight_norm
                / (gradient_norm + group["weight_decay"] * weight_norm + 1e-8)
            )
            if self.clip:
                rate = (rate / group["lr"]).clamp(max=1.0) if group["lr"] else torch.ones_like(rate)
            nonzero = (weight_norm > 0) & (gradient_norm > 0)
            rate = torch.where(nonzero, rate, torch.ones_like(rate))
            decay = torch._foreach_mul(
                weights, list((group["weight_decay"] * nonzero.to(rate.dtype)).unbind())
            )
            updates = list(
                torch._foreach_mul(torch._foreach_add(updates, decay), list(rate.unbind()))
            )
        elif group["weight_decay"]:
            updates = list(torch._foreach_add(updates, weights, alpha=group["weight_decay"]))
        move(self, group, params, updates, lr=group["lr"])


def move(
    optimizer: Any, group: dict[str, Any], params: list[Tensor], updates: list[Tensor], *, lr: float, weight_decay: float = 0.0,
    nesterov: bool = False,
) -> None:  # fmt: skip
    """Momentum and update of what this rank holds of `params`, in one kernel, which optimizer.found_inf turns into none."""
    for p in params:
        if "momentum_buffer" not in optimizer.state[p]:
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    buffers = collectives.shards(optimizer.state[p]["momentum_buffer"] for p in params)
    torch._fused_sgd_(
        collectives.shards(params),
        updates,
        buffers if group["momentum"] else [],
        weight_decay=weight_decay,
        momentum=group["momentum"],
        lr=lr,
        dampening=0.0,
        nesterov=nesterov,
        maximize=False,
        is_first_step=False,
        grad_scale=None,
        found_inf=optimizer.found_inf,
    )
