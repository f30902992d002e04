"""LARC, layer-wise adaptive rate control, on momentum SGD: the optimizer of SwAV and of solo-learn's CIFAR-10 recipes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class LARC(torch.optim.Optimizer):
    """Follows NVIDIA/apex at 0bfb8300 (apex/parallel/LARC.py) around momentum SGD (v = m v + u, p = p - lr v).

    u = rate * (gradient + weight_decay * weight), rate = trust_coefficient * |weight| / (|gradient| + weight_decay * |weight| + 1e-8):
    the sum of norms, where LARS takes the norm of the sum. Where a norm is zero, u is the gradient. Groups with
    `adapt: False` are plain momentum SGD.

    Args:
        clip: rate = min(rate / lr, 1), so that no tensor moves by more than lr times its gradient (LARC proper).
    """

    def __init__(self, params: Iterable[Any], *, momentum: float, trust_coefficient: float, clip: bool):
        self.found_inf: Tensor | None = None
        self.grad_scale: Tensor | None = None
        self.clip = clip
        defaults = {"lr": 0.0, "weight_decay": 0.0, "adapt": True, "momentum": momentum, "trust_coefficient": trust_coefficient}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._step_group(group, params)

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        buffers = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in params]
        updates = [p.grad for p in params if p.grad is not None]
        if group["adapt"]:
            weight_norm, gradient_norm = torch.stack(torch._foreach_norm(params)), torch.stack(torch._foreach_norm(updates))
            rate = group["trust_coefficient"] * weight_norm / (gradient_norm + group["weight_decay"] * weight_norm + 1e-8)
            if self.clip:
                rate = (rate / group["lr"]).clamp(max=1.0) if group["lr"] else torch.ones_like(rate)
            nonzero = (weight_norm > 0) & (gradient_norm > 0)
            rate = torch.where(nonzero, rate, torch.ones_like(rate))
            decay = torch._foreach_mul(params, list((group["weight_decay"] * nonzero.to(rate.dtype)).unbind()))
            updates = list(torch._foreach_mul(torch._foreach_add(updates, decay), list(rate.unbind())))
        elif group["weight_decay"]:
            updates = list(torch._foreach_add(updates, params, alpha=group["weight_decay"]))
        torch._fused_sgd_(  # momentum and update in one kernel, which found_inf turns into none
            params,
            updates,
            buffers if group["momentum"] else [],
            weight_decay=0.0,
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
            grad_scale=None,
            found_inf=self.found_inf,
        )
