"""The published protocols by name: every number an evaluation trains with, and its source."""

import math
from dataclasses import dataclass
from typing import Literal

from ssl_pretrain.eval.frozen.linear_heads import Start
from ssl_pretrain.views.recipe import CropSampler, Interpolation


@dataclass(frozen=True)
class LinearProtocol:
    """A linear classifier on a frozen backbone in evaluation mode.

    Training views are a random resized crop and a flip, nothing else.
    """

    source: str
    base_lr: float  # at a batch of 256
    batch_size: int
    epochs: int
    weight_decay: float  # applied to weights and biases
    nesterov: bool = False
    momentum: float = 0.9
    milestones: tuple[int, ...] = ()  # epochs at which the rate falls to a tenth; none: cosine to 0
    by_epoch: bool = True  # the rate changes between epochs; false: at every step
    start: Start = "normal"  # distribution of the first weights, see LinearHeads
    init_std: float = 0.01  # standard deviation of normal first weights; biases start at 0
    batch_norm: bool = False  # batch norm of the features, with trained scale and shift undecayed
    trust: float = 0.0  # LARC's coefficient; 0: plain SGD
    dino_feature: bool = (
        False  # a ViT's feature is the one of DINO's README, else the pooled output
    )
    crop_sampler: CropSampler = "torchvision"  # for training views, as are the next two
    interpolation: Interpolation = "bilinear"
    antialias: bool = True
    test_interpolation: Interpolation = "bilinear"

    def lr_factor(self, epoch: float) -> float:
        """Return the factor of every learning rate after a number of epochs, maybe a fraction."""
        if self.by_epoch:
            epoch = math.floor(epoch)
        if self.milestones:
            return 0.1 ** sum(epoch >= milestone for milestone in self.milestones)
        return (1 + math.cos(math.pi * epoch / self.epochs)) / 2


LINEAR = {
    "simclr": LinearProtocol(
        "SimCLR, the linear command of its README: google-research/simclr at 0075cc07",
        base_lr=0.1, batch_size=4096, epochs=90, weight_decay=1e-6, nesterov=True, by_epoch=False,
        init_std=0.0, crop_sampler="tensorflow", interpolation="bicubic", antialias=False,
        test_interpolation="bicubic",
    ),
    "moco": LinearProtocol(
        "MoCo, main_lincls.py: facebookresearch/moco at 010242b7",
        base_lr=30.0, batch_size=256, epochs=100, weight_decay=0.0, milestones=(60, 80),
    ),
    "dino": LinearProtocol(
        "DINO, eval_linear.py: facebookresearch/dino at 04c0ad95",
        base_lr=0.001, batch_size=1024, epochs=100, weight_decay=0.0, dino_feature=True,
        test_interpolation="bicubic",
    ),
    "swav": LinearProtocol(
        "SwAV, eval_linear.py: facebookresearch/swav at 04b8f431; the same as of Barlow Twins",
        base_lr=0.3, batch_size=256, epochs=100, weight_decay=1e-6,
    ),
    "vicreg": LinearProtocol(
        "VICReg, the linear command of its README: facebookresearch/vicreg at 4e12602f",
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
        "BYOL, eval_experiment.py and configs/eval.py: google-deepmind/deepmind-research at"
        " f5de0ede; without its sweep over learning rates",
        base_lr=0.2, batch_size=4096, epochs=80, weight_decay=0.0, nesterov=True, by_epoch=False,
        start="truncated", crop_sampler="clipped", interpolation="bicubic", antialias=False,
        test_interpolation="bicubic",
    ),
    "vissl": LinearProtocol(
        "VISSL, eval_resnet_8gpu_transfer_in1k_linear.yaml: facebookresearch/vissl at b6e26383; its"
        " head of res5, on the pooled output",
        base_lr=0.01, batch_size=256, epochs=28, weight_decay=5e-4, nesterov=True,
        milestones=(8, 16, 24), batch_norm=True, start="uniform",
    ),
}  # fmt: skip


def describe_linear(protocol: LinearProtocol, published: LinearProtocol, num_images: int) -> str:
    """Describe the training of the heads, and where it departs from the published protocol."""
    schedule = "cosine to 0" + (" by epochs" if protocol.by_epoch else " by steps")
    if protocol.milestones:
        schedule = f"a tenth of the rate after {', '.join(map(str, protocol.milestones))} epochs"
    batch, epochs = f"batch {protocol.batch_size}", f"{protocol.epochs} epochs"
    if protocol.batch_size != published.batch_size:
        batch += f" (published: {published.batch_size}, {num_images:,} images)"
    if protocol.epochs != published.epochs:
        epochs += f" (published: {published.epochs})"
    normal = f"from normal weights of deviation {protocol.init_std:g}"
    start = {
        "uniform": "from nn.Linear's default weights",
        "truncated": "from Haiku's default weights",
        "normal": normal if protocol.init_std else "from zero",
    }[protocol.start]
    entries = [
        f"SGD with {'Nesterov ' if protocol.nesterov else ''}momentum {protocol.momentum:g}",
        f"LARC of {protocol.trust:g} without clipping" if protocol.trust else "",
        f"published learning rate {protocol.base_lr:g} at a batch of 256, times"
        f" {protocol.batch_size / 256:g} for this batch",
        batch,
        epochs,
        schedule,
        f"weight decay {protocol.weight_decay:g}",
        start,
        "features through a batch norm with trained scale and shift" if protocol.batch_norm else "",
    ]
    return ", ".join(filter(None, entries))


@dataclass(frozen=True)
class TuningProtocol:
    """Backbone and classifier trained together from the pretrained weights."""

    source: str
    optimizer: Literal["sgd", "adamw"]  # SGD with Nesterov momentum of 0.9
    base_lr: float  # at a batch of `lr_batch`
    lr_batch: int
    batch_size: int
    epochs: float = 0.0  # unused if `steps` is set
    steps: int = 0
    warmup_epochs: float = 0.0
    warmup_lr: float = 0.0  # learning rate at the start of the warm-up
    min_lr: float = 0.0  # learning rate at the end of the cosine
    weight_decay: float = 0.0
    decay_all: bool = True  # false: biases and norms are not decayed
    layer_decay: float = 1.0  # ratio of a block's learning rate to the next block's
    mixup: float = 0.0  # parameter of the beta distribution, as `cutmix`
    cutmix: float = 0.0
    smoothing: float = 0.0  # label smoothing
    erasing: float = 0.0  # probability of an erased rectangle
    randaugment: str = ""  # timm's name of a policy
    drop_path: float = 0.0
    zero_head: bool = False  # the classifier starts at zero
    slow_statistics: bool = False  # batch-norm momentum of at most 10 / steps_per_epoch, of SimCLR
    interpolation: Interpolation = "bicubic"


SEMI_EPOCHS = {1: 60, 10: 30}  # SimCLR, appendix B.5, by percent of labels

TUNING = {
    "semi": TuningProtocol(
        "SimCLR (arXiv:2002.05709), appendix B.5: no regularization, no warm-up, 60 epochs for 1 %"
        " and 30 for 10 % of the labels",
        "sgd", base_lr=0.05, lr_batch=256, batch_size=4096, epochs=60, zero_head=True,
    ),
    "simclr": TuningProtocol(
        "SimCLR (arXiv:2002.05709), appendix B.8.1: 20,000 steps; select the learning rate from"
        " --lrs of 1e-4 to 0.1 and the weight decay from --weight-decays of 0 and 1e-6 to 1e-3,"
        " both logarithmic",
        "sgd", base_lr=0.05, lr_batch=256, batch_size=256, steps=20_000, zero_head=True,
        slow_statistics=True,
    ),
    "deit": TuningProtocol(
        "DeiT (arXiv:2012.12877), table 9 and main.py: facebookresearch/deit at 0282d2a1; epochs as"
        " MoCo v3 fine-tunes with it; without repeated augmentation",
        "adamw", base_lr=5e-4, lr_batch=512, batch_size=1024, epochs=150, warmup_epochs=5,
        warmup_lr=1e-6, min_lr=1e-5, weight_decay=0.05, decay_all=False, mixup=0.8, cutmix=1.0,
        smoothing=0.1, erasing=0.25, randaugment="rand-m9-mstd0.5-inc1", drop_path=0.1,
    ),
}  # fmt: skip


def batch_that_fits(published: int, num_images: int, world_size: int, min_steps: int = 10) -> int:
    """Return the published batch size, or a smaller one for small data sets.

    If the published batch makes fewer than `min_steps` per epoch, it is replaced by the largest
    power of two that makes as many, but not by fewer than 16 images where there are 16. The result
    is a multiple of the number of ranks.
    """
    if num_images < min_steps * published:
        fitting = max(1, num_images // min_steps, min(num_images, 16))
        published = min(published, 2 ** int(math.log2(fitting)))
    return max(1, published // world_size) * world_size
