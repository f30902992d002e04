"""Train the backbone and a classifier together, starting from the weights of a run."""

import random
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup, rand_augment_transform
from timm.data.random_erasing import RandomErasing
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ssl_pretrain import rng
from ssl_pretrain.data.image_source import Source
from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.eval.finetuning_protocols import FinetuningProtocol
from ssl_pretrain.eval.frozen import features
from ssl_pretrain.eval.frozen.evaluation_split import EvaluationSplit
from ssl_pretrain.eval.runs import Run, prepare_for_evaluation
from ssl_pretrain.eval.training_views import build_train_loader, build_train_view
from ssl_pretrain.models import backbones
from ssl_pretrain.optim import schedules
from ssl_pretrain.parallel import batch_norm

SEED = 0


def build_network(
    run: Run, backbone: nn.Module, protocol: FinetuningProtocol, num_classes: int
) -> nn.Module:
    """Return a copy of the backbone's timm model with a new classifier, on the run's device.

    Raises:
        ValueError: If the protocol uses stochastic depth and the model does not support it.
    """
    config = replace(run.config.backbone, init="random", drop_path=protocol.drop_path)
    torch.manual_seed(rng.derive_seed(SEED, 0, 0))
    backbone_copy = backbones.build(config, run.view_size)
    backbones.load_strict(backbone_copy, backbone.state_dict(), "the backbone to fine-tune")
    model: Any = backbone_copy.model
    if protocol.pools_patches:
        pool_patches(model)
    model.reset_classifier(num_classes)
    head = model.get_classifier()
    nn.init.zeros_(head.bias)
    # DeiT and MAE truncate this distribution at -2 and 2, which is at least 100 standard deviations
    # away and cuts off nothing.
    nn.init.normal_(head.weight, std=protocol.head_std)
    return prepare_for_evaluation(model, run.device)


def pool_patches(model: nn.Module) -> None:
    """Change a ViT to normalize the mean of its patch tokens with a new norm, as MAE does.

    The pretrained norm, which is applied to the tokens before they are pooled, is removed.
    """
    network: Any = model
    norm = network.fc_norm if isinstance(network.norm, nn.Identity) else network.norm
    norm.reset_parameters()
    network.norm, network.fc_norm = nn.Identity(), norm
    network.reset_classifier(0, global_pool="avg")


def build_optimizer(model: nn.Module, protocol: FinetuningProtocol) -> torch.optim.Optimizer:
    """Return the protocol's optimizer, whose learning rates `set_learning_rates` sets."""
    no_decay_names: Any = getattr(model, "no_weight_decay", tuple)()
    if protocol.layer_decay < 1:
        groups = param_groups_layer_decay(
            model,
            protocol.weight_decay,
            no_decay_names,
            weight_decay_exclude_1d=not protocol.decays_norms_and_biases,
            layer_decay=protocol.layer_decay,
        )
    elif protocol.decays_norms_and_biases:
        groups = [{"params": list(model.parameters()), "weight_decay": protocol.weight_decay}]
    else:
        groups = param_groups_weight_decay(
            model, protocol.weight_decay, no_weight_decay_list=no_decay_names
        )
    if protocol.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr=0.0)


def train(
    run: Run,
    model: nn.Module,
    source: Source,
    protocol: FinetuningProtocol,
    num_classes: int,
    ema_decay: float = 0.0,
) -> nn.Module:
    """Train `model` in place on all images of `source`.

    Gradients are averaged over ranks and batch norm is global, so any number of ranks trains the
    same weights. The exception is mixup, which only mixes images within a rank.

    Args:
        run: Run to evaluate.
        model: Network from `build_network`.
        source: Labeled training images.
        protocol: Training protocol.
        num_classes: Number of classes.
        ema_decay: Decay of the moving average of the weights. 0 turns averaging off.

    Returns:
        The model, or its moving average if there is one, in evaluation mode.
    """
    local_batch_size = protocol.batch_size // process_group.world_size()
    batch_norm.convert(model, local_batch_size, protocol.batch_size)
    run.execution.correct_convolutions(model)
    model.train()
    optimizer = build_optimizer(model, protocol)
    ema_model = ModelEmaV3(model, decay=ema_decay) if ema_decay else None
    augment_batch = build_batch_augmentation(protocol, num_classes, run.device)
    augment_view = None
    if protocol.randaugment:
        augment_view = partial(
            rand_augment, policy=protocol.randaugment, mean=tuple(run.config.views.mean)
        )
    view = build_train_view(run, protocol.interpolation)
    with build_train_loader(run, source, view, protocol.batch_size, augment_view) as loader:
        num_steps = protocol.num_steps or max(1, round(protocol.epochs * loader.steps_per_epoch))
        if protocol.limits_batch_norm_momentum:
            limit_batch_norm_momentum(model, loader.steps_per_epoch)
        epochs = num_steps / loader.steps_per_epoch
        for step, batch in zip(range(num_steps), loader.iterate_from(0)):
            set_learning_rates(optimizer, protocol, step / num_steps, epochs)
            seed_generators(step)
            views = batch.views[0].contiguous(memory_format=torch.channels_last)
            images, targets = augment_batch(views, batch.labels)
            with run.execution.forward_context():
                logits = model(images)
            loss = nn.functional.cross_entropy(logits.float(), targets)
            optimizer.zero_grad()
            loss.backward()
            average_gradients(model)
            optimizer.step()
            if ema_model is not None:
                ema_model.update(model)
    return (model if ema_model is None else ema_model.module).eval()


def set_learning_rates(
    optimizer: torch.optim.Optimizer, protocol: FinetuningProtocol, fraction: float, epochs: float
) -> float:
    """Set the learning rates by linear warm-up and cosine decay, scaled by the batch size.

    Args:
        optimizer: Optimizer from `build_optimizer`.
        protocol: Training protocol.
        fraction: Completed fraction of the training, in [0, 1].
        epochs: Length of the training in epochs.

    Returns:
        The learning rate of a group whose `lr_scale` is 1.
    """
    lr = schedules.warmup_and_decline(
        fraction,
        warmup_fraction=min(1.0, protocol.warmup_epochs / epochs),
        start=protocol.warmup_lr,
        peak=protocol.base_lr * (protocol.batch_size / protocol.lr_batch_size),
        final=protocol.min_lr,
    )
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    return lr


def seed_generators(step: int) -> None:
    """Seed the generators of stochastic depth, mixup and erasing from the step and the rank."""
    seed = rng.derive_seed(SEED, step, process_group.rank())
    torch.manual_seed(seed)
    _seed_python_and_numpy(seed)


def _seed_python_and_numpy(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)


def build_batch_augmentation(
    protocol: FinetuningProtocol, num_classes: int, device: torch.device
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return a function that maps images and labels to augmented images and soft targets.

    Depending on the protocol, the function erases rectangles and mixes images of the batch.
    """
    erase: Callable[[Tensor], Tensor] = nn.Identity()
    if protocol.erasing:
        erase = RandomErasing(protocol.erasing, mode="pixel", device=device.type)
    smoothing = protocol.smoothing
    if protocol.mixup or protocol.cutmix:
        mixup = Mixup(
            protocol.mixup, protocol.cutmix, label_smoothing=smoothing, num_classes=num_classes
        )
        return lambda images, labels: mixup(erase(images), labels)

    def erase_and_smooth(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        targets = nn.functional.one_hot(labels, num_classes).float()
        return erase(images), targets * (1 - smoothing) + smoothing / num_classes

    return erase_and_smooth


def average_gradients(model: nn.Module) -> None:
    """Average the gradients over ranks, as DDP does."""
    world_size = process_group.world_size()
    if world_size == 1:
        return
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    sizes = [gradient.numel() for gradient in gradients]
    means = (collectives.reduce_sum(flat) / world_size).split(sizes)
    for gradient, mean in zip(gradients, means):
        gradient.copy_(mean.view_as(gradient))


def limit_batch_norm_momentum(model: nn.Module, steps_per_epoch: int) -> None:
    """Set the momentum of batch norm as in SimCLR (appendix B.8.1).

    The paper's max(1 - 10 / steps_per_epoch, 0.9) is TensorFlow's momentum, which is 1 minus
    PyTorch's.
    """
    for module in model.modules():
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, batch_norm.GroupBatchNorm)):
            module.momentum = min(10 / steps_per_epoch, 0.1)


def accuracy_and_loss(model: nn.Module, split: EvaluationSplit) -> tuple[float, float]:
    """Return the accuracy in [0, 1] and the cross entropy on a split, the same on all ranks."""
    logits, labels = features.embed_split(partial(features.extract, model), split)
    accuracy = (logits.argmax(dim=1) == labels).double().mean().item()
    return accuracy, nn.functional.cross_entropy(logits, labels).item()


def rand_augment(
    view: Tensor, epoch: int, index: int, *, policy: str, mean: tuple[float, ...]
) -> Tensor:
    """Augment one view with timm's RandAugment (Cubuk et al., arXiv:1909.13719).

    The random choices only depend on the epoch and the image.

    Args:
        view: View, uint8 (3, height, width).
        epoch: Training epoch.
        index: Index of the image in its data set.
        policy: timm's name for the policy.
        mean: Fill color for pixels from outside the view, in [0, 1].

    Returns:
        The augmented view, with the same shape and data type.
    """
    _seed_python_and_numpy(rng.derive_seed(SEED, epoch, index))
    image = Image.fromarray(view.permute(1, 2, 0).contiguous().numpy())
    augmented = _build_policy(policy, mean, min(view.shape[-2:]))(image)
    return torch.from_numpy(np.array(augmented)).permute(2, 0, 1)


@lru_cache(maxsize=4)
def _build_policy(name: str, mean: tuple[float, ...], shorter_side: int) -> Any:
    fill = tuple(min(255, round(255 * value)) for value in mean)
    options = {"translate_const": int(shorter_side * 0.45), "img_mean": fill}
    # DeiT and MAE rotate, shear and shift with the interpolation of their crops.
    return rand_augment_transform(name, options | {"interpolation": Image.Resampling.BICUBIC})
