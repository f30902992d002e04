"""Detection protocols by name: MoCo's, and a small one for CPUs."""

from dataclasses import dataclass
from typing import Any, Literal

Architecture = Literal["fpn", "c4"]
Metric = Literal["voc07", "voc12", "coco"]
Norm = Literal["sync", "batch", "frozen"]


@dataclass
class Protocol:
    """Settings to build, train and evaluate a detector.

    The defaults are those that MoCo's protocols share (arXiv:1911.05722, appendix).
    """

    architecture: Architecture = "fpn"
    predicts_masks: bool = False  # Mask R-CNN instead of Faster R-CNN
    metric: Metric = "coco"
    num_steps: int = 90000
    # Fractions of the steps after which the learning rate is divided by 10.
    lr_drop_fractions: tuple[float, float] = (2 / 3, 8 / 9)
    warmup_steps: int = 1000
    global_batch_size: int = 16
    lr: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 1e-4
    max_gradient_norm: float = 0.0  # 0 disables clipping
    short_sides: tuple[int, ...] = (640, 672, 704, 736, 768, 800)  # pixels; testing uses the last
    max_side: int = 1333
    norm: Norm = "sync"
    # Batches that recompute the batch norm statistics for testing. 0 keeps the running averages.
    num_precise_bn_batches: int = 200
    smallest_anchor: int = 32  # pixels; each of the five anchor sizes is twice the previous one
    pyramid_channels: int = 256
    head_dim: int = 1024
    num_box_convolutions: int = 4  # FPN's box head; 0 selects two linear layers instead
    # Proposals before and after non-maximum suppression, in training and then in testing.
    num_proposals: tuple[int, int, int, int] = (2000, 2000, 1000, 1000)
    num_sampled_proposals: int = 512  # proposals per image that the heads are trained on


_C4: dict[str, Any] = {"architecture": "c4", "num_proposals": (12000, 2000, 6000, 1000)}
_VOC_C4 = Protocol(  # trained on VOC 2007 and 2012 trainval, tested on VOC 2007
    **_C4,
    metric="voc07",
    num_steps=24000,
    lr_drop_fractions=(0.75, 22 / 24),
    warmup_steps=100,
    short_sides=tuple(range(480, 801, 32)),
)
_SMALL = Protocol(  # takes a few minutes on CPU cores; not a published protocol
    num_steps=300,
    warmup_steps=20,
    global_batch_size=4,
    max_gradient_norm=10.0,
    short_sides=(208, 240),
    max_side=400,
    num_precise_bn_batches=25,
    smallest_anchor=16,
    pyramid_channels=64,
    head_dim=128,
    num_box_convolutions=0,
    num_proposals=(400, 200, 400, 150),
    num_sampled_proposals=96,
)
PROTOCOLS = {
    "voc_c4": _VOC_C4,
    "coco_c4_1x": Protocol(**_C4, predicts_masks=True),
    "coco_c4_2x": Protocol(**_C4, predicts_masks=True, num_steps=180000),
    "coco_fpn_1x": Protocol(predicts_masks=True),
    "coco_fpn_2x": Protocol(predicts_masks=True, num_steps=180000),
    "small": _SMALL,
}
