"""Scaled, cropped and flipped training images with their masks, as functions of seed and step."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from ssl_pretrain import rng
from ssl_pretrain.eval.dense.masked_images import VOID, MaskedImages
from ssl_pretrain.eval.dense.segmentation_protocols import TrainingProtocol
from ssl_pretrain.eval.training_order import TrainingOrder, batch_slots

CROP_ATTEMPTS = 10  # positions tried for a crop without too much of one class
BRIGHTNESS, CONTRAST, SATURATION, HUE = 32.0, (0.5, 1.5), (0.5, 1.5), 18 / 180
Example = tuple[Tensor, Tensor]  # image (C, height, width) and labels (height, width), uint8


@dataclass(frozen=True)
class Pixels:
    """Normalization of the network's input.

    Attributes:
        mean: Mean per channel in [0, 1].
        std: Standard deviation per channel.
    """

    mean: Sequence[float]
    std: Sequence[float]

    def normalize(self, image: Tensor) -> Tensor:
        """Return an image (C, height, width) of values in [0, 255] as the input, float32."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (image.float() / 255 - mean) / std


class TrainingBatches(Dataset[tuple[Tensor, Tensor]]):
    """This rank's images and labels per step, determined by the seed, step and batch slot.

    Args:
        images: Training images.
        protocol: Scales, crops and batch size. Its `crop_size` is not 0.
        pixels: Normalization.
        seed: Seed of the order and of the crops.
        num_steps: Number of batches.
    """

    def __init__(
        self,
        images: MaskedImages,
        protocol: TrainingProtocol,
        pixels: Pixels,
        seed: int,
        num_steps: int,
    ):
        self.images, self.protocol, self.pixels, self.seed = images, protocol, pixels, seed
        self.num_steps, self.crop_size = num_steps, protocol.crop_size
        self._order = TrainingOrder(len(images), seed)

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        examples = [
            self._example(*self._order.image(slot))
            for slot in batch_slots(step, self.protocol.batch_size)
        ]
        images, labels = zip(*examples)
        return torch.stack(images), torch.stack(labels)

    def _example(self, epoch: int, index: int) -> Example:
        pixels, labels = self.images.read(index)
        image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)
        num_values = 1 + 2 * CROP_ATTEMPTS
        (numbers,) = rng.uniform(self.seed, epoch, index, 0, rng.Purpose.CROP, num_values)
        image, mask = self._scale(image, torch.from_numpy(labels), numbers[0])
        if rng.uniform(self.seed, epoch, index, 0, rng.Purpose.FLIP, 1)[0, 0] < 0.5:
            image, mask = image.flip(-1), mask.flip(-1)
        image, mask = self._crop(image, mask, numbers[1:].reshape(-1, 2))
        if self.protocol.is_distorted:
            jitter = rng.uniform(self.seed, epoch, index, 0, rng.Purpose.JITTER, 9)[0]
            image = distort(image, jitter)
        return self._pad(self.pixels.normalize(image), mask)

    def _scale(self, image: Tensor, mask: Tensor, number: float) -> Example:
        low, high = self.protocol.scales
        short = min(image.shape[-2:])
        side = (self.protocol.base_size or short) * (low + (high - low) * number)
        return resize(image, mask, side / short)

    def _crop(self, image: Tensor, mask: Tensor, positions: np.ndarray) -> Example:
        room = np.array([max(0, side - self.crop_size) for side in mask.shape])
        for top, left in np.floor(positions * (room + 1)).astype(int).tolist():
            cut = mask[top : top + self.crop_size, left : left + self.crop_size]
            if self.protocol.max_class_share == 1:
                break
            counts = cut[cut != VOID].bincount()
            largest = self.protocol.max_class_share * counts.sum()
            if (counts > 0).sum() > 1 and counts.max() < largest:
                break
        return image[:, top : top + self.crop_size, left : left + self.crop_size], cut

    def _pad(self, image: Tensor, mask: Tensor) -> Example:
        """Pad on the right and below, with the mean or black, and void labels."""
        height, width = mask.shape
        padding = (0, self.crop_size - width, 0, self.crop_size - height)
        black = self.pixels.normalize(torch.zeros(len(image), 1, 1))
        fill = torch.zeros_like(black) if self.protocol.pads_with_mean else black
        return F.pad(image - fill, padding) + fill, F.pad(mask, padding, value=VOID)


def resize(image: Tensor, mask: Tensor, scale: float) -> Example:
    """Scale an image with antialiased bilinear interpolation, and its mask to nearest pixels."""
    sides = [max(1, round(side * scale)) for side in mask.shape]
    if sides == list(mask.shape):
        return image, mask
    return (
        transforms.resize(image, sides, InterpolationMode.BILINEAR, antialias=True),
        transforms.resize(mask[None], sides, InterpolationMode.NEAREST)[0],
    )


def distort(image: Tensor, numbers: np.ndarray) -> Tensor:
    """Change brightness, contrast, saturation and hue, each with probability 1/2.

    MMSegmentation's PhotoMetricDistortion: contrast comes before or after the colors.

    Args:
        image: uint8 (3, height, width).
        numbers: Nine uniform numbers: four decisions, four amounts and the order.
    """
    decisions, amounts = numbers[:4] < 0.5, numbers[4:8]
    pixels = image.permute(1, 2, 0).numpy().astype(np.float64)
    if decisions[0]:
        pixels = _levels(pixels + BRIGHTNESS * (2 * amounts[0] - 1))
    contrast = CONTRAST[0] + (CONTRAST[1] - CONTRAST[0]) * amounts[1] if decisions[1] else 1.0
    contrast_is_first = numbers[8] < 0.5
    if contrast_is_first:
        pixels = _levels(pixels * contrast)
    if decisions[2] or decisions[3]:
        hsv = rgb_to_hsv(pixels / 255)
        if decisions[2]:
            factor = SATURATION[0] + (SATURATION[1] - SATURATION[0]) * amounts[2]
            hsv[..., 1] = np.clip(hsv[..., 1] * factor, 0, 1)
        if decisions[3]:
            hsv[..., 0] = (hsv[..., 0] + HUE * (2 * amounts[3] - 1)) % 1
        pixels = _levels(255 * hsv_to_rgb(hsv))
    if not contrast_is_first:
        pixels = _levels(pixels * contrast)
    return torch.from_numpy(pixels.astype(np.uint8)).permute(2, 0, 1)


def _levels(pixels: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(pixels), 0, 255)
