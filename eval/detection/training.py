"""Train a detector on batches of annotated images, and detect objects in test images."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as transforms

from ssl_pretrain import rng
from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.eval.detection import detectors
from ssl_pretrain.eval.detection.annotations import AnnotatedImages
from ssl_pretrain.eval.detection.metrics import Detections
from ssl_pretrain.eval.detection.published_protocols import Protocol
from ssl_pretrain.eval.training_loss import TrainingLoss
from ssl_pretrain.eval.training_order import TrainingOrder, batch_slots

PROGRESS_STEPS = 20  # steps per progress line
Target = dict[str, Tensor]  # the objects of one image, as torchvision's detectors expect them


class TrainingBatches(Dataset[list[tuple[Tensor, Target]]]):
    """This rank's images and targets per step, determined by the seed, step and batch slot."""

    def __init__(self, images: AnnotatedImages, protocol: Protocol, seed: int):
        self.images, self.protocol, self.seed = images, protocol, seed
        self._order = TrainingOrder(len(images), seed)

    def __len__(self) -> int:
        return self.protocol.num_steps + self.protocol.num_precise_bn_batches

    def __getitem__(self, step: int) -> list[tuple[Tensor, Target]]:
        slots = batch_slots(step, self.protocol.global_batch_size)
        return [self._example(*self._order.image(slot)) for slot in slots]

    def _example(self, epoch: int, index: int) -> tuple[Tensor, Target]:
        image = torch.from_numpy(self.images.read(index)).permute(2, 0, 1)
        target = self._target(index, *image.shape[1:])
        if rng.uniform(self.seed, epoch, index, 0, rng.Purpose.FLIP, 1)[0, 0] < 0.5:
            image, target = flip(image, target)
        return transforms.to_dtype(image, torch.float32, scale=True), target

    def _target(self, index: int, height: int, width: int) -> Target:
        """Return the training target of an image, without ignored objects."""
        objects = self.images.objects[index]
        is_target = ~objects.ignored
        target = {
            "boxes": torch.from_numpy(objects.boxes[is_target]),
            "labels": torch.from_numpy(objects.labels[is_target]),
        }
        if self.protocol.predicts_masks:
            segments = [segment for segment, is_kept in zip(objects.segments, is_target) if is_kept]
            target["masks"] = torch.from_numpy(decode_masks(segments, height, width))
        return target


def flip(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """Flip an image, its boxes and its masks horizontally."""
    width = image.shape[2]
    left, top, right, bottom = target["boxes"].unbind(1)
    target = target | {"boxes": torch.stack([width - right, top, width - left, bottom], dim=1)}
    if "masks" in target:
        target["masks"] = target["masks"].flip(-1)
    return image.flip(-1), target


def decode_masks(segments: list[Any], height: int, width: int) -> np.ndarray:
    """Convert COCO's polygons or run lengths to masks, uint8 (n, height, width)."""
    from pycocotools import mask

    masks = np.zeros((len(segments), height, width), dtype=np.uint8)
    for row, segment in enumerate(segments):
        if isinstance(segment, list):
            segment = mask.merge(mask.frPyObjects(segment, height, width))
        elif isinstance(segment["counts"], list):
            segment = mask.frPyObjects(segment, height, width)
        masks[row] = mask.decode(segment)
    return masks


def batch_to_device(
    batch: list[tuple[Tensor, Target]], device: torch.device
) -> tuple[list[Tensor], list[Target]]:
    """Return the images and the targets of a batch, moved to a device."""
    return (
        [image.to(device) for image, _ in batch],
        [{name: value.to(device) for name, value in target.items()} for _, target in batch],
    )


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
        The loss of every step, averaged over the ranks.

    Raises:
        ValueError: If the batch does not divide evenly over the ranks, or a loss is not finite.
    """
    world_size = process_group.world_size()
    if protocol.global_batch_size % world_size:
        raise ValueError(
            f"--batch {protocol.global_batch_size}: the images do not divide evenly over "
            f"{world_size} ranks; give a multiple of {world_size}"
        )
    parameters = [parameter for parameter in detector.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(
        parameters, lr=protocol.lr, momentum=protocol.momentum, weight_decay=protocol.weight_decay
    )
    model = nn.parallel.DistributedDataParallel(detector) if world_size > 1 else detector
    dataset = TrainingBatches(images.trainable_subset(), protocol, seed)
    batches = iter(DataLoader(dataset, batch_size=None, num_workers=num_workers))
    losses = TrainingLoss(protocol.num_steps, protocol.lr, PROGRESS_STEPS)
    for step in range(protocol.num_steps):
        detectors.set_training_mode(detector, protocol.norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(protocol, step)
        # torchvision draws each image's size and the regions to train on from this generator.
        torch.manual_seed(rng.derive_seed(seed, step, process_group.rank()))
        loss_terms = model(*batch_to_device(next(batches), device))
        loss = torch.stack([*loss_terms.values()]).sum()
        losses.add(loss)
        optimizer.zero_grad()
        loss.backward()
        if protocol.max_gradient_norm:
            nn.utils.clip_grad_norm_(parameters, protocol.max_gradient_norm)
        optimizer.step()
    recalibrate_batch_norms(model, detector, batches, protocol, device)
    return losses.values


def learning_rate(protocol: Protocol, step: int) -> float:
    """Return the learning rate of a step.

    During warm-up, the rate rises linearly from a thousandth of `protocol.lr`. Each drop divides
    the rate by 10.
    """
    warmup_factor = 1.0
    if protocol.warmup_steps:
        warmup_factor = min(1.0, 0.001 + 0.999 * step / protocol.warmup_steps)
    drop_steps = [round(drop * protocol.num_steps) for drop in protocol.lr_drop_fractions]
    num_drops = sum(step >= drop_step for drop_step in drop_steps)
    return protocol.lr * warmup_factor * 0.1**num_drops


@torch.no_grad()
def recalibrate_batch_norms(
    model: nn.Module,
    detector: nn.Module,
    batches: Iterator[Any],
    protocol: Protocol,
    device: torch.device,
) -> None:
    """Recompute each batch norm's statistics as their mean over `num_precise_bn_batches` batches.

    Detectron2 calls this PRECISE_BN.
    """
    norms = detectors.batch_norms(detector)
    if protocol.norm == "frozen" or not protocol.num_precise_bn_batches or not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # weight all batches equally
    detector.train()
    for _ in range(protocol.num_precise_bn_batches):
        model(*batch_to_device(next(batches), device))
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum


@torch.no_grad()
def detect(
    detector: nn.Module, images: AnnotatedImages, device: torch.device
) -> tuple[list[Detections], list[tuple[int, int]]]:
    """Return the detections in each image, and the height and width of each image.

    Each rank processes some of the images, and all ranks return the whole result.
    """
    detector.eval()
    local_entries: list[tuple[int, Detections, tuple[int, int]]] = []
    for index in range(process_group.rank(), len(images), process_group.world_size()):
        image = torch.from_numpy(images.read(index)).permute(2, 0, 1)
        (output,) = detector([transforms.to_dtype(image, torch.float32, scale=True).to(device)])
        arrays = {name: value.cpu().numpy() for name, value in output.items()}
        masks = _encode_masks(arrays["masks"][:, 0] > 0.5) if "masks" in arrays else []
        detections = Detections(arrays["boxes"], arrays["scores"], arrays["labels"], masks)
        local_entries.append((index, detections, (image.shape[1], image.shape[2])))
    rank_entries = collectives.gather_objects(local_entries)
    entries = sorted(itertools.chain.from_iterable(rank_entries), key=lambda entry: entry[0])
    return [detections for _, detections, _ in entries], [size for _, _, size in entries]


def _encode_masks(masks: np.ndarray) -> list[Any]:
    """Convert masks (n, height, width) to COCO's run lengths."""
    from pycocotools import mask

    return [mask.encode(np.asfortranarray(pixels.astype(np.uint8))) for pixels in masks]
