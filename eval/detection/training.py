"""Training of a detector, and its detections on test images."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as transforms

from ssl_pretrain import rng
from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.eval import results
from ssl_pretrain.eval.detection import detectors
from ssl_pretrain.eval.detection.annotations import AnnotatedImages
from ssl_pretrain.eval.detection.metrics import Detections
from ssl_pretrain.eval.detection.published_protocols import Protocol
from ssl_pretrain.eval.detection.training_batches import TrainingBatches, to_device

PROGRESS_STEPS = 20  # steps between two lines of progress


def train(
    detector: nn.Module,
    images: AnnotatedImages,
    protocol: Protocol,
    seed: int,
    device: torch.device,
    num_workers: int = 0,
) -> list[float]:
    """Train a detector in place.

    Returns:
        The loss of every step, as the mean over ranks.

    Raises:
        ValueError: The batch does not divide over the ranks, or the loss is not finite.
    """
    world_size = process_group.world_size()
    if protocol.batch % world_size:
        raise ValueError(f"--batch: {protocol.batch} images do not divide over {world_size} ranks")
    parameters = [parameter for parameter in detector.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(
        parameters, lr=protocol.lr, momentum=protocol.momentum, weight_decay=protocol.weight_decay
    )
    model = nn.parallel.DistributedDataParallel(detector) if world_size > 1 else detector
    dataset = TrainingBatches(images.for_training(), protocol, seed)
    batches = iter(DataLoader(dataset, batch_size=None, num_workers=num_workers))
    losses: list[float] = []
    for step in range(protocol.steps):
        detectors.set_training_mode(detector, protocol.norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(protocol, step)
        # torchvision draws the size of each image and the regions to train on.
        torch.manual_seed(rng.seed_of(seed, step, process_group.rank()))
        terms = model(*to_device(next(batches), device))
        loss = torch.stack(list(terms.values())).sum()
        losses.append(collectives.reduce_sum(loss.detach()).item() / world_size)
        if not np.isfinite(losses[-1]):
            raise ValueError(
                f"detection: the loss of step {step + 1} is not finite; lower --lr {protocol.lr:g}"
            )
        optimizer.zero_grad()
        loss.backward()
        if protocol.clip:
            nn.utils.clip_grad_norm_(parameters, protocol.clip)
        optimizer.step()
        if (step + 1) % PROGRESS_STEPS == 0 or step + 1 == protocol.steps:
            mean = np.mean(losses[-PROGRESS_STEPS:])
            results.print_progress(f"  step {step + 1} of {protocol.steps}: loss {mean:.3f}")
    recalibrate(model, detector, batches, protocol, device)
    return losses


def learning_rate(protocol: Protocol, step: int) -> float:
    """Return the learning rate of a step.

    It warms up linearly from a thousandth of the protocol's, and is divided by 10 at each drop.
    """
    warmup = 1.0
    if protocol.warmup_steps:
        warmup = min(1.0, 0.001 + 0.999 * step / protocol.warmup_steps)
    num_drops = sum(step >= round(drop * protocol.steps) for drop in protocol.drops)
    return protocol.lr * warmup * 0.1**num_drops


@torch.no_grad()
def recalibrate(
    model: nn.Module,
    detector: nn.Module,
    batches: Iterator[Any],
    protocol: Protocol,
    device: torch.device,
) -> None:
    """Give each batch norm its mean statistics over `precise_batches` batches.

    This is Detectron2's PRECISE_BN.
    """
    norms = detectors.batch_norms(detector)
    if protocol.norm == "frozen" or not protocol.precise_batches or not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative mean, in which every batch has the same weight
    detector.train()
    for _ in range(protocol.precise_batches):
        model(*to_device(next(batches), device))
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum


@torch.no_grad()
def detect(
    detector: nn.Module, images: AnnotatedImages, device: torch.device
) -> tuple[list[Detections], list[tuple[int, int]]]:
    """Return the detections in each image and its height and width, the same on every rank.

    Each rank processes its share of the images.
    """
    detector.eval()
    local: list[tuple[int, Detections, tuple[int, int]]] = []
    for index in range(process_group.rank(), len(images), process_group.world_size()):
        image = torch.from_numpy(images.read(index)).permute(2, 0, 1)
        (output,) = detector([transforms.to_dtype(image, torch.float32, scale=True).to(device)])
        arrays = {name: value.cpu().numpy() for name, value in output.items()}
        masks = _encode_masks(arrays["masks"][:, 0] > 0.5) if "masks" in arrays else []
        detections = Detections(arrays["boxes"], arrays["scores"], arrays["labels"], masks)
        local.append((index, detections, (image.shape[1], image.shape[2])))
    gathered = [entry for entries in collectives.gather_objects(local) for entry in entries]
    gathered.sort(key=lambda entry: entry[0])
    return [detections for _, detections, _ in gathered], [size for _, _, size in gathered]


def _encode_masks(masks: np.ndarray) -> list[Any]:
    """Encode masks (n, height, width) as COCO's run lengths."""
    from pycocotools import mask

    return [mask.encode(np.asfortranarray(pixels.astype(np.uint8))) for pixels in masks]
