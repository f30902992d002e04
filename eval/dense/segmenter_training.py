"""Train a segmentation network on batches of crops, and segment test images."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.eval.dense.confusion import Confusion, Scores
from ssl_pretrain.eval.dense.masked_images import VOID, MaskedImages
from ssl_pretrain.eval.dense.segmentation_batches import (
    Pixels,
    TrainingBatches,
    resize,
)
from ssl_pretrain.eval.dense.segmentation_protocols import (
    DROP_FRACTIONS,
    WARMUP_RATIO,
    TrainingProtocol,
)
from ssl_pretrain.eval.dense.segmenters import ImageDropout
from ssl_pretrain.eval.training_loss import TrainingLoss
from ssl_pretrain.eval.training_order import batch_slots
from ssl_pretrain.parallel import batch_norm

PROGRESS_STEPS = 50  # steps per progress line


def count_steps(protocol: TrainingProtocol, num_images: int) -> int:
    """Return the number of optimizer steps. An epoch leaves out an incomplete last batch.

    Raises:
        ValueError: If the batch is larger than the data set or does not divide over the ranks.
    """
    world_size = process_group.world_size()
    if protocol.batch_size % world_size:
        raise ValueError(
            f"--batch-size {protocol.batch_size}: the images do not divide evenly over "
            f"{world_size} ranks; give a multiple of {world_size}"
        )
    if protocol.num_steps:
        return protocol.num_steps
    if protocol.batch_size > num_images:
        raise ValueError(
            f"--batch-size {protocol.batch_size}: there are only {num_images} training images; "
            "give a smaller batch"
        )
    return protocol.epochs * (num_images // protocol.batch_size)


def lr_factor(protocol: TrainingProtocol, step: int, num_steps: int) -> float:
    """Return the factor of the learning rate in a step, counted from 0."""
    if protocol.schedule == "drops":
        return float(0.1 ** sum(step >= round(drop * num_steps) for drop in DROP_FRACTIONS))
    factor = (1 - step / num_steps) ** protocol.power
    if step < protocol.warmup_steps:
        factor *= 1 - (1 - step / protocol.warmup_steps) * (1 - WARMUP_RATIO)
    return float(factor)


def build_optimizer(network: Any, protocol: TrainingProtocol) -> torch.optim.Optimizer:
    """Return the protocol's optimizer of the parameters that are trained."""
    auxiliary = list(network.aux_classifier.parameters()) if network.aux_classifier else []
    known = set(map(id, auxiliary))
    main = [p for p in network.parameters() if p.requires_grad and id(p) not in known]
    groups = [
        {"params": parameters, "base_lr": protocol.lr * factor}
        for parameters, factor in ((main, 1.0), (auxiliary, protocol.aux_lr_factor))
        if parameters
    ]
    if protocol.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=protocol.lr, weight_decay=protocol.weight_decay)
    return torch.optim.SGD(
        groups, lr=protocol.lr, momentum=protocol.momentum, weight_decay=protocol.weight_decay
    )


def train(
    network: nn.Module,
    images: MaskedImages,
    protocol: TrainingProtocol,
    pixels: Pixels,
    seed: int,
    num_workers: int = 0,
) -> tuple[nn.Module, list[float]]:
    """Train a network and return it with the loss of every step, averaged over the ranks.

    Raises:
        ValueError: If the batch does not fit the ranks or images, or a loss is not finite.
    """
    num_steps = count_steps(protocol, len(images))
    world_size = process_group.world_size()
    local_batch_size = protocol.batch_size // world_size
    network = batch_norm.convert(network, local_batch_size, protocol.batch_size)
    optimizer = build_optimizer(network, protocol)
    model = network
    if world_size > 1:  # tokens do not use every parameter, such as ConvNeXt's last norm
        model = nn.parallel.DistributedDataParallel(
            network, find_unused_parameters=not protocol.is_frozen
        )
    dataset = TrainingBatches(images, protocol, pixels, seed, num_steps)
    batches = iter(DataLoader(dataset, batch_size=None, num_workers=num_workers))
    weight = next(network.parameters())
    losses = TrainingLoss(num_steps, protocol.lr, PROGRESS_STEPS)
    for step in range(num_steps):
        set_training_mode(network, protocol)
        place_dropout(network, seed, step, protocol.batch_size)
        factor = lr_factor(protocol, step, num_steps)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        views, labels = next(batches)
        outputs = model(views.to(weight))
        loss = segmentation_loss(outputs, labels.long().to(weight.device), protocol.aux_weight)
        losses.add(loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network, losses.values


def set_training_mode(network: Any, protocol: TrainingProtocol) -> None:
    """Switch to training mode. A frozen backbone stays in evaluation mode."""
    network.train()
    if protocol.is_frozen:
        network.backbone.eval()


def place_dropout(network: nn.Module, seed: int, step: int, batch_size: int) -> None:
    """Tell the dropout layers which images of which step follow."""
    for module in network.modules():
        if isinstance(module, ImageDropout):
            module.seed, module.step = seed, step
            module.slots = [slot - step * batch_size for slot in batch_slots(step, batch_size)]


def segmentation_loss(outputs: dict[str, Tensor], labels: Tensor, aux_weight: float) -> Tensor:
    """Return this rank's share of the cross entropy per pixel of the global batch.

    The mean over ranks is the mean over the pixels of all ranks that have a class.
    """
    count = collectives.reduce_sum((labels != VOID).sum()).clamp(min=1)
    scale = process_group.world_size() / count

    def mean(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, ignore_index=VOID, reduction="sum") * scale

    loss = mean(outputs["out"])
    return loss + aux_weight * mean(outputs["aux"]) if "aux" in outputs else loss


@torch.no_grad()
def test(
    network: nn.Module, images: MaskedImages, protocol: TrainingProtocol, pixels: Pixels
) -> Scores:
    """Return the scores on test images. Each rank segments some of them."""
    network.eval()
    weight = next(network.parameters())
    confusion = Confusion(images.classes)
    for index in range(process_group.rank(), len(images), process_group.world_size()):
        array, labels = images.read(index)
        image = torch.from_numpy(np.ascontiguousarray(array)).permute(2, 0, 1)
        mask = torch.from_numpy(labels)
        scale = (protocol.test_size or min(mask.shape)) / min(mask.shape)
        resized, resized_mask = resize(image, mask, scale)
        logits = predict(network, pixels.normalize(resized)[None].to(weight), protocol.window)
        if protocol.scores_resized_masks:
            mask = resized_mask
        elif logits.shape[-2:] != mask.shape:
            logits = F.interpolate(logits, size=mask.shape, mode="bilinear", align_corners=False)
        confusion.update(logits[0].argmax(dim=0), mask)
    return confusion.scores()


def predict(network: nn.Module, image: Tensor, window: tuple[int, int]) -> Tensor:
    """Return the logits of an image (1, C, height, width), averaged over sliding windows."""
    side, stride = window
    if not side:
        return network(image)["out"]
    total: Tensor | None = None
    counts = image.new_zeros(image.shape[-2:])
    for top in window_starts(image.shape[-2], side, stride):
        for left in window_starts(image.shape[-1], side, stride):
            rows, columns = slice(top, top + side), slice(left, left + side)
            logits = network(image[..., rows, columns])["out"]
            if total is None:
                total = logits.new_zeros(1, logits.shape[1], *image.shape[-2:])
            total[..., rows, columns] += logits
            counts[rows, columns] += 1
    assert total is not None, "an image has at least one window"
    return total / counts


def window_starts(length: int, side: int, stride: int) -> list[int]:
    """Return where windows start along an axis. The last one ends with the image."""
    num_windows = math.ceil(max(length - side, 0) / stride) + 1
    return [max(min(number * stride, length - side), 0) for number in range(num_windows)]
