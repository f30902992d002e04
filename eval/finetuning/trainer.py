"""Backbone and classifier trained together from a run's weights: what eval.semi and eval.finetune share."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_pretrain import rng
from ssl_pretrain.data.image_source import Source
from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.eval import runs
from ssl_pretrain.eval.frozen import features, published_linear, shards
from ssl_pretrain.eval.frozen.evaluation_split import Part
from ssl_pretrain.eval.protocols import TuningProtocol
from ssl_pretrain.eval.runs import Run
from ssl_pretrain.models import backbones
from ssl_pretrain.optim import schedules
from ssl_pretrain.parallel import batch_norm

SEED = 0
HEAD_STD = (
    0.02  # DeiT's and MAE's initialization of the classifier, where it does not begin at zero
)
BN_STEPS = 10  # SimCLR, appendix B.8.1: TensorFlow's momentum is max(1 - 10 / steps an epoch, 0.9), torch's is one minus that


def network(run: Run, backbone: nn.Module, protocol: TuningProtocol, num_classes: int) -> nn.Module:
    """The backbone's timm model with these weights and a new classifier, images to logits, on the run's device.

    Raises:
        ValueError: the model knows no stochastic depth, and the protocol has it.
    """
    config = replace(run.config.backbone, init="random", drop_path=protocol.drop_path)
    torch.manual_seed(rng.seed_of(SEED, 0, 0))
    tuned = backbones.build(config, run.view_size)
    backbones.load_strict(tuned, backbone.state_dict(), "the backbone to be tuned")
    model: Any = tuned.model
    model.reset_classifier(num_classes)
    head = model.get_classifier()
    nn.init.zeros_(head.bias)
    if protocol.zero_head:
        nn.init.zeros_(head.weight)
    else:
        nn.init.trunc_normal_(head.weight, std=HEAD_STD)
    return runs.place(model, run.device)


def optimizer(
    model: nn.Module, protocol: TuningProtocol, weight_decay: float, layer_decay: float
) -> torch.optim.Optimizer:
    """SGD or AdamW whose groups have `lr_scale`, the share of the rate that a block gets."""
    spared = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()  # type: ignore[operator]
    if layer_decay < 1:
        groups = param_groups_layer_decay(
            model,
            weight_decay,
            spared,
            weight_decay_exclude_1d=not protocol.decay_all,
            layer_decay=layer_decay,
        )
    elif protocol.decay_all:
        groups = [{"params": list(model.parameters()), "weight_decay": weight_decay}]
    else:
        groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=spared)
    if protocol.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr=0.0)


def train(
    run: Run,
    model: nn.Module,
    source: Source,
    protocol: TuningProtocol,
    num_classes: int,
    layer_decay: float = 1.0,
    ema: float = 0.0,
) -> nn.Module:
    """Trains `model` in place on all images of `source`; returns it, or with `ema` its moving average.

    Gradients are averaged over ranks and batch norm's statistics are of the global batch, so ranks train what one process trains.
    Mixup mixes the images of one rank.
    """
    local_batch = protocol.batch_size // process_group.world_size()
    batch_norm.convert(model, local_batch, protocol.batch_size)
    model.train()
    stepped = optimizer(model, protocol, protocol.weight_decay, layer_decay)
    average = ModelEmaV3(model, decay=ema) if ema else None
    mixed = mixing(protocol, num_classes, run.device)
    view = published_linear.train_views(run, protocol.interpolation)
    with published_linear.batches(
        run, source, view, protocol.batch_size, finish(run, protocol)
    ) as made:
        last_step = protocol.steps or max(1, round(protocol.epochs * made.steps_per_epoch))
        if protocol.slow_statistics:
            _slow_statistics(model, made.steps_per_epoch)
        for step, batch in zip(range(last_step), made.starting_at(0)):
            set_rate(stepped, protocol, step / last_step, last_step / made.steps_per_epoch)
            seed(step)
            images, targets = mixed(
                batch.views[0].contiguous(memory_format=torch.channels_last), batch.labels
            )
            loss = F.cross_entropy(model(images), targets)
            stepped.zero_grad()
            loss.backward()
            average_gradients(model)
            stepped.step()
            if average is not None:
                average.update(model)
    return (model if average is None else average.module).eval()


def set_rate(
    stepped: torch.optim.Optimizer, protocol: TuningProtocol, progress: float, epochs: float
) -> float:
    """Linear warm-up, then a cosine, scaled by the batch, for every group by its share; returns the rate of share 1."""
    scale = protocol.batch_size / protocol.lr_batch
    warmup, peak = min(1.0, protocol.warmup_epochs / epochs), protocol.base_lr * scale
    rate = schedules.warmup_cosine(
        progress, warmup=warmup, start=protocol.warmup_lr, peak=peak, final=protocol.min_lr
    )
    for group in stepped.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
    return rate


def seed(step: int) -> None:
    """Stochastic depth, mixup and erasing draw from three global generators: each step sets them anew, for this part of its batch."""
    value = rng.seed_of(SEED, step, process_group.rank())
    torch.manual_seed(value)
    np.random.seed(value % 2**32)
    random.seed(value)


def mixing(
    protocol: TuningProtocol, num_classes: int, device: torch.device
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(images, labels) -> (images, targets): erased, then mixed with their neighbours in the batch, where the protocol does so."""
    erase = (
        RandomErasing(protocol.erasing, mode="pixel", device=device.type)
        if protocol.erasing
        else None
    )
    mix = None
    if protocol.mixup or protocol.cutmix:
        mix = Mixup(
            protocol.mixup,
            protocol.cutmix,
            label_smoothing=protocol.smoothing,
            num_classes=num_classes,
        )

    def mixed(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        images = images if erase is None else erase(images)
        if mix is not None:
            return mix(images, labels)
        targets = F.one_hot(labels, num_classes).float()
        return images, targets * (1 - protocol.smoothing) + protocol.smoothing / num_classes

    return mixed


def average_gradients(model: nn.Module) -> None:
    """Leaves on every rank the mean of the ranks' gradients, as DDP does."""
    if process_group.world_size() == 1:
        return
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    mean = (
        collectives.reduce_sum(torch.cat([gradient.flatten() for gradient in gradients]))
        / process_group.world_size()
    )
    for gradient, part in zip(gradients, mean.split([gradient.numel() for gradient in gradients])):
        gradient.copy_(part.view_as(gradient))


def scores(model: nn.Module, part: Part) -> tuple[float, float]:
    """(accuracy in [0, 1], cross entropy) of the model on the evaluation views of a part, the same on all ranks."""

    def embed(own: Part, offset: tuple[int, int] = (0, 0)) -> tuple[Tensor, Tensor]:
        return features.extract(model, own, offset)

    logits, labels = shards.embedded(embed, part, shards.share(part))
    return (logits.argmax(dim=1) == labels).double().mean().item(), F.cross_entropy(
        logits, labels
    ).item()


def finish(run: Run, protocol: TuningProtocol) -> RandAugment | None:
    return (
        RandAugment(protocol.randaugment, run.config.views.mean) if protocol.randaugment else None
    )


class RandAugment:
    """timm's RandAugment (Cubuk et al., arXiv:1909.13719) of one view; what it draws depends on the epoch and the image alone."""

    def __init__(self, policy: str, mean: list[float]):
        self.policy, self.fill = policy, tuple(min(255, round(255 * value)) for value in mean)

    def __call__(self, view: Tensor, epoch: int, index: int) -> Tensor:
        value = rng.seed_of(SEED, epoch, index)
        random.seed(value)
        np.random.seed(value % 2**32)
        pixels = Image.fromarray(view.permute(1, 2, 0).contiguous().numpy())
        return torch.from_numpy(
            np.array(_policy(self.policy, self.fill, view.shape[-1])(pixels))
        ).permute(2, 0, 1)


@lru_cache(maxsize=4)
def _policy(name: str, fill: tuple[int, ...], size: int) -> Any:
    return rand_augment_transform(name, {"translate_const": int(size * 0.45), "img_mean": fill})


def _slow_statistics(model: nn.Module, steps_per_epoch: int) -> None:
    for module in model.modules():
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, batch_norm.GroupBatchNorm)):
            module.momentum = min(BN_STEPS / steps_per_epoch, 0.1)
