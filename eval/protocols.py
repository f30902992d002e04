"""The published protocols by name: every number that an evaluation trains with, and where it was published."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ssl_pretrain.eval.frozen.linear_heads import Start
from ssl_pretrain.views.recipe import Crop, CropSampler, Interpolation


@dataclass(frozen=True)
class LinearProtocol:
    """A linear classifier on a frozen backbone in evaluation mode; views are a random resized crop and a flip, nothing else."""

    source: str
    base_lr: float  # at a batch of 256
    batch_size: int
    epochs: int
    weight_decay: float  # of weights and biases
    nesterov: bool = False
    momentum: float = 0.9
    milestones: tuple[int, ...] = ()  # epochs at which the rate becomes a tenth; none: cosine to 0
    by_epoch: bool = True  # the rate changes between epochs; false: with every step
    start: Start = "normal"  # distribution of the first weights (eval/frozen/linear_heads.py)
    init_std: float = 0.01  # deviation of normal first weights; biases begin at 0
    batch_norm: bool = False  # features through a batch norm over the global batch, whose scale and shift are trained without decay
    trust: float = 0.0  # LARC's coefficient; 0: plain SGD
    dinos_feature: bool = False  # of a ViT's tokens, else the pooled output
    crop_sampler: CropSampler = (
        "torchvision"  # crop_sampler, interpolation and antialias are of the training views
    )
    interpolation: Interpolation = "bilinear"
    antialias: bool = True
    test_interpolation: Interpolation = "bilinear"

    def rate(self, epoch: float) -> float:
        """The factor of every learning rate after `epoch` epochs, which may be a fraction."""
        if self.by_epoch:
            epoch = math.floor(epoch)
        if self.milestones:
            return 0.1 ** sum(epoch >= milestone for milestone in self.milestones)
        return (1 + math.cos(math.pi * epoch / self.epochs)) / 2


LINEAR = {
    "simclr": LinearProtocol(
        "SimCLR, the linear command of its README: google-research/simclr at 0075cc07",
        base_lr=0.1, batch_size=4096, epochs=90, weight_decay=1e-6, nesterov=True, by_epoch=False, init_std=0.0,
        crop_sampler="tensorflow", interpolation="bicubic", antialias=False, test_interpolation="bicubic",
    ),
    "moco": LinearProtocol(
        "MoCo, main_lincls.py: facebookresearch/moco at 010242b7",
        base_lr=30.0, batch_size=256, epochs=100, weight_decay=0.0, milestones=(60, 80),
    ),
    "dino": LinearProtocol(
        "DINO, eval_linear.py: facebookresearch/dino at 04c0ad95",
        base_lr=0.001, batch_size=1024, epochs=100, weight_decay=0.0, dinos_feature=True, test_interpolation="bicubic",
    ),
    "swav": LinearProtocol(
        "SwAV, eval_linear.py: facebookresearch/swav at 04b8f431; Barlow Twins' numbers are the same",
        base_lr=0.3, batch_size=256, epochs=100, weight_decay=1e-6,
    ),
    "vicreg": LinearProtocol(
        "VICReg, the linear command of its README, evaluate.py: facebookresearch/vicreg at 4e12602f",
        base_lr=0.02, batch_size=256, epochs=100, weight_decay=1e-6,
    ),
    "simsiam": LinearProtocol(
        "SimSiam, main_lincls.py --lars: facebookresearch/simsiam at a7bc1772",
        base_lr=0.1, batch_size=4096, epochs=90, weight_decay=0.0, trust=0.001,
    ),
    "moco_v3": LinearProtocol(
        "MoCo v3, main_lincls.py, ResNet-50: facebookresearch/moco-v3 at c349e6e2",
        base_lr=0.1, batch_size=1024, epochs=90, weight_decay=0.0,
    ),
    "moco_v3_vit": LinearProtocol(
        "MoCo v3, main_lincls.py --lr=3 for its ViTs: facebookresearch/moco-v3 at c349e6e2",
        base_lr=3.0, batch_size=1024, epochs=90, weight_decay=0.0,
    ),
    "byol": LinearProtocol(
        "BYOL, eval_experiment.py and configs/eval.py: google-deepmind/deepmind-research at f5de0ede; no rate is swept over",
        base_lr=0.2, batch_size=4096, epochs=80, weight_decay=0.0, nesterov=True, by_epoch=False, start="truncated",
        crop_sampler="clipped", interpolation="bicubic", antialias=False, test_interpolation="bicubic",
    ),
    "vissl": LinearProtocol(
        "VISSL, eval_resnet_8gpu_transfer_in1k_linear.yaml: facebookresearch/vissl at b6e26383; its head of res5, on the pooled output",
        base_lr=0.01, batch_size=256, epochs=28, weight_decay=5e-4, nesterov=True, milestones=(8, 16, 24), batch_norm=True,
        start="uniform",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class TuningProtocol:
    """Backbone and classifier trained together from the pretrained weights."""

    source: str
    optimizer: Literal["sgd", "adamw"]  # sgd: with Nesterov's momentum of 0.9
    base_lr: float
    lr_batch: int  # the batch for which base_lr is given
    batch_size: int
    epochs: float = 0.0  # 0: so many as `steps` make
    steps: int = 0
    warmup_epochs: float = 0.0
    warmup_lr: float = 0.0  # where the warm-up begins
    min_lr: float = 0.0  # where the cosine ends
    weight_decay: float = 0.0
    decay_all: bool = True  # false: not biases and norms
    layer_decay: float = 1.0  # the rate of each block is this times that of the block after it
    mixup: float = 0.0  # alphas of the beta distributions
    cutmix: float = 0.0
    smoothing: float = 0.0  # of the labels
    erasing: float = 0.0  # probability of an erased rectangle
    randaugment: str = ""  # timm's name of a policy
    drop_path: float = 0.0
    zero_head: bool = False  # the classifier begins at zero
    slow_statistics: bool = (
        False  # batch norm's momentum at most 10 / (steps an epoch): SimCLR's, for small data
    )
    interpolation: Interpolation = "bicubic"


SEMI_EPOCHS = {1: 60, 10: 30}  # SimCLR, appendix B.5, by percent of labels

TUNING = {
    "semi": TuningProtocol(
        "SimCLR (arXiv:2002.05709), appendix B.5: no regularization, no warm-up, 60 epochs for 1 % and 30 for 10 % of the labels",
        "sgd", base_lr=0.05, lr_batch=256, batch_size=4096, epochs=60, zero_head=True,
    ),
    "simclr": TuningProtocol(
        "SimCLR (arXiv:2002.05709), appendix B.8.1: 20,000 steps; the rate and the decay are to be chosen, "
        "--lrs of 1e-4 to 0.1 and --weight-decays of 0 and 1e-6 to 1e-3, both logarithmic",
        "sgd", base_lr=0.05, lr_batch=256, batch_size=256, steps=20_000, zero_head=True, slow_statistics=True,
    ),
    "deit": TuningProtocol(
        "DeiT (arXiv:2012.12877), table 9 and main.py: facebookresearch/deit at 0282d2a1; epochs as MoCo v3 fine-tunes with it; "
        "without repeated augmentation",
        "adamw", base_lr=5e-4, lr_batch=512, batch_size=1024, epochs=150, warmup_epochs=5, warmup_lr=1e-6, min_lr=1e-5,
        weight_decay=0.05, decay_all=False, mixup=0.8, cutmix=1.0, smoothing=0.1, erasing=0.25, randaugment="rand-m9-mstd0.5-inc1",
        drop_path=0.1,
    ),
}  # fmt: skip


def train_view(
    size: int,
    interpolation: Interpolation,
    flips: bool,
    crop_sampler: CropSampler = "torchvision",
    antialias: bool = True,
) -> Crop:
    """One random resized crop of 8 to 100 % of the area and, where mirrored images stay what they were, a flip."""
    flip = 0.5 if flips else 0.0
    return Crop(
        count=1,
        size=size,
        interpolation=interpolation,
        flip=flip,
        crop_sampler=crop_sampler,
        antialias=antialias,
    )


def batch_that_fits(published: int, num_images: int, world_size: int, steps: int = 10) -> int:
    """The published batch, or where that makes fewer than `steps` an epoch the largest power of two that makes so many.

    But not fewer than 16 images, where there are 16; over all ranks, so a multiple of their number.
    """
    if num_images < steps * published:
        published = min(
            published, 2 ** int(math.log2(max(1, num_images // steps, min(num_images, 16))))
        )
    return max(1, published // world_size) * world_size
