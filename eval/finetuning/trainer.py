"""Train backbone and classifier together from a run's weights, for eval.semi and eval.finetune."""

import random
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
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
from ssl_pretrain.eval.frozen import features, shards
from ssl_pretrain.eval.frozen.evaluation_split import EvaluationSplit
from ssl_pretrain.eval.protocols import TuningProtocol
from ssl_pretrain.eval.runs import Run
from ssl_pretrain.eval.training_views import train_loader, train_view
from ssl_pretrain.models import backbones
from ssl_pretrain.optim import schedules
from ssl_pretrain.parallel import batch_norm

SEED = 0
HEAD_STD = 0.02  # initialization of a classifier that does not start at zero, of DeiT and MAE
# SimCLR, appendix B.8.1: TensorFlow's momentum is max(1 - 10 / steps_per_epoch, 0.9), and torch's
# is one minus that.
BN_STEPS = 10


def build_network(
    run: Run, backbone: nn.Module, protocol: TuningProtocol, num_classes: int
) -> nn.Module:
    """Return the backbone's timm model with its weights and a new classifier on the run's device.

    Raises:
        ValueError: If the protocol has stochastic depth and the model does not support it.
    """
    config = replace(run.config.backbone, init="random", drop_path=protocol.drop_path)
    torch.manual_seed(rng.seed_of(SEED, 0, 0))
    tuned = backbones.build(config, run.view_size)
    backbones.load_strict(tuned, backbone.state_dict(), "the backbone to fine-tune")
    model: Any = tuned.model
    model.reset_classifier(num_classes)
    head = model.get_classifier()
    nn.init.zeros_(head.bias)
    if protocol.zero_head:
        nn.init.zeros_(head.weight)
    else:
        nn.init.trunc_normal_(head.weight, std=HEAD_STD)
    return runs.to_device(model, run.device)


def build_optimizer(model: nn.Module, protocol: TuningProtocol) -> torch.optim.Optimizer:
    """Return SGD or AdamW. The `lr_scale` of a group is its share of the learning rate."""
    no_weight_decay: Any = getattr(model, "no_weight_decay", tuple)
    undecayed = no_weight_decay()
    if protocol.layer_decay < 1:
        groups = param_groups_layer_decay(
            model,
            protocol.weight_decay,
            undecayed,
            weight_decay_exclude_1d=not protocol.decay_all,
            layer_decay=protocol.layer_decay,
        )
    elif protocol.decay_all:
        groups = [{"params": list(model.parameters()), "weight_decay": protocol.weight_decay}]
    else:
        groups = param_groups_weight_decay(
            model, protocol.weight_decay, no_weight_decay_list=undecayed
        )
    if protocol.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr=0.0)


def train(
    run: Run,
    model: nn.Module,
    source: Source,
    protocol: TuningProtocol,
    num_classes: int,
    ema: float = 0.0,
) -> nn.Module:
    """Train `model` in place on all images of `source`.

    Gradients are averaged over ranks and the statistics of batch norm are global, so ranks train
    what one process trains. Mixup mixes the images of one rank.

    Args:
        run: Run to evaluate.
        model: Network from `build_network`.
        source: Labeled training images.
        protocol: Protocol of the training.
        num_classes: Number of classes.
        ema: Decay of a moving average of the weights. 0 is none.

    Returns:
        The model in evaluation mode, or its moving average.
    """
    local_batch = protocol.batch_size // process_group.world_size()
    batch_norm.convert(model, local_batch, protocol.batch_size)
    model.train()
    optimizer = build_optimizer(model, protocol)
    average = ModelEmaV3(model, decay=ema) if ema else None
    mix = build_mixing(protocol, num_classes, run.device)
    augment = None
    if protocol.randaugment:
        augment = RandAugment(protocol.randaugment, run.config.views.mean)
    view = train_view(run, protocol.interpolation)
    with train_loader(run, source, view, protocol.batch_size, augment) as loader:
        last_step = protocol.steps or max(1, round(protocol.epochs * loader.steps_per_epoch))
        if protocol.slow_statistics:
            _slow_statistics(model, loader.steps_per_epoch)
        epochs = last_step / loader.steps_per_epoch
        for step, batch in zip(range(last_step), loader.starting_at(0)):
            set_learning_rates(optimizer, protocol, step / last_step, epochs)
            seed_step(step)
            views = batch.views[0].contiguous(memory_format=torch.channels_last)
            images, targets = mix(views, batch.labels)
            loss = F.cross_entropy(model(images), targets)
            optimizer.zero_grad()
            loss.backward()
            average_gradients(model)
            optimizer.step()
            if average is not None:
                average.update(model)
    return (model if average is None else average.module).eval()


def set_learning_rates(
    optimizer: torch.optim.Optimizer, protocol: TuningProtocol, fraction: float, epochs: float
) -> float:
    """Set the learning rate of every group: linear warm-up, then a cosine, scaled by the batch.

    Args:
        optimizer: Optimizer from `build_optimizer`.
        protocol: Protocol of the training.
        fraction: Share of the training that is done, in [0, 1].
        epochs: Length of the training.

    Returns:
        The learning rate of a group whose `lr_scale` is 1.
    """
    lr = schedules.warmup_cosine(
        fraction,
        warmup=min(1.0, protocol.warmup_epochs / epochs),
        start=protocol.warmup_lr,
        peak=protocol.base_lr * (protocol.batch_size / protocol.lr_batch),
        final=protocol.min_lr,
    )
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    return lr


def seed_step(step: int) -> None:
    """Seed the global generators of stochastic depth, mixup and erasing by step and rank."""
    value = rng.seed_of(SEED, step, process_group.rank())
    torch.manual_seed(value)
    _seed_python_and_numpy(value)


def _seed_python_and_numpy(value: int) -> None:
    random.seed(value)
    np.random.seed(value % 2**32)


def build_mixing(
    protocol: TuningProtocol, num_classes: int, device: torch.device
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return a function from images and labels to augmented images and soft targets.

    It erases rectangles and mixes each image with another of the batch, as the protocol says.
    """
    erase: Callable[[Tensor], Tensor] = nn.Identity()
    if protocol.erasing:
        erase = RandomErasing(protocol.erasing, mode="pixel", device=device.type)
    mixup = None
    if protocol.mixup or protocol.cutmix:
        mixup = Mixup(
            protocol.mixup,
            protocol.cutmix,
            label_smoothing=protocol.smoothing,
            num_classes=num_classes,
        )

    def mix(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        images = erase(images)
        if mixup is not None:
            return mixup(images, labels)
        targets = F.one_hot(labels, num_classes).float()
        return images, targets * (1 - protocol.smoothing) + protocol.smoothing / num_classes

    return mix


def average_gradients(model: nn.Module) -> None:
    """Average the gradients over ranks, as DDP does."""
    world_size = process_group.world_size()
    if world_size == 1:
        return
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    means = (collectives.reduce_sum(flat) / world_size).split([each.numel() for each in gradients])
    for gradient, mean in zip(gradients, means):
        gradient.copy_(mean.view_as(gradient))


def scores(model: nn.Module, split: EvaluationSplit) -> tuple[float, float]:
    """Return accuracy in [0, 1] and cross entropy on evaluation views, the same on all ranks."""
    embed = partial(features.extract, model)
    logits, labels = shards.embed_split(embed, split)
    accuracy = (logits.argmax(dim=1) == labels).double().mean().item()
    return accuracy, F.cross_entropy(logits, labels).item()


class RandAugment:
    """timm's RandAugment (Cubuk et al., arXiv:1909.13719) of one view.

    Its random choices depend on the epoch and the image only.
    """

    def __init__(self, policy: str, mean: list[float]):
        self.policy, self.fill = policy, tuple(min(255, round(255 * value)) for value in mean)

    def __call__(self, view: Tensor, epoch: int, index: int) -> Tensor:
        """Augment one view.

        Args:
            view: View, uint8 (3, size, size).
            epoch: Epoch of the training.
            index: Index of the image in its data set.

        Returns:
            The augmented view, with the same shape and type.
        """
        _seed_python_and_numpy(rng.seed_of(SEED, epoch, index))
        image = Image.fromarray(view.permute(1, 2, 0).contiguous().numpy())
        augmented = _policy(self.policy, self.fill, view.shape[-1])(image)
        return torch.from_numpy(np.array(augmented)).permute(2, 0, 1)


@lru_cache(maxsize=4)
def _policy(name: str, fill: tuple[int, ...], size: int) -> Any:
    return rand_augment_transform(name, {"translate_const": int(size * 0.45), "img_mean": fill})


def _slow_statistics(model: nn.Module, steps_per_epoch: int) -> None:
    for module in model.modules():
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, batch_norm.GroupBatchNorm)):
            module.momentum = min(BN_STEPS / steps_per_epoch, 0.1)
