"""Published protocols of linear evaluation, with the source of every number."""

import itertools
import math
from dataclasses import dataclass, replace

from ssl_pretrain.distributed import process_group
from ssl_pretrain.eval.frozen.linear_heads import BN_EPS, HeadOptimizer, Init
from ssl_pretrain.eval.frozen.named_features import VitFeature
from ssl_pretrain.optim import schedules
from ssl_pretrain.views.recipe import CropSampler, Interpolation

LR_FACTORS = (1.0, 0.1, 0.3, 3.0, 10.0)  # multiples of the published learning rate to try
# MAE warms up for 10 epochs, and its shortest published training has 50. A shorter training warms
# up for the same share of its epochs, so that the learning rate also falls.
MAX_WARMUP_FRACTION = 0.2


@dataclass(frozen=True)
class LinearProtocol:
    """Training of a linear classifier on a frozen backbone in evaluation mode.

    The only augmentations are a random resized crop and a flip.
    """

    source: str
    base_lr: float  # learning rate at a batch of 256
    batch_size: int
    epochs: int
    weight_decay: float  # also of biases, except with LARS
    nesterov: bool = False
    momentum: float = 0.9
    optimizer: HeadOptimizer = "sgd"  # see LinearHeads
    trust_coefficient: float = 0.001  # only used by LARC and LARS
    warmup_epochs: float = 0.0  # linear warm-up from 0, only before a cosine
    # The learning rate is divided by 10 after each of these epochs. Without milestones, the rate
    # follows a cosine.
    milestones: tuple[int, ...] = ()
    lr_changes_every_step: bool = False  # otherwise, the rate only changes between epochs
    init: Init = "normal"  # distribution of the initial weights, see LinearHeads
    init_std: float = 0.01  # standard deviation of normal initial weights; biases start at 0
    normalizes_features: bool = False  # features pass through a batch norm
    norm_is_affine: bool = True  # the norm has a trained scale and shift, which are not decayed
    norm_eps: float = BN_EPS
    vit_feature: VitFeature = "pooled"  # feature of a ViT with a class token, else pooled
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
        return schedules.warmup_and_decline(
            epoch / self.epochs, warmup_fraction=self.warmup_epochs / self.epochs
        )


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
        base_lr=0.001, batch_size=1024, epochs=100, weight_decay=0.0, vit_feature="dino",
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
        base_lr=0.1, batch_size=4096, epochs=90, weight_decay=0.0, optimizer="larc",
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
    "mae": LinearProtocol(
        "MAE, main_linprobe.py and the command of FINETUNE.md: facebookresearch/mae at efb2a806",
        base_lr=0.1, batch_size=16384, epochs=90, weight_decay=0.0, optimizer="lars",
        warmup_epochs=10, lr_changes_every_step=True, normalizes_features=True,
        norm_is_affine=False, norm_eps=1e-6, vit_feature="class_token", crop_sampler="clipped",
        interpolation="bicubic", test_interpolation="bicubic",
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

        Milestones are scaled with the number of epochs. The warm-up is at most
        `MAX_WARMUP_FRACTION` of it.

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
            published_protocol,
            epochs=epochs,
            batch_size=batch_size,
            milestones=milestones,
            warmup_epochs=min(published_protocol.warmup_epochs, MAX_WARMUP_FRACTION * epochs),
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
    if protocol.warmup_epochs:
        schedule = f"warm-up {protocol.warmup_epochs:g} epochs, {schedule}"
    batch, epochs = f"batch {protocol.batch_size}", f"{protocol.epochs} epochs"
    if protocol.batch_size != published_protocol.batch_size:
        batch += f" (published: {published_protocol.batch_size}, {num_images:,} images)"
    if protocol.epochs != published_protocol.epochs:
        epochs += f" (published: {published_protocol.epochs})"
    normal = f"from normal weights with standard deviation {protocol.init_std:g}"
    norm = ("with trained" if protocol.norm_is_affine else "without") + " scale and shift"
    entries = [
        f"SGD with {'Nesterov ' if protocol.nesterov else ''}momentum {protocol.momentum:g}",
        {
            "sgd": "",
            "larc": f"LARC with coefficient {protocol.trust_coefficient:g}, without clipping",
            "lars": f"LARS with coefficient {protocol.trust_coefficient:g}, not on biases",
        }[protocol.optimizer],
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
        f"features through a batch norm {norm}" if protocol.normalizes_features else "",
    ]
    return ", ".join(filter(None, entries))


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
