"""Train a linear head and a whole network with MAE's evaluations, ours and its authors'.

The authors' LARS, parameter groups and learning rate schedule are run as they are, with their
batch norm of features and their ViT with average pooling. Both sides start from the same weights
and take the same steps in float64, without augmentation and stochastic depth.

    git clone https://github.com/facebookresearch/mae && git -C mae checkout efb2a806
    MAE_CODE=mae PYTHONPATH=. python tests/foreign/mae_evaluation.py

It prints the largest difference in a tensor after all steps, relative to the tensor's largest
entry.
"""

import os
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import timm
import torch
from comparison import largest_difference, relative_difference
from torch import nn
from torch.nn import functional as F

from ssl_pretrain.eval.finetuning import trainer
from ssl_pretrain.eval.finetuning_protocols import FINETUNING_PROTOCOLS
from ssl_pretrain.eval.frozen.published_linear import ProbedNetwork
from ssl_pretrain.eval.protocols import LinearOptions

NUM_STEPS, STEPS_PER_EPOCH, EPOCHS, BATCH, CLASSES, DIM = 24, 3, 10, 32, 10, 64
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": DIM, "depth": 4, "num_heads": 4}


class GivenFeature(nn.Identity):
    """Feature of the heads, which get its values from this script."""

    feature_dim = DIM


def compare_linear() -> str:
    """Train a head with batch norm and LARS, and describe the differences of its weights."""
    from util.lars import LARS
    from util.lr_sched import adjust_learning_rate

    protocol = LinearOptions("mae", epochs=EPOCHS, batch_size=BATCH).adapt_protocol(1000)
    grid = [(100.0, 0.05)]  # a rate that moves the weights within a few steps
    network = ProbedNetwork("", GivenFeature(), grid, protocol, CLASSES, torch.device("cpu"))
    start = network.heads.weights[:, 0].clone()
    layer = nn.Linear(DIM, CLASSES)
    with torch.no_grad():
        layer.weight.copy_(start[:-1].T)
        layer.bias.copy_(start[-1])
    head = nn.Sequential(nn.BatchNorm1d(DIM, affine=False, eps=1e-6), layer)
    optimizer = LARS(head.parameters(), lr=0.0, weight_decay=0.05)
    schedule = SimpleNamespace(
        lr=100.0 * BATCH / 256, min_lr=0.0, warmup_epochs=protocol.warmup_epochs, epochs=EPOCHS
    )
    for step in range(NUM_STEPS):
        features, labels = 3 + torch.randn(BATCH, DIM), torch.randint(CLASSES, (BATCH,))
        adjust_learning_rate(optimizer, step / STEPS_PER_EPOCH, schedule)
        optimizer.zero_grad()
        F.cross_entropy(head(features), labels).backward()
        optimizer.step()
        with torch.no_grad():
            network.step(features, labels, protocol.lr_factor(step / STEPS_PER_EPOCH))
    ours = network.heads.weights[:, 0]
    update = relative_difference(layer.weight.detach().T, start[:-1])
    return (
        f"linear, {NUM_STEPS} steps: weights {relative_difference(ours[:-1], layer.weight.T):.1e}, "
        f"biases {relative_difference(ours[-1], layer.bias):.1e}, relative update {update:.1e}"
    )


def build_networks() -> tuple[Any, Any]:
    """Return our network and the authors', with the weights of one pretrained network."""
    import models_vit

    norm_layer = partial(nn.LayerNorm, eps=1e-6)
    ours: Any = timm.models.VisionTransformer(**VIT, norm_layer=norm_layer, num_classes=0)
    pretrained = {name: value.clone() for name, value in ours.state_dict().items()}
    trainer.pool_patches(ours)
    ours.reset_classifier(CLASSES)
    theirs = models_vit.VisionTransformer(
        global_pool=True, **VIT, qkv_bias=True, norm_layer=norm_layer, num_classes=CLASSES
    )
    missing = theirs.load_state_dict(pretrained, strict=False).missing_keys
    assert set(missing) == {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"}
    with torch.no_grad():
        for parameter in ours.head.parameters():
            nn.init.normal_(parameter, std=0.02)
        theirs.head.load_state_dict(ours.head.state_dict())
    return ours, theirs


def compare_fine_tuning() -> list[str]:
    """Train the whole network, and describe the differences of rates, logits and weights."""
    from util.lr_decay import param_groups_lrd
    from util.lr_sched import adjust_learning_rate

    protocol = replace(FINETUNING_PROTOCOLS["mae_vit_b"], batch_size=256, warmup_epochs=2)
    ours, theirs = build_networks()
    optimizer = trainer.build_optimizer(ours, protocol)
    groups = param_groups_lrd(
        theirs, protocol.weight_decay, {"pos_embed", "cls_token"}, protocol.layer_decay
    )
    their_optimizer = torch.optim.AdamW(groups, lr=protocol.base_lr)
    schedule = SimpleNamespace(lr=protocol.base_lr, min_lr=1e-6, warmup_epochs=2, epochs=EPOCHS)

    def settings(model: Any, used: torch.optim.Optimizer) -> dict[str, tuple[float, float]]:
        rates = {
            id(p): (g["lr"], g["weight_decay"]) for g in used.param_groups for p in g["params"]
        }
        return {name: rates[id(parameter)] for name, parameter in model.named_parameters()}

    logit_error = rate_error = 0.0
    for step in range(NUM_STEPS):
        trainer.set_learning_rates(optimizer, protocol, step / STEPS_PER_EPOCH / EPOCHS, EPOCHS)
        adjust_learning_rate(their_optimizer, step / STEPS_PER_EPOCH, schedule)
        rates, their_rates = settings(ours, optimizer), settings(theirs, their_optimizer)
        assert rates.keys() == their_rates.keys()
        differences = torch.tensor(list(rates.values())) - torch.tensor(list(their_rates.values()))
        rate_error = max(rate_error, differences.abs().max().item())
        images, targets = torch.randn(BATCH, 3, 32, 32), torch.rand(BATCH, CLASSES).softmax(dim=1)
        # The present forward_head of timm would pool a second time.
        logits, their_logits = ours(images), theirs.head(theirs.forward_features(images))
        logit_error = max(logit_error, relative_difference(logits, their_logits))
        for result, used in ((logits, optimizer), (their_logits, their_optimizer)):
            used.zero_grad()
            F.cross_entropy(result, targets).backward()
            used.step()
    weight_error, worst = largest_difference(ours.state_dict(), theirs.state_dict())
    return [
        f"fine-tuning, {NUM_STEPS} steps, {len(rates)} parameters: learning rates and decays "
        f"{rate_error:.1e} (absolute), logits {logit_error:.1e}",
        f"weights {weight_error:.1e} ({worst})",
    ]


if __name__ == "__main__":
    sys.path.insert(0, os.environ.get("MAE_CODE", "mae"))
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    print(compare_linear(), *compare_fine_tuning(), sep="\n")
