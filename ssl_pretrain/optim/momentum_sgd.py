"""Momentum SGD, LARS and LARC, which skip steps whose gradient is not finite."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ssl_pretrain.distributed import collectives
from ssl_pretrain.optim import scaling

Group = dict[str, Any]


class SGD(torch.optim.Optimizer):
    """Momentum SGD, v = momentum * v + gradient + weight_decay * p and p = p - lr * v.

    A step is masked on the device by the protocol of torch's fused kernels, which `GradScaler` also
    uses. `optimizer.found_inf` is a scalar tensor, set before `step`. If it is 1, the kernel
    changes neither weights nor buffers. The host does not wait for its value. The fused Adam and
    AdamW of torch follow the same protocol. `torch.optim.SGD` breaks the protocol if the first step
    is masked, because it creates momentum buffers without initializing them.

    Each rank updates its own shards of sharded parameters.

    Args:
        params: Parameters, or groups of them.
        momentum: Factor of the momentum buffer before a gradient is added.
        nesterov: Use Nesterov momentum.
    """

    def __init__(
        self, params: Iterable[Any], *, momentum: float, nesterov: bool = False, **defaults: Any
    ):
        self.found_inf: Tensor | None = None
        self.grad_scale: Tensor | None = None
        rates = {"lr": 0.0, "weight_decay": 0.0}
        super().__init__(params, rates | {"momentum": momentum, "nesterov": nesterov} | defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, unless `found_inf` is 1."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._step_group(group, params, [p.grad for p in params])

    def _step_group(self, group: Group, params: list[Tensor], gradients: list[Tensor]) -> None:
        updates, decay = collectives.local_tensors(gradients), group["weight_decay"]
        self._apply(group, params, updates, lr=group["lr"], weight_decay=decay)

    def _apply(
        self,
        group: Group,
        params: list[Tensor],
        updates: list[Tensor],
        *,
        lr: float,
        weight_decay: float = 0.0,
    ) -> None:
        """Apply momentum and update this rank's shards of the parameters, in one kernel."""
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = collectives.local_tensors(self.state[p]["momentum_buffer"] for p in params)
        torch._fused_sgd_(
            collectives.local_tensors(params),
            updates,
            buffers if group["momentum"] else [],
            weight_decay=weight_decay,
            momentum=group["momentum"],
            lr=lr,
            dampening=0.0,
            nesterov=group["nesterov"],
            maximize=False,
            is_first_step=False,
            grad_scale=None,
            found_inf=self.found_inf,
        )


class LARS(SGD):
    """Layer-wise adaptive rate scaling (You et al., arXiv:1708.03888).

    The update of an adapted tensor is trust * u with u = gradient + weight_decay * p, where
    trust = trust_coefficient * |p| / |u|, or 1 if a norm is zero. Groups with `adapt: False` use
    plain momentum SGD. The gradients are overwritten. The number of kernels does not depend on the
    number of tensors.

    Args:
        params: Parameters, or groups of them.
        momentum: Factor of the momentum buffer before an update is added.
        trust_coefficient: Length of a step relative to the length of the weights.
        convention: `classic` puts lr inside the momentum buffer, v = momentum * v + lr * trust * u
            and p = p - v (google-research/simclr, lars_optimizer.py). `popular` puts it outside,
            v = momentum * v + trust * u and p = p - lr * v. The two differ while lr changes.
    """

    def __init__(
        self, params: Iterable[Any], *, momentum: float, trust_coefficient: float, convention: str
    ):
        if convention not in ("classic", "popular"):
            raise ValueError(
                f"optim.momentum_convention: {convention!r} is unknown; choose classic or popular"
            )
        self.convention = convention
        super().__init__(params, momentum=momentum, adapt=True, trust_coefficient=trust_coefficient)

    def _step_group(self, group: Group, params: list[Tensor], gradients: list[Tensor]) -> None:
        updates = collectives.local_tensors(gradients)
        if group["weight_decay"]:  # added in place, because a copy of all gradients is expensive
            torch._foreach_add_(
                updates, collectives.local_tensors(params), alpha=group["weight_decay"]
            )
        is_classic = self.convention == "classic"
        if group["adapt"]:
            weight_norms, update_norms = collectives.tensor_norms(params, gradients)
            trust = group["trust_coefficient"] * weight_norms / update_norms
            nonzero = (weight_norms > 0) & (update_norms > 0)
            trust = torch.where(nonzero, trust, torch.ones_like(trust))
            factors = trust * group["lr"] if is_classic else trust
            scaling.scale(updates, factors)
        elif is_classic:
            torch._foreach_mul_(updates, group["lr"])
        self._apply(group, params, updates, lr=1.0 if is_classic else group["lr"])


class LARC(SGD):
    """Layer-wise adaptive rate control, from NVIDIA/apex at 0bfb8300 (apex/parallel/LARC.py).

    SwAV and solo-learn's CIFAR-10 recipes use it. The update of an adapted tensor is
    rate * (gradient + weight_decay * p), where
    rate = trust_coefficient * |p| / (|gradient| + weight_decay * |p| + 1e-8). Where LARS has the
    norm of a sum, LARC has the sum of norms. If a norm is zero, the update is the gradient. Groups
    with `adapt: False` use plain momentum SGD. The gradients are overwritten.

    Args:
        params: Parameters, or groups of them.
        momentum: Factor of the momentum buffer before an update is added.
        trust_coefficient: Length of a step relative to the length of the weights.
        clip: Use min(rate / lr, 1), so that no tensor's rate exceeds lr.
    """

    def __init__(
        self, params: Iterable[Any], *, momentum: float, trust_coefficient: float, clip: bool
    ):
        self.clip = clip
        super().__init__(params, momentum=momentum, adapt=True, trust_coefficient=trust_coefficient)

    def _step_group(self, group: Group, params: list[Tensor], gradients: list[Tensor]) -> None:
        if not group["adapt"]:
            super()._step_group(group, params, gradients)
            return
        weights, updates = collectives.local_tensors(params), collectives.local_tensors(gradients)
        weight_norms, gradient_norms = collectives.tensor_norms(params, gradients)
        denominators = gradient_norms + group["weight_decay"] * weight_norms + 1e-8
        rate = group["trust_coefficient"] * weight_norms / denominators
        if self.clip:
            rate = (rate / group["lr"]).clamp(max=1.0) if group["lr"] else torch.ones_like(rate)
        nonzero = (weight_norms > 0) & (gradient_norms > 0)
        rate = torch.where(nonzero, rate, torch.ones_like(rate))
        decay = group["weight_decay"] * nonzero.to(rate.dtype)
        scaling.add_and_scale(updates, weights, decay, rate)
        self._apply(group, params, updates, lr=group["lr"])
