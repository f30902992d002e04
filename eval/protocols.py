"""Published protocols of linear evaluation and fine-tuning, with the source of every number."""

import itertools
import math
from dataclasses import dataclass, replace
from typing import Literal

from ssl_pretrain.distributed import process_group
from ssl_pretrain.eval.frozen.linear_heads import Init
from ssl_pretrain.views.recipe import CropSampler, Interpolation

LR_FACTORS = (1.0, 0.1, 0.3, 3.0, 10.0)  # multiples of the published learning rate to try


@dataclass(frozen=True)
class LinearProtocol:
    """Training of a linear classifier on a frozen backbone in evaluation mode.

    The only augmentations are a random resized crop and a flip.
    """

    source: str
    base_lr: float  # learning rate at a batch of 256
    batch_size: int
    epochs: int
    weight_decay: float  # applied to weights and biases
    nesterov: bool = False
    momentum: float = 0.9
    # The learning rate is divided by 10 after each of these epochs. Without milestones, the rate
    # follows a cosine.
    milestones: tuple[int, ...] = ()
    lr_changes_every_step: bool = False  # otherwise, the rate only changes between epochs
    init: Init = "normal"  # distribution of the initial weights, see LinearHeads
    init_std: float = 0.01  # standard deviation of normal initial weights; biases start at 0
    # Features pass through a batch norm whose trained scale and shift are not decayed.
    normalizes_features: bool = False
    larc_coefficient: float = 0.0  # trust coefficient; 0 means plain SGD
    uses_dino_feature: bool = False  # for a ViT, DINO's feature instead of the pooled output
    # Cropping and resizing of the training views, and resizing of the test views
    crop_sampler: CropSampler = "torchvision"
    interpolation: Interpolation = "bilinear"
    antialias: bool = True
    test_interpolation: Interpolation = "bilinear"

    def lr_factor(self, epoch: float) -> float:
        """Return the factor that multiplies every learning rate after `epoch` epochs."""
        if not self.lr_changes_every_step:
            epoch = math.floor(epoch)
        if self.milestones:
            return 0.1 ** sum(epoch >= milestone for milestone in self.milestones)
        return (1 + math.cos(math.pi * epoch / self.epochs)) / 2


LINEAR_PROTOCOLS = {
    "simclr": LinearProtocol(
        "SimCLR, the linear command of its README: google-research/simclr at 0075cc07",
        base_lr=0.1, batch_size=4096, epochs=90, weight_decay=1e-6, nesterov=True,
        lr_changes_every_step=True, init_std=0.0, crop_sampler="tensorflow",
        interpolation="bicubic", antialias=False, test_interpolation="bicubic",
    ),
    "moco": LinearProtocol(
        "MoCo, main_lincls.py: facebookresearch/moco at 010242b7",
        base_lr=30.0, batch_size=256, epochs=100, weight_decay=0.0, milestones=(60, 80),
    ),
    "dino": LinearProtocol(
        "DINO, eval_linear.py: facebookresearch/dino at 04c0ad95",
        base_lr=0.001, batch_size=1024, epochs=100, weight_decay=0.0, uses_dino_feature=True,
        test_interpolation="bicubic",
    ),
    "swav": LinearProtocol(
        "SwAV, eval_linear.py: facebookresearch/swav at 04b8f431; Barlow Twins uses the same",
        base_lr=0.3, batch_size=256, epochs=100, weight_decay=1e-6,
    ),
    "vicreg": LinearProtocol(
        "VICReg, the linear command of its README: facebookresearch/vicreg at 4e12602f",
        base_lr=0.02, batch_size=256, epochs=100, weight_decay=1e-6,
    ),
    "simsiam": LinearProtocol(
        "SimSiam, main_lincls.py --lars: facebookresearch/simsiam at a7bc1772",
        base_lr=0.1, batch_size=4096, epochs=90, weight_decay=0.0, larc_coefficient=0.001,
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
        base_lr=0.2, batch_size=4096, epochs=80, weight_decay=0.0, nesterov=True,
        lr_changes_every_step=True, init="truncated", crop_sampler="clipped",
        interpolation="bicubic", antialias=False, test_interpolation="bicubic",
    ),
    "vissl": LinearProtocol(
        "VISSL, eval_resnet_8gpu_transfer_in1k_linear.yaml: facebookresearch/vissl at b6e26383; its"
        " res5 head, on the pooled output",
        base_lr=0.01, batch_size=256, epochs=28, weight_decay=5e-4, nesterov=True,
        milestones=(8, 16, 24), normalizes_features=True, init="uniform",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class LinearOptions:
    """A published linear protocol, the settings to try and the values to change.

    None keeps the published value.
    """

    protocol_name: str  # key of LINEAR_PROTOCOLS
    lrs: list[float] | None = None  # learning rates at a batch of 256
    weight_decays: list[float] | None = None
    epochs: int | None = None
    batch_size: int | None = None
    feature: str | None = None  # name of a feature, see named_features
    selection: str = "held-out"  # or "published" or "test"

    @property
    def published_protocol(self) -> LinearProtocol:
        """The protocol without changes."""
        return LINEAR_PROTOCOLS[self.protocol_name]

    def adapt_protocol(self, num_images: int) -> LinearProtocol:
        """Return the protocol with the changes and a batch size that fits the images.

        Milestones are scaled with the number of epochs.

        Raises:
            ValueError: If there are no epochs, or the batch size does not fit the images.
        """
        published_protocol = self.published_protocol
        epochs = published_protocol.epochs if self.epochs is None else self.epochs
        batch_size = self.batch_size or fitting_batch_size(
            published_protocol.batch_size, num_images, process_group.world_size()
        )
        if epochs < 1 or not 1 <= batch_size <= num_images:
            raise ValueError(
                f"--epochs {epochs}, --batch-size {batch_size}: give at least 1 epoch, and a batch"
                f" of 1 to {num_images} images"
            )
        milestones = tuple(
            round(epoch * epochs / published_protocol.epochs)
            for epoch in published_protocol.milestones
        )
        return replace(
            published_protocol, epochs=epochs, batch_size=batch_size, milestones=milestones
        )

    def grid(self) -> list[tuple[float, float]]:
        """Return the learning rate at a batch of 256 and the weight decay of each head.

        Raises:
            ValueError: If the published setting is selected and other settings are given.
        """
        published_protocol = self.published_protocol
        if self.selection == "published":
            if self.lrs or self.weight_decays:
                raise ValueError(
                    "--select published: only the published setting is trained; leave out --lrs and"
                    " --weight-decays"
                )
            return [(published_protocol.base_lr, published_protocol.weight_decay)]
        lrs = self.lrs or [published_protocol.base_lr * factor for factor in LR_FACTORS]
        decays = self.weight_decays or list(dict.fromkeys([published_protocol.weight_decay, 0.0]))
        return list(itertools.product(lrs, decays))


def describe_linear_training(
    protocol: LinearProtocol, published_protocol: LinearProtocol, num_images: int
) -> str:
    """Describe the training of the heads and its differences from the published protocol."""
    schedule = f"cosine to 0 by {'steps' if protocol.lr_changes_every_step else 'epochs'}"
    if protocol.milestones:
        schedule = f"a tenth of the rate after {', '.join(map(str, protocol.milestones))} epochs"
    batch, epochs = f"batch {protocol.batch_size}", f"{protocol.epochs} epochs"
    if protocol.batch_size != published_protocol.batch_size:
        batch += f" (published: {published_protocol.batch_size}, {num_images:,} images)"
    if protocol.epochs != published_protocol.epochs:
        epochs += f" (published: {published_protocol.epochs})"
    normal = f"from normal weights with standard deviation {protocol.init_std:g}"
    entries = [
        f"SGD with {'Nesterov ' if protocol.nesterov else ''}momentum {protocol.momentum:g}",
        f"LARC with coefficient {protocol.larc_coefficient:g}, without clipping"
        if protocol.larc_coefficient
        else "",
        f"published learning rate {protocol.base_lr:g} at a batch of 256, times"
        f" {protocol.batch_size / 256:g} for this batch",
        batch,
        epochs,
        schedule,
        f"weight decay {protocol.weight_decay:g}",
        {
            "uniform": "from nn.Linear's default weights",
            "truncated": "from Haiku's default weights",
            "normal": normal if protocol.init_std else "from zero",
        }[protocol.init],
        "features through a batch norm with trained scale and shift"
        if protocol.normalizes_features
        else "",
    ]
    return ", ".join(filter(None, entries))


@dataclass(frozen=True)
class FinetuningProtocol:
    """Training of the backbone and a classifier together from the pretrained weights."""

    source: str
    optimizer: Literal["sgd", "adamw"]  # SGD uses a Nesterov momentum of 0.9
    base_lr: float  # learning rate at a batch of `lr_batch_size`
    lr_batch_size: int
    batch_size: int
    epochs: float = 0.0  # unused if `num_steps` is set
    num_steps: int = 0
    warmup_epochs: float = 0.0
    warmup_lr: float = 0.0  # learning rate at the start of the warm-up
    min_lr: float = 0.0  # learning rate at the end of the cosine
    weight_decay: float = 0.0
    decays_norms_and_biases: bool = True
    layer_decay: float = 1.0  # ratio of a block's learning rate to the next block's
    mixup: float = 0.0  # parameter of the beta distribution
    cutmix: float = 0.0  # parameter of the beta distribution
    smoothing: float = 0.0  # label smoothing
    erasing: float = 0.0  # probability of erasing a rectangle
    randaugment: str = ""  # timm's name for a policy
    drop_path: float = 0.0  # rate of stochastic depth
    head_starts_at_zero: bool = False
    # The momentum of batch norm is at most 10 / steps_per_epoch, as in SimCLR.
    limits_batch_norm_momentum: bool = False
    interpolation: Interpolation = "bicubic"


SEMI_EPOCHS = {1: 60, 10: 30}  # epochs by percentage of labels (SimCLR, appendix B.5)

FINETUNING_PROTOCOLS = {
    "semi": FinetuningProtocol(
        "SimCLR (arXiv:2002.05709), appendix B.5: no regularization, no warm-up, 60 epochs for 1 %"
        " and 30 for 10 % of the labels",
        "sgd", base_lr=0.05, lr_batch_size=256, batch_size=4096, epochs=60,
        head_starts_at_zero=True,
    ),
    "simclr": FinetuningProtocol(
        "SimCLR (arXiv:2002.05709), appendix B.8.1: 20,000 steps; select the learning rate from"
        " --lrs of 1e-4 to 0.1 and the weight decay from --weight-decays of 0 and 1e-6 to 1e-3,"
        " both logarithmic",
        "sgd", base_lr=0.05, lr_batch_size=256, batch_size=256, num_steps=20_000,
        head_starts_at_zero=True, limits_batch_norm_momentum=True,
    ),
    "deit": FinetuningProtocol(
        "DeiT (arXiv:2012.12877), table 9 and main.py: facebookresearch/deit at 0282d2a1; epochs as"
        " MoCo v3 fine-tunes with it; without repeated augmentation",
        "adamw", base_lr=5e-4, lr_batch_size=512, batch_size=1024, epochs=150, warmup_epochs=5,
        warmup_lr=1e-6, min_lr=1e-5, weight_decay=0.05, decays_norms_and_biases=False, mixup=0.8,
        cutmix=1.0, smoothing=0.1, erasing=0.25, randaugment="rand-m9-mstd0.5-inc1",
        drop_path=0.1,
    ),
}  # fmt: skip


def fitting_batch_size(
    published_batch_size: int, num_images: int, world_size: int, min_steps: int = 10
) -> int:
    """Return the published batch size, or a smaller one for small data sets.

    If an epoch would have fewer than `min_steps` steps, the result is the largest power of two that
    allows `min_steps` steps, but at least 16 if there are that many images. The result is a
    multiple of the number of ranks.
    """
    batch_size = published_batch_size
    if num_images < min_steps * batch_size:
        largest = max(1, num_images // min_steps, min(num_images, 16))
        batch_size = min(batch_size, 2 ** int(math.log2(largest)))
    return max(1, batch_size // world_size) * world_size
