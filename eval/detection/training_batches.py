"""Batches of annotated images for training a detector."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as transforms

from ssl_pretrain import rng
from ssl_pretrain.distributed import process_group
from ssl_pretrain.eval.detection.annotations import AnnotatedImages
from ssl_pretrain.eval.detection.published_protocols import Protocol
from ssl_pretrain.rng import Purpose

Target = dict[str, Tensor]


class TrainingBatches(Dataset[list[tuple[Tensor, Target]]]):
    """This rank's images and targets per step, a pure function of (seed, step, batch slot)."""

    def __init__(self, images: AnnotatedImages, protocol: Protocol, seed: int):
        self.images, self.protocol, self.seed = images, protocol, seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)  # the epoch drawn last

    def __len__(self) -> int:
        return self.protocol.steps + self.protocol.precise_batches

    def __getitem__(self, step: int) -> list[tuple[Tensor, Target]]:
        start = step * self.protocol.batch
        slots = range(
            start + process_group.rank(), start + self.protocol.batch, process_group.world_size()
        )
        return [self._example(*divmod(slot, len(self.images))) for slot in slots]

    def _example(self, epoch: int, position: int) -> tuple[Tensor, Target]:
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = rng.permutation(self.seed, epoch, len(self.images))
        index = int(self._order[position])
        image = torch.from_numpy(self.images.read(index)).permute(2, 0, 1)
        target = self._target(index, *image.shape[1:])
        if rng.uniform(self.seed, epoch, index, 0, Purpose.FLIP, 1)[0, 0] < 0.5:
            image, target = flip(image, target)
        return transforms.to_dtype(image, torch.float32, scale=True), target

    def _target(self, index: int, height: int, width: int) -> Target:
        """Return the objects to learn from, as torchvision's detectors take them."""
        objects = self.images.objects[index]
        counted = ~objects.ignored
        target = {
            "boxes": torch.from_numpy(objects.boxes[counted]),
            "labels": torch.from_numpy(objects.labels[counted]),
        }
        if self.protocol.masks:
            segments = [segment for segment, keep in zip(objects.segments, counted) if keep]
            target["masks"] = torch.from_numpy(decode_masks(segments, height, width))
        return target


def flip(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """Exchange left and right of an image, its boxes and its masks."""
    width = image.shape[2]
    left, top, right, bottom = target["boxes"].unbind(1)
    target = target | {"boxes": torch.stack([width - right, top, width - left, bottom], dim=1)}
    if "masks" in target:
        target["masks"] = target["masks"].flip(-1)
    return image.flip(-1), target


def decode_masks(segments: list[Any], height: int, width: int) -> np.ndarray:
    """Draw COCO's polygons or run lengths as masks, uint8 (n, height, width)."""
    from pycocotools import mask

    masks = np.zeros((len(segments), height, width), dtype=np.uint8)
    for row, segment in enumerate(segments):
        if isinstance(segment, list):
            segment = mask.merge(mask.frPyObjects(segment, height, width))
        elif isinstance(segment["counts"], list):
            segment = mask.frPyObjects(segment, height, width)
        masks[row] = mask.decode(segment)
    return masks


def to_device(
    batch: list[tuple[Tensor, Target]], device: torch.device
) -> tuple[list[Tensor], list[Target]]:
    """Move a batch to a device, as separate lists of images and targets."""
    images = [image.to(device) for image, _ in batch]
    targets = [{name: value.to(device) for name, value in target.items()} for _, target in batch]
    return images, targets
