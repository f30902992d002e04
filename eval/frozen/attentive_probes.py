"""Attentive probes: one query attends to the tokens of an image, and a linear layer classifies it.

Several probes are trained on the same tokens, each with its own learning rate and weight decay.
With a single query, the keys and values of the tokens need not be computed. The attention logit of
head h for token x is (query_h W_key) x, and the attended value is W_value applied to the weighted
sum of the tokens. A probe then only costs one vector per head, and one matrix product can serve
many probes.

The bias of the keys is left out. It adds the same number to the logits of all tokens, which the
softmax cancels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_pretrain import rng
from ssl_pretrain.distributed import collectives

INIT_STD = 0.02  # for weights and queries, as in the code of CAPI, V-JEPA and V-JEPA 2
ADAM_EPS = 1e-8
Kind = Literal["capi", "jepa"]


@dataclass(frozen=True)
class ProbeShape:
    """Architecture of a probe.

    Attributes:
        kind: "capi" is query, attention and linear layer. "jepa" adds a norm of the tokens, a
            projection of the query, a residual, and a norm and an MLP after the attention.
        dim: Width of the tokens.
        num_classes: Number of classes.
        num_heads: Attention heads, a divisor of `dim`.
        num_blocks: Blocks of self-attention before the query, as in V-JEPA 2.
    """

    kind: Kind
    dim: int
    num_classes: int
    num_heads: int
    num_blocks: int = 0


class AttentiveProbes:
    """Probes of one shape with equal initial weights.

    Args:
        shape: Architecture. Blocks of self-attention change the tokens, so probes with such blocks
            cannot share work, and `num_probes` must be 1.
        num_probes: Number of probes.
        like: Tensor with the tokens' dtype and device.

    Attributes:
        weights: Weights by name. The first dimension of each is the probe.
    """

    def __init__(self, shape: ProbeShape, num_probes: int, like: Tensor):
        assert num_probes == 1 or not shape.num_blocks, "one probe with blocks at a time"
        self.shape, self.num_probes = shape, num_probes
        self.weights: dict[str, Tensor] = {
            name: value.to(like).expand(num_probes, *value.shape).clone().requires_grad_()
            for name, value in initial_weights(shape).items()
        }

    def logits(self, tokens: Tensor) -> Tensor:
        """Return the logits (probes, batch, classes) for tokens (batch, tokens, dim)."""
        weights, kind = self.weights, self.shape.kind
        for number in range(self.shape.num_blocks):
            tokens = self._self_attention(f"blocks.{number}.", tokens)
        if kind == "capi":
            x = self._attend(weights["query"], tokens)
        else:
            query = weights["query"]
            tokens = F.layer_norm(tokens, tokens.shape[-1:])  # scale and shift: per probe
            x = query[:, None] + self._attend(
                self._linear("q", query[:, None])[:, 0],
                tokens,
                weights["norm1.weight"],
                weights["norm1.bias"],
            )
            normalized = F.layer_norm(x, x.shape[-1:])
            normalized = normalized * weights["norm2.weight"][:, None]
            hidden = F.gelu(self._linear("fc1", normalized + weights["norm2.bias"][:, None]))
            x = x + self._linear("fc2", hidden)
        return self._linear("linear", x)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        """Apply each probe's linear layer to x (probes, batch, inputs)."""
        bias = self.weights[f"{name}.bias"][:, None]
        return torch.baddbmm(bias, x, self.weights[f"{name}.weight"].transpose(1, 2))

    def _attend(
        self,
        query: Tensor,
        tokens: Tensor,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> Tensor:
        """Return the values (probes, batch, dim) that the queries (probes, dim) attend to.

        Scale and shift (probes, dim) apply to the tokens, as those of a norm.
        """
        heads = self.num_probes, self.shape.num_heads, -1
        key, value = (self.weights[f"{name}.weight"] for name in ("key", "value"))
        dim = tokens.shape[-1]
        directions = torch.einsum("phd,phdc->phc", query.view(heads), key.view(*heads, dim))
        directions = directions * (self.shape.num_heads / dim) ** 0.5
        if scale is not None:
            directions = directions * scale[:, None]
        attention = (tokens @ directions.flatten(0, 1).T).softmax(dim=1)
        sums = (attention.transpose(1, 2) @ tokens).unflatten(1, heads[:2])
        if scale is not None and shift is not None:
            sums = sums * scale[:, None] + shift[:, None]
        values = torch.einsum("bphc,phdc->pbhd", sums, value.view(*heads, dim)).flatten(2)
        return values + self.weights["value.bias"][:, None]

    def _self_attention(self, prefix: str, x: Tensor) -> Tensor:
        """Apply a pre-norm transformer block of the only probe to tokens (batch, tokens, dim)."""
        own = {
            name.removeprefix(prefix): value[0]
            for name, value in self.weights.items()
            if name.startswith(prefix)
        }
        shape = x.shape[-1:]
        normalized = F.layer_norm(x, shape, own["norm1.weight"], own["norm1.bias"])
        qkv = F.linear(normalized, own["qkv.weight"], own["qkv.bias"])
        query, key, value = qkv.unflatten(2, (3, self.shape.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x = x + F.linear(attended, own["proj.weight"], own["proj.bias"])
        normalized = F.layer_norm(x, shape, own["norm2.weight"], own["norm2.bias"])
        hidden = F.gelu(F.linear(normalized, own["fc1.weight"], own["fc1.bias"]))
        return x + F.linear(hidden, own["fc2.weight"], own["fc2.bias"])


def initial_weights(shape: ProbeShape) -> dict[str, Tensor]:
    """Return the weights of one probe before the first step, by name, in float32.

    The seed is fixed, so every call draws the same weights. The distributions are the authors'.
    """
    generator = torch.Generator().manual_seed(rng.derive_seed(0, 0, 0))
    dim, classes = shape.dim, shape.num_classes

    def normal(*size: int, divisor: float = 1.0) -> Tensor:
        weight = torch.empty(size)
        nn.init.trunc_normal_(weight, std=INIT_STD, generator=generator)
        return weight / divisor

    def layer(name: str, outputs: int, inputs: int, divisor: float = 1.0) -> dict[str, Tensor]:
        weight = normal(outputs, inputs, divisor=divisor)
        return {f"{name}.weight": weight, f"{name}.bias": torch.zeros(outputs)}

    def norm(name: str) -> dict[str, Tensor]:
        return {f"{name}.weight": torch.ones(dim), f"{name}.bias": torch.zeros(dim)}

    weights = {"query": normal(dim), "key.weight": normal(dim, dim)} | layer("value", dim, dim)
    if shape.kind == "capi":
        return weights | layer("linear", classes, dim)
    for number in range(shape.num_blocks):
        divisor = (2 * (number + 1)) ** 0.5
        block = norm("norm1") | layer("qkv", 3 * dim, dim) | layer("proj", dim, dim, divisor)
        block |= norm("norm2") | layer("fc1", 4 * dim, dim) | layer("fc2", dim, 4 * dim, divisor)
        weights |= {f"blocks.{number}.{name}": value for name, value in block.items()}
    divisor = (2 * max(1, shape.num_blocks)) ** 0.5
    weights |= norm("norm1") | layer("q", dim, dim) | norm("norm2")
    weights |= layer("fc1", 4 * dim, dim) | layer("fc2", dim, 4 * dim, divisor)
    # nn.Linear's own initialization, which the authors keep for the classifier.
    uniform = 2 * torch.rand(classes, dim + 1, generator=generator) - 1
    uniform = uniform / dim**0.5
    return weights | {"linear.weight": uniform[:, :-1], "linear.bias": uniform[:, -1]}


class ProbeOptimizer:
    """AdamW with a learning rate and a weight decay per probe.

    Each probe is trained as torch.optim.AdamW would train it alone. Each rank passes its rows of
    the global batch, and all ranks have the same weights.

    Args:
        probes: Probes to train.
        betas: Decay of the moments.
        undecayed: Names of the weights without weight decay.
        clip_norm: Largest norm of a probe's gradient over all its weights. 0 is no limit.
    """

    def __init__(
        self,
        probes: AttentiveProbes,
        betas: tuple[float, float],
        undecayed: frozenset[str] = frozenset(),
        clip_norm: float = 0.0,
    ):
        self.probes, self.betas = probes, betas
        self.undecayed, self.clip_norm = undecayed, clip_norm
        self._moments: Mapping[str, Tensor] = {
            name: torch.zeros(2, *value.shape, dtype=value.dtype, device=value.device)
            for name, value in probes.weights.items()
        }
        self._step = 0

    def step(
        self,
        tokens: Tensor,
        labels: Tensor,
        lrs: Sequence[float],
        weight_decays: Sequence[float],
        global_batch_size: int,
    ) -> None:
        """Take one step on the mean cross entropy of a batch.

        Args:
            tokens: Tokens of this rank's images, (n, tokens, dim).
            labels: Classes of this rank's images, (n,).
            lrs: Learning rate of each probe in this step.
            weight_decays: Weight decay of each probe in this step.
            global_batch_size: Images on all ranks.
        """
        weights = self.probes.weights
        logits = self.probes.logits(tokens).flatten(0, 1)
        targets = labels.repeat(self.probes.num_probes)
        # The probes share no weights, so the gradient of the sum contains each probe's own.
        loss = F.cross_entropy(logits, targets, reduction="sum") / global_batch_size
        gradients = torch.autograd.grad(loss, list(weights.values()))
        with torch.no_grad():
            reduced = dict(zip(weights, _sum_over_ranks(gradients)))
            if self.clip_norm:
                self._clip(reduced)
            self._step += 1
            for name, gradient in reduced.items():
                self._update(name, gradient, lrs, weight_decays)

    def _clip(self, gradients: dict[str, Tensor]) -> None:
        squares = [value.flatten(1).square().sum(1) for value in gradients.values()]
        factor = self.clip_norm / (torch.stack(squares).sum(0).sqrt() + 1e-6)  # as torch does
        for value in gradients.values():
            value.mul_(_per_probe(factor.clamp(max=1), value))

    def _update(
        self,
        name: str,
        gradient: Tensor,
        lrs: Sequence[float],
        weight_decays: Sequence[float],
    ) -> None:
        weight, (mean, square) = self.probes.weights[name], self._moments[name]
        lr = _per_probe(weight.new_tensor(lrs), weight)
        if name not in self.undecayed:
            weight.mul_(1 - lr * _per_probe(weight.new_tensor(weight_decays), weight))
        beta1, beta2 = self.betas
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = square.sqrt().div_((1 - beta2**self._step) ** 0.5).add_(ADAM_EPS)
        weight.sub_(mean / root * (lr / (1 - beta1**self._step)))


def _sum_over_ranks(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Return the sums over ranks, sent as one tensor."""
    flat = collectives.reduce_sum(torch.cat([gradient.flatten() for gradient in gradients]))
    slices = flat.split([gradient.numel() for gradient in gradients])
    return [values.view_as(gradient) for values, gradient in zip(slices, gradients)]


def _per_probe(values: Tensor, like: Tensor) -> Tensor:
    """Return one value per probe in a shape that multiplies a stack of weights."""
    return values.view(-1, *[1] * (like.ndim - 1))


def max_num_heads(dim: int, head_dim: int = 64) -> int:
    """Return the largest number of heads that divides `dim` into at least `head_dim`, or 1."""
    return next(
        (heads for heads in range(dim // head_dim, 0, -1) if dim % heads == 0),
        1,
    )
