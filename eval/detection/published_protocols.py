"""Detection protocols by name: those of MoCo, and a small one for CPUs."""

from dataclasses import dataclass
from typing import Any, Literal

Architecture = Literal["fpn", "c4"]
Metric = Literal["voc07", "voc12", "coco"]
Norm = Literal["sync", "batch", "frozen"]


@dataclass
class Protocol:
    """Settings to build, train and evaluate a detector.

    The defaults are the settings that most published protocols share (MoCo, arXiv:1911.05722,
    appendix).
    """

    architecture: Architecture = "fpn"
    masks: bool = False  # Mask R-CNN instead of Faster R-CNN
    metric: Metric = "coco"
    steps: int = 90000
    drops: tuple[float, float] = (2 / 3, 8 / 9)  # fractions of the steps at which lr falls tenfold
    warmup_steps: int = 1000
    batch: int = 16  # images per step over all ranks
    lr: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 1e-4
    clip: float = 0.0  # largest norm of the gradient; 0 disables clipping
    short_sides: tuple[int, ...] = (640, 672, 704, 736, 768, 800)  # pixels; tests use the last one
    max_side: int = 1333
    norm: Norm = "sync"
    # Batches that estimate the batch norm statistics for tests. 0 selects the running statistics.
    precise_batches: int = 200
    smallest_anchor: int = 32  # pixels; each of the five anchor sizes is twice the previous one
    pyramid_channels: int = 256
    head_dim: int = 1024
    convolutions: int = 4  # convolutions in FPN's box head; 0 replaces them with two linear layers
    # Proposals before and after non-maximum suppression, first in training and then in tests.
    proposals: tuple[int, int, int, int] = (2000, 2000, 1000, 1000)
    regions: int = 512  # proposals per image on which the heads are trained


_C4: dict[str, Any] = {"architecture": "c4", "proposals": (12000, 2000, 6000, 1000)}
_VOC_C4 = Protocol(  # trained on VOC 2007 and 2012 trainval, tested on VOC 2007
    **_C4,
    metric="voc07",
    steps=24000,
    drops=(0.75, 22 / 24),
    warmup_steps=100,
    short_sides=tuple(range(480, 801, 32)),
)
_SMALL = Protocol(  # takes a few minutes on CPU cores; not a published protocol
    steps=300,
    warmup_steps=20,
    batch=4,
    clip=10.0,
    short_sides=(208, 240),
    max_side=400,
    precise_batches=25,
    smallest_anchor=16,
    pyramid_channels=64,
    head_dim=128,
    convolutions=0,
    proposals=(400, 200, 400, 150),
    regions=96,
)
PROTOCOLS = {
    "voc_c4": _VOC_C4,
    "coco_c4_1x": Protocol(**_C4, masks=True),
    "coco_c4_2x": Protocol(**_C4, masks=True, steps=180000),
    "coco_fpn_1x": Protocol(masks=True),
    "coco_fpn_2x": Protocol(masks=True, steps=180000),
    "small": _SMALL,
}
