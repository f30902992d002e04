"""Train attentive probes with ours and with the authors' code, and compare everything.

Both start from the same weights and take five AdamW steps in float64 on the same tokens, with the
authors' parameter groups and schedules. It prints the largest relative differences of logits,
gradients and weights.

    git clone https://github.com/facebookresearch/capi && git -C capi checkout 98b4fa17
    git clone https://github.com/facebookresearch/jepa && git -C jepa checkout 51c59d51
    git clone https://github.com/facebookresearch/vjepa2 && git -C vjepa2 checkout c2963a47
    PYTHONPATH=. python tests/foreign/attentive.py capi capi
    PYTHONPATH=. python tests/foreign/attentive.py vjepa jepa
    PYTHONPATH=. python tests/foreign/attentive.py vjepa2 vjepa2
"""

import argparse
import ast
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comparison import largest_difference, relative_difference
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_pretrain.eval.attentive_protocols import ATTENTIVE_PROTOCOLS, ProbeSetting
from ssl_pretrain.eval.frozen.attentive_probes import (
    AttentiveProbes,
    ProbeOptimizer,
    ProbeShape,
)

DIM, NUM_CLASSES, NUM_IMAGES, NUM_TOKENS = 128, 7, 24, 17
NUM_STEPS, SCHEDULE_STEPS = 5, 40


class Capi:
    """CAPI's probe, and AdamW with its groups and schedule."""

    shape = ProbeShape("capi", DIM, NUM_CLASSES, num_heads=DIM // 64)
    setting = ProbeSetting(2e-3, 5e-2, warmup=NUM_STEPS / SCHEDULE_STEPS)

    def __init__(self, folder: Path):
        definitions = read_definitions(
            folder / "eval_classification.py", "AttnPoolClassifier", nn=nn, torch=torch, F=F
        )
        self.probe = definitions["AttnPoolClassifier"](DIM, NUM_CLASSES)

    def rename(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors of the authors' probe under our names."""
        return {
            "query": tensors["query_token"],
            "key.weight": tensors["kv.weight"][:DIM],
            "value.weight": tensors["kv.weight"][DIM:],
            "value.bias": tensors["kv.bias"][DIM:],
            "linear.weight": tensors["linear.weight"],
            "linear.bias": tensors["linear.bias"],
        }

    def build_optimizer(self) -> tuple[torch.optim.Optimizer, Callable[[int], None]]:
        """Return the optimizer, and a function that sets the rates of a step."""
        named = dict(self.probe.named_parameters())
        groups = [
            {"params": [named[n] for n in named if "bias" not in n], "weight_decay": 5e-2},
            {"params": [named[n] for n in named if "bias" in n], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95))
        warmup = np.linspace(0, 1, NUM_STEPS)
        cosine = (np.cos(np.linspace(0, np.pi, SCHEDULE_STEPS - NUM_STEPS)) + 1) / 2
        factors = np.concatenate([warmup, cosine])

        def set_rates(step: int) -> None:
            for group in optimizer.param_groups:
                group["lr"] = factors[step] * self.setting.lr

        return optimizer, set_rates


class Vjepa:
    """V-JEPA's probe, and AdamW with its groups and schedules."""

    num_heads, depth = 4, 1
    setting = ATTENTIVE_PROTOCOLS["vjepa"].settings[0]

    def __init__(self, folder: Path):
        sys.path.insert(0, str(folder))
        self.folder = folder
        from src.models.attentive_pooler import AttentiveClassifier

        self.probe = AttentiveClassifier(
            embed_dim=DIM, num_heads=self.num_heads, depth=self.depth, num_classes=NUM_CLASSES
        ).double()
        self.shape = ProbeShape("jepa", DIM, NUM_CLASSES, self.num_heads, self.depth - 1)

    def rename(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors of the authors' probe under our names."""
        cross, block = "pooler.cross_attention_block.", "pooler.blocks.{}."
        keys_and_values = {kind: tensors[f"{cross}xattn.kv.{kind}"] for kind in ("weight", "bias")}
        renamed = {
            "query": tensors["pooler.query_tokens"][0, 0],
            "key.weight": keys_and_values["weight"][:DIM],
            "value.weight": keys_and_values["weight"][DIM:],
            "value.bias": keys_and_values["bias"][DIM:],
        }
        names = {"q": cross + "xattn.q", "linear": "linear"}
        names |= {norm: cross + norm for norm in ("norm1", "norm2")}
        names |= {layer: f"{cross}mlp.{layer}" for layer in ("fc1", "fc2")}
        for i in range(self.depth - 1):
            for ours, theirs in {
                "norm1": "norm1",
                "qkv": "attn.qkv",
                "proj": "attn.proj",
                "norm2": "norm2",
                "fc1": "mlp.fc1",
                "fc2": "mlp.fc2",
            }.items():
                names[f"blocks.{i}.{ours}"] = block.format(i) + theirs
        for ours, theirs in names.items():
            for kind in ("weight", "bias"):
                renamed[f"{ours}.{kind}"] = tensors[f"{theirs}.{kind}"]
        return renamed

    def build_optimizer(self) -> tuple[torch.optim.Optimizer, Callable[[int], None]]:
        """Return the optimizer, and a function that sets the rates of a step."""
        from src.utils.schedulers import CosineWDSchedule, WarmupCosineSchedule

        vectors = [p for n, p in self.probe.named_parameters() if "bias" in n or p.ndim == 1]
        matrices = [p for n, p in self.probe.named_parameters() if "bias" not in n and p.ndim > 1]
        optimizer = torch.optim.AdamW(
            [{"params": matrices}, {"params": vectors, "WD_exclude": True, "weight_decay": 0}]
        )
        rates = WarmupCosineSchedule(
            optimizer,
            warmup_steps=0,
            start_lr=1e-3,
            ref_lr=1e-3,
            final_lr=0.0,
            T_max=SCHEDULE_STEPS,
        )
        decays = CosineWDSchedule(optimizer, ref_wd=1e-3, final_wd=1e-6, T_max=SCHEDULE_STEPS)
        return optimizer, lambda step: (rates.step(), decays.step())


class Vjepa2(Vjepa):
    """V-JEPA 2's probe with three blocks, and AdamW with its schedules."""

    num_heads, depth = 16, 4
    setting = next(
        setting
        for setting in ATTENTIVE_PROTOCOLS["vjepa2"].settings
        if setting.lr == 2e-3 and setting.weight_decay == 8e-3
    )

    def build_optimizer(self) -> tuple[torch.optim.Optimizer, Callable[[int], None]]:
        """Return the optimizer, and a function that sets the rates of a step."""
        names = ("WarmupCosineLRSchedule", "CosineWDSchedule")
        path = self.folder / "evals/image_classification_frozen/eval.py"
        definitions = read_definitions(path, *names, math=math)
        group = {"mc_warmup_steps": SCHEDULE_STEPS // 4, "mc_start_lr": 2e-4, "mc_ref_lr": 2e-3}
        group |= {"mc_final_lr": 0.0, "mc_ref_wd": 8e-3, "mc_final_wd": 8e-3}
        optimizer = torch.optim.AdamW([{"params": list(self.probe.parameters()), **group}])
        schedules = [definitions[name](optimizer, T_max=SCHEDULE_STEPS) for name in names]
        return optimizer, lambda step: [schedule.step() for schedule in schedules]


AUTHORS = {"capi": Capi, "vjepa": Vjepa, "vjepa2": Vjepa2}


def read_definitions(path: Path, *names: str, **namespace: Any) -> dict[str, Any]:
    """Return the named classes of a file, without executing its imports."""
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if getattr(node, "name", None) in names]
    exec(compile(tree, str(path), "exec"), namespace)
    return namespace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("protocol", choices=AUTHORS)
    parser.add_argument("folder", type=Path, help="clone of the authors' code")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    protocol = replace(ATTENTIVE_PROTOCOLS[options.protocol], batch_size=256)
    authors = AUTHORS[options.protocol](options.folder)
    probe = authors.probe
    named = dict(probe.named_parameters())
    with torch.no_grad():
        for parameter in named.values():  # no part stays at 0
            parameter.add_(0.05 * torch.randn_like(parameter))
    probes = AttentiveProbes(authors.shape, 1, torch.zeros(1))
    weights = authors.rename(named)
    if weights.keys() != probes.weights.keys():
        raise SystemExit(f"different weights: {sorted(weights.keys() ^ probes.weights.keys())}")
    with torch.no_grad():
        for name, value in probes.weights.items():
            value[0] = weights[name]
    tokens = torch.randn(NUM_STEPS, NUM_IMAGES, NUM_TOKENS, DIM)
    labels = torch.randint(NUM_CLASSES, (NUM_STEPS, NUM_IMAGES))

    logits, their_logits = probes.logits(tokens[0])[0], probe(tokens[0])
    F.cross_entropy(their_logits, labels[0]).backward()
    values = list(probes.weights.values())
    gradients = torch.autograd.grad(F.cross_entropy(logits, labels[0]), values)
    their_gradients = authors.rename(
        {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in named.items()}
    )
    print(f"logits: {relative_difference(logits, their_logits):.1e}")
    gradient_error, _ = largest_difference(
        {name: gradient[0] for name, gradient in zip(probes.weights, gradients)}, their_gradients
    )
    print(f"gradients: {gradient_error:.1e}")

    optimizer, set_rates = authors.build_optimizer()
    undecayed = protocol.undecayed(probes.weights)
    probe_optimizer = ProbeOptimizer(probes, protocol.betas, undecayed, protocol.clip_norm)
    for step in range(NUM_STEPS):
        set_rates(step)
        optimizer.zero_grad()
        F.cross_entropy(probe(tokens[step]), labels[step]).backward()
        if protocol.clip_norm:
            nn.utils.clip_grad_norm_(probe.parameters(), protocol.clip_norm)
        optimizer.step()
        lr, weight_decay = protocol.rates(authors.setting, step, SCHEDULE_STEPS)
        probe_optimizer.step(tokens[step], labels[step], [lr], [weight_decay], NUM_IMAGES)
    ours = {name: value.detach()[0] for name, value in probes.weights.items()}
    theirs = {name: value.detach() for name, value in authors.rename(named).items()}
    print(f"weights after {NUM_STEPS} steps: {largest_difference(ours, theirs)[0]:.1e}")


if __name__ == "__main__":
    main()
