"""Protocols of the segmentation evaluations by name, with the source of every number."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

Classifier = Literal["knn", "logistic"]
Head = Literal["fcn", "deeplabv3", "moco_fcn", "bn_linear"]

_CAPI = "CAPI, eval_segmentation.py: facebookresearch/capi at 98b4fa17"
_TORCHVISION = "torchvision, references/segmentation/train.py: pytorch/vision, README at 0d7913da"


@dataclass(frozen=True)
class PatchProtocol:
    """Classification of frozen patch tokens that are computed once per image.

    Images are resized to a square. A tenth of the training images selects the setting by mIoU.
    """

    source: str
    classifier: Classifier
    resolution: int = 0  # pixels of the square; 0 takes the run's evaluation size
    neighbors: tuple[int, ...] = (1, 3, 10, 30)
    distances: tuple[str, ...] = ("cosine", "L2")
    inverse_penalties: tuple[float, ...] = ()  # C of scikit-learn, for "logistic"
    max_iterations: int = 1000
    tolerance: float = 1e-12
    # Predict at the size of the mask, instead of the mask at the size of the prediction.
    scores_masks_as_stored: bool = False


@dataclass(frozen=True)
class TrainingProtocol:
    """Training of a segmentation head by gradients, with the backbone or on a frozen one."""

    source: str
    head: Head
    is_frozen: bool = False  # train the head only
    output_stride: int = 0  # a ResNet is dilated to it; 0 keeps the network's own
    dilates_first_block: bool = False  # in the first stage without a stride
    aux_weight: float = 0.0  # weight of the loss of a second head, on a ResNet's layer3
    epochs: int = 0  # unused if `num_steps` is set
    num_steps: int = 0
    batch_size: int = 16  # images per step over all ranks
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.01
    aux_lr_factor: float = 1.0
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: Literal["poly", "drops"] = "poly"
    power: float = 0.9  # exponent of the schedule "poly"
    warmup_steps: int = 0
    # Views
    base_size: int = 0  # short side before the random scale; 0 takes each image's own size
    scales: tuple[float, float] = (0.5, 2.0)
    crop_size: int = 0  # pixels of a square; 0 takes the run's evaluation size
    max_class_share: float = 1.0  # largest share in a crop; up to ten crops are tried
    is_distorted: bool = False  # photometric distortion of MMSegmentation
    pads_with_mean: bool = False  # instead of black
    # Test
    test_size: int = 0  # short side; 0 takes each image's own size
    scores_resized_masks: bool = False  # masks are resized to `test_size`, too
    window: tuple[int, int] = (0, 0)  # side and stride of sliding windows; 0 takes whole images


PATCH_PROTOCOLS = {
    "linear": PatchProtocol(
        "ours: CAPI's logistic regression at the run's image size, with fewer settings, bilinear "
        "logits and masks as stored",
        "logistic", inverse_penalties=(1e-4, 1e-2, 1.0), max_iterations=200, tolerance=1e-4,
        scores_masks_as_stored=True,
    ),
    "knn": PatchProtocol(
        "ours: CAPI's k-NN at the run's image size, and masks as stored",
        "knn", scores_masks_as_stored=True,
    ),
    "capi_linear": PatchProtocol(
        _CAPI, "logistic", resolution=224,
        inverse_penalties=tuple((10 ** np.linspace(-6, 5, 8)).tolist()),
    ),
    "capi_knn": PatchProtocol(_CAPI, "knn", resolution=224),
}  # fmt: skip
_TORCHVISION_FCN = TrainingProtocol(
    _TORCHVISION, "fcn", output_stride=8, aux_weight=0.5, aux_lr_factor=10, epochs=30,
    batch_size=32, lr=0.02, base_size=520, crop_size=480, test_size=520,
    scores_resized_masks=True,
)  # fmt: skip
TRAINING_PROTOCOLS = {
    "dinov2_linear": TrainingProtocol(
        "DINOv2, BNHead and notebooks/semantic_segmentation.ipynb: facebookresearch/dinov2 at "
        "b8931f7b; the notebook's configuration as copied by Jiawei-Yang/Denoising-ViT at 2d08bd84",
        "bn_linear", is_frozen=True, num_steps=40_000, optimizer="adamw", lr=1e-3,
        weight_decay=1e-4, power=1.0, warmup_steps=1500, base_size=512, crop_size=512,
        max_class_share=0.75, is_distorted=True, pads_with_mean=True, test_size=512,
        window=(512, 341),
    ),
    "torchvision_fcn": _TORCHVISION_FCN,
    "torchvision_deeplabv3": TrainingProtocol(
        **{**vars(_TORCHVISION_FCN), "head": "deeplabv3"}
    ),
    "moco_fcn": TrainingProtocol(
        "MoCo, semantic segmentation on VOC: arXiv:1911.05722, appendix A.5",
        "moco_fcn", output_stride=16, dilates_first_block=True, num_steps=30_000, lr=0.003,
        schedule="drops", crop_size=513, pads_with_mean=True,
    ),
    "finetune": TrainingProtocol(
        "ours: torchvision's FCN head, a short schedule for CPUs",
        "fcn", output_stride=8, num_steps=150, batch_size=8, lr=0.02, scales=(0.75, 1.5),
        pads_with_mean=True,
    ),
}  # fmt: skip
PROTOCOLS = [*PATCH_PROTOCOLS, *TRAINING_PROTOCOLS]
DROP_FRACTIONS = (0.7, 0.9)  # "drops" divides the learning rate by 10 after these shares
WARMUP_RATIO = 1e-6  # share of the learning rate at the first warm-up step
