"""The published protocols by name, and the training and the answers of a detector."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as transforms

from ssl_pretrain import rng
from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.eval import results
from ssl_pretrain.eval.detection import detectors
from ssl_pretrain.eval.detection.annotations import Images
from ssl_pretrain.eval.detection.detectors import Architecture, Norm
from ssl_pretrain.eval.detection.metrics import Found, Metric
from ssl_pretrain.rng import Purpose

SAY_EVERY = 20  # steps


@dataclass
class Protocol:
    """How a detector is trained and judged. The defaults are what the published protocols share (MoCo, arXiv:1911.05722, appendix)."""

    architecture: Architecture = "fpn"
    masks: bool = False
    metric: Metric = "coco"
    steps: int = 90000
    drops: tuple[float, float] = (
        2 / 3,
        8 / 9,
    )  # of the steps: where the learning rate is divided by 10
    warmup_steps: int = 1000
    batch: int = 16  # images a step, over all ranks
    lr: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 1e-4
    clip: float = 0.0  # norm of the gradient; 0: none
    short_sides: tuple[int, ...] = (640, 672, 704, 736, 768, 800)  # pixels; in evaluation the last
    max_side: int = 1333
    norm: Norm = "sync"
    precise_batches: int = 200  # training batches whose statistics the norms keep for evaluation; 0: their running ones
    smallest_anchor: int = 32
    pyramid_channels: int = 256
    head_dim: int = 1024
    convolutions: int = 4  # of the FPN's box head, each with batch norm
    proposals: tuple[int, int, int, int] = (2000, 2000, 1000, 1000)
    regions: int = 512


C4: dict[str, Any] = {"architecture": "c4", "proposals": (12000, 2000, 6000, 1000)}
PROTOCOLS = {
    "voc_c4": Protocol(  # VOC 2007 and 2012 trainval, tested on 2007
        **C4, metric="voc07", steps=24000, drops=(0.75, 22 / 24), warmup_steps=100,
        short_sides=tuple(range(480, 801, 32)),
    ),
    "coco_c4_1x": Protocol(**C4, masks=True),
    "coco_c4_2x": Protocol(**C4, masks=True, steps=180000),
    "coco_fpn_1x": Protocol(masks=True),
    "coco_fpn_2x": Protocol(masks=True, steps=180000),
    "small": Protocol(  # a few minutes on CPU cores; nobody's published protocol
        steps=300, warmup_steps=20, batch=4, clip=10.0, short_sides=(208, 240), max_side=400, precise_batches=25, smallest_anchor=16,
        pyramid_channels=64, head_dim=128, convolutions=0, proposals=(400, 200, 400, 150), regions=96,
    ),
}  # fmt: skip


class Steps(Dataset):
    """This rank's images and targets of each step: a pure function of (seed, step, place in the batch)."""

    def __init__(self, images: Images, protocol: Protocol, seed: int):
        self.images, self.protocol, self.seed = images, protocol, seed

    def __len__(self) -> int:
        return self.protocol.steps + self.protocol.precise_batches

    def __getitem__(self, step: int) -> list[tuple[Tensor, dict[str, Tensor]]]:
        places = range(
            step * self.protocol.batch + process_group.rank(),
            (step + 1) * self.protocol.batch,
            process_group.world_size(),
        )
        return [self._image(*divmod(place, len(self.images))) for place in places]

    def _image(self, epoch: int, position: int) -> tuple[Tensor, dict[str, Tensor]]:
        number = int(rng.permutation(self.seed, epoch, len(self.images))[position])
        image = torch.from_numpy(self.images.read(number)).permute(2, 0, 1)
        objects = self.images.objects[number]
        kept = ~objects.ignored
        boxes, labels = (
            torch.from_numpy(objects.boxes[kept]),
            torch.from_numpy(objects.labels[kept]),
        )
        target = {"boxes": boxes, "labels": labels}
        if self.protocol.masks:
            target["masks"] = torch.from_numpy(
                masks([s for s, k in zip(objects.segments, kept) if k], *image.shape[1:])
            )
        if rng.uniform(self.seed, epoch, number, 0, Purpose.FLIP, 1)[0, 0] < 0.5:
            image, target = flipped(image, target)
        return transforms.to_dtype(image, torch.float32, scale=True), target


def flipped(image: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Left and right exchanged."""
    width = image.shape[2]
    left, top, right, bottom = target["boxes"].unbind(1)
    other = target | {"boxes": torch.stack([width - right, top, width - left, bottom], dim=1)}
    if "masks" in target:
        other["masks"] = target["masks"].flip(-1)
    return image.flip(-1), other


def masks(segments: list[Any], height: int, width: int) -> np.ndarray:
    """COCO's polygons or run lengths as uint8 (n, height, width)."""
    from pycocotools import mask

    drawn = []
    for segment in segments:
        runs = (
            mask.merge(mask.frPyObjects(segment, height, width))
            if isinstance(segment, list)
            else segment
        )
        runs = mask.frPyObjects(runs, height, width) if isinstance(runs["counts"], list) else runs
        drawn.append(mask.decode(runs))
    return np.stack(drawn) if drawn else np.zeros((0, height, width), dtype=np.uint8)


def train(
    detector: nn.Module,
    images: Images,
    protocol: Protocol,
    seed: int,
    device: torch.device,
    num_workers: int = 0,
) -> list[float]:
    """Trains in place for `protocol.steps` and returns the loss of every step, the mean over ranks.

    Raises:
        ValueError: the batch does not divide over the ranks, or the loss is not finite.
    """
    if protocol.batch % process_group.world_size():
        raise ValueError(
            f"--batch: {protocol.batch} images do not divide over {process_group.world_size()} ranks"
        )
    images = images.for_training()
    trained = [parameter for parameter in detector.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(
        trained, lr=protocol.lr, momentum=protocol.momentum, weight_decay=protocol.weight_decay
    )
    model = (
        nn.parallel.DistributedDataParallel(detector)
        if process_group.world_size() > 1
        else detector
    )
    batches = iter(
        DataLoader(Steps(images, protocol, seed), batch_size=None, num_workers=num_workers)
    )
    losses = []
    for step in range(protocol.steps):
        detectors.train_mode(detector, protocol.norm)
        for group in optimizer.param_groups:
            group["lr"] = rate(protocol, step)
        torch.manual_seed(
            rng.seed_of(seed, step, process_group.rank())
        )  # of the regions that are drawn, and the size
        terms = model(*moved(next(batches), device))
        loss = torch.stack(list(terms.values())).sum()
        losses.append(collectives.reduce_sum(loss.detach()).item() / process_group.world_size())
        if not np.isfinite(losses[-1]):
            raise ValueError(
                f"detection: the loss of step {step + 1} is not finite; lower --lr {protocol.lr:g}"
            )
        optimizer.zero_grad()
        loss.backward()
        if protocol.clip:
            nn.utils.clip_grad_norm_(trained, protocol.clip)
        optimizer.step()
        if (step + 1) % SAY_EVERY == 0 or step + 1 == protocol.steps:
            results.print_progress(
                f"  step {step + 1} of {protocol.steps}: loss {np.mean(losses[-SAY_EVERY:]):.3f}"
            )
    recalibrate(model, detector, batches, protocol, device)
    return losses


def rate(protocol: Protocol, step: int) -> float:
    """The learning rate of a step: linear warm-up from a thousandth, then divided by 10 at each drop."""
    warm = min(1.0, 0.001 + 0.999 * step / protocol.warmup_steps) if protocol.warmup_steps else 1.0
    return (
        protocol.lr
        * warm
        * 0.1 ** sum(step >= round(drop * protocol.steps) for drop in protocol.drops)
    )


def moved(
    batch: list[tuple[Tensor, dict[str, Tensor]]], device: torch.device
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    images = [image.to(device) for image, _ in batch]
    return images, [
        {name: value.to(device) for name, value in target.items()} for _, target in batch
    ]


@torch.no_grad()
def recalibrate(
    model: nn.Module,
    detector: nn.Module,
    batches: Iterator[Any],
    protocol: Protocol,
    device: torch.device,
) -> None:
    """Gives each batch norm the mean statistics of `precise_batches` training batches (Detectron2's PRECISE_BN)."""
    norms = [
        module
        for module in detector.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    if protocol.norm == "frozen" or not protocol.precise_batches or not norms:
        return
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative: every batch counts alike
    detector.train()
    for _ in range(protocol.precise_batches):
        model(*moved(next(batches), device))
    for norm, momentum in zip(norms, before):
        norm.momentum = momentum


@torch.no_grad()
def answers(
    detector: nn.Module, images: Images, device: torch.device
) -> tuple[list[Found], list[tuple[int, int]]]:
    """(what the detector finds in each image, the images' sizes), on every rank; each judges its share."""
    detector.eval()
    own: list[tuple[int, Found, tuple[int, int]]] = []
    for number in range(process_group.rank(), len(images), process_group.world_size()):
        image = torch.from_numpy(images.read(number)).permute(2, 0, 1)
        (output,) = detector([transforms.to_dtype(image, torch.float32, scale=True).to(device)])
        found = {name: value.cpu().numpy() for name, value in output.items()}
        runs = _run_lengths(found["masks"][:, 0] > 0.5) if "masks" in found else []
        own.append(
            (
                number,
                Found(found["boxes"], found["scores"], found["labels"], runs),
                (image.shape[1], image.shape[2]),
            )
        )
    every = sorted(
        (entry for part in collectives.gather_objects(own) for entry in part),
        key=lambda entry: entry[0],
    )
    return [found for _, found, _ in every], [size for _, _, size in every]


def _run_lengths(drawn: np.ndarray) -> list[Any]:
    from pycocotools import mask

    return [mask.encode(np.asfortranarray(one.astype(np.uint8))) for one in drawn]
