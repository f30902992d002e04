"""Build torchvision's Faster R-CNN or Mask R-CNN on a pretrained ResNet.

The detector uses a feature pyramid (FPN) or the output of res4 (C4). The stages of the ResNet are
called res2 to res5, as in Detectron2. In timm they are layer1 to layer4.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import (
    FasterRCNN,
    FastRCNNConvFCHead,
    FastRCNNPredictor,
    TwoMLPHead,
)
from torchvision.models.detection.mask_rcnn import MaskRCNN, MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from ssl_pretrain.distributed import process_group
from ssl_pretrain.eval.detection.published_protocols import Norm, Protocol
from ssl_pretrain.parallel import batch_norm

ASPECT_RATIOS = (0.5, 1.0, 2.0)
STEM = ("conv1", "bn1", "act1", "maxpool")


class ResNetStages(nn.Module):
    """The stem and the first stages of a timm ResNet.

    Args:
        resnet: The ResNet.
        num_stages: Number of stages to keep, counted from the first.
        num_outputs: Number of stages, counted from the last, whose outputs are returned.
    """

    def __init__(self, resnet: nn.Module, num_stages: int, num_outputs: int):
        super().__init__()
        self.stem = nn.Sequential(OrderedDict((name, getattr(resnet, name)) for name in STEM))
        numbers = range(1, num_stages + 1)
        self.layers = nn.ModuleList(getattr(resnet, f"layer{number}") for number in numbers)
        self.num_outputs, self.out_channels = num_outputs, stage_channels(resnet)[num_stages - 1]

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Return the outputs of the last stages, named "0", "1" and so on."""
        outputs, x = [], self.stem(images)
        for layer in self.layers:
            x = layer(x)
            outputs.append(x)
        return OrderedDict((str(i), x) for i, x in enumerate(outputs[-self.num_outputs :]))


class FeaturePyramid(nn.Module):
    """A feature pyramid on res2 to res5, whose fifth level is pooled from the fourth."""

    def __init__(self, resnet: nn.Module, out_channels: int):
        super().__init__()
        self.stages, self.out_channels = ResNetStages(resnet, 4, 4), out_channels
        self.pyramid = FeaturePyramidNetwork(
            stage_channels(resnet),
            out_channels,
            extra_blocks=LastLevelMaxPool(),
            norm_layer=nn.BatchNorm2d,
        )

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Return the five levels of the pyramid."""
        return self.pyramid(self.stages(images))


def stage_channels(resnet: nn.Module) -> list[int]:
    """Return the number of channels of each stage, res2 to res5."""
    return [info["num_chs"] for info in resnet.feature_info[-4:]]  # type: ignore[index]


def is_resnet(network: nn.Module) -> bool:
    """Return True if the network has the stem and the stages of a timm ResNet."""
    return all(hasattr(network, name) for name in (*STEM, "layer1", "layer4", "feature_info"))


def check_backbone(backbone: nn.Module, name: str) -> None:
    """Raise ValueError unless the backbone is a timm ResNet."""
    if not is_resnet(backbone):
        raise ValueError(
            "backbone.name: detection needs a timm ResNet with the stages layer1 to layer4, but "
            f"{name} has no such stages; evaluate it with eval.linear"
        )


def build(
    resnet: nn.Module,
    num_classes: int,
    protocol: Protocol,
    mean: Sequence[float],
    std: Sequence[float],
) -> nn.Module:
    """Build the protocol's detector, whose backbone is `resnet` itself, not a copy.

    Args:
        resnet: A timm ResNet without a classifier. Its parameters are fine-tuned.
        num_classes: Number of classes without the background.
        protocol: Architecture and sizes of the detector.
        mean: Channel means used in pretraining, for pixel values from 0 to 1.
        std: Channel standard deviations used in pretraining.
    """
    train_pre_nms, train_post_nms, test_pre_nms, test_post_nms = protocol.num_proposals
    settings: dict[str, Any] = {
        "num_classes": None,
        "image_mean": list(mean),
        "image_std": list(std),
        "min_size": tuple(protocol.short_sides),
        "max_size": protocol.max_side,
        "rpn_pre_nms_top_n_train": train_pre_nms,
        "rpn_post_nms_top_n_train": train_post_nms,
        "rpn_pre_nms_top_n_test": test_pre_nms,
        "rpn_post_nms_top_n_test": test_post_nms,
        "box_batch_size_per_image": protocol.num_sampled_proposals,
    }
    build_modules = _c4_modules if protocol.architecture == "c4" else _fpn_modules
    settings |= build_modules(resnet, num_classes + 1, protocol)
    return MaskRCNN(**settings) if protocol.predicts_masks else FasterRCNN(**settings)


def _anchor_sizes(protocol: Protocol) -> list[int]:
    """Return the five anchor sizes in pixels."""
    return [protocol.smallest_anchor * 2**level for level in range(5)]


def _c4_modules(resnet: nn.Module, num_logits: int, protocol: Protocol) -> dict[str, Any]:
    """Return the modules of a detector on res4, whose box and mask heads share res5."""
    channels, sizes = stage_channels(resnet)[3], tuple(_anchor_sizes(protocol))
    # A batch norm follows res5, as in MoCo's box head.
    res5 = nn.Sequential(resnet.get_submodule("layer4"), nn.BatchNorm2d(channels))
    modules: dict[str, Any] = {
        "backbone": ResNetStages(resnet, num_stages=3, num_outputs=1),
        "rpn_anchor_generator": AnchorGenerator((sizes,), (ASPECT_RATIOS,)),
        "box_roi_pool": MultiScaleRoIAlign(["0"], 14, sampling_ratio=0),
        "box_head": nn.Sequential(res5, nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        "box_predictor": FastRCNNPredictor(channels, num_logits),
    }
    if protocol.predicts_masks:
        modules["mask_predictor"] = MaskRCNNPredictor(channels, 256, num_logits)
        modules["mask_roi_pool"] = MultiScaleRoIAlign(["0"], 14, sampling_ratio=0)
        modules["mask_head"] = res5
    return modules


def _fpn_modules(resnet: nn.Module, num_logits: int, protocol: Protocol) -> dict[str, Any]:
    """Return the modules of a detector on a feature pyramid."""
    channels, ratios = protocol.pyramid_channels, (ASPECT_RATIOS,) * 5
    modules: dict[str, Any] = {"backbone": FeaturePyramid(resnet, channels)}
    if protocol.num_box_convolutions:
        convolutions = [channels] * protocol.num_box_convolutions
        modules["box_head"] = FastRCNNConvFCHead(
            (channels, 7, 7), convolutions, [protocol.head_dim], norm_layer=nn.BatchNorm2d
        )
    else:
        modules["box_head"] = TwoMLPHead(channels * 49, protocol.head_dim)
    sizes = tuple((size,) for size in _anchor_sizes(protocol))
    modules["rpn_anchor_generator"] = AnchorGenerator(sizes, ratios)
    modules["box_roi_pool"] = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, sampling_ratio=0)
    modules["box_predictor"] = FastRCNNPredictor(protocol.head_dim, num_logits)
    if protocol.predicts_masks:
        layers = [channels] * 4
        modules["mask_head"] = MaskRCNNHeads(channels, layers, 1, norm_layer=nn.BatchNorm2d)
        modules["mask_predictor"] = MaskRCNNPredictor(channels, channels, num_logits)
    return modules


def batch_norms(detector: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Return all batch norm layers of the detector."""
    norm_class = nn.modules.batchnorm._BatchNorm
    return [module for module in detector.modules() if isinstance(module, norm_class)]


def convert_norms(detector: nn.Module, norm: Norm, local_batch_size: int) -> nn.Module:
    """Return the detector with its batch norms converted to the requested kind.

    Args:
        detector: Detector to convert, which may be changed in place.
        norm: "sync" normalizes by the statistics of all ranks, "batch" by those of this rank, and
            "frozen" by those of pretraining. On one rank, "sync" is the same as "batch".
        local_batch_size: Images per step on this rank.
    """
    if norm == "frozen":
        for module in batch_norms(detector):
            module.requires_grad_(False)
    elif norm == "sync" and process_group.world_size() > 1:
        global_batch_size = local_batch_size * process_group.world_size()
        return batch_norm.convert(detector, local_batch_size, global_batch_size)
    return detector


def set_training_mode(detector: nn.Module, norm: Norm) -> None:
    """Switch to training mode. Frozen batch norms stay in evaluation mode."""
    detector.train()
    if norm == "frozen":
        for module in batch_norms(detector):
            module.eval()
