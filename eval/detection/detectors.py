"""torchvision's Faster and Mask R-CNN on a pretrained ResNet, with a pyramid (FPN) or res4 (C4).

As in Detectron2, res2 to res5 are the stages of the ResNet that timm calls layer1 to layer4.
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


class Stages(nn.Module):
    """The stem and the first stages of a timm ResNet.

    Args:
        model: The ResNet.
        num_stages: Number of stages.
        num_outputs: Number of stages, counted from the last, whose outputs are returned.
    """

    def __init__(self, model: nn.Module, num_stages: int, num_outputs: int):
        super().__init__()
        self.stem = nn.Sequential(OrderedDict((name, getattr(model, name)) for name in STEM))
        numbers = range(1, num_stages + 1)
        self.layers = nn.ModuleList(getattr(model, f"layer{number}") for number in numbers)
        self.num_outputs, self.out_channels = num_outputs, stage_channels(model)[num_stages - 1]

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Return the outputs under the names "0", "1" and so on."""
        outputs, x = [], self.stem(images)
        for layer in self.layers:
            x = layer(x)
            outputs.append(x)
        return OrderedDict((str(i), x) for i, x in enumerate(outputs[-self.num_outputs :]))


class Pyramid(nn.Module):
    """A feature pyramid on res2 to res5, with a fifth level by pooling."""

    def __init__(self, model: nn.Module, out_channels: int):
        super().__init__()
        self.stages, self.out_channels = Stages(model, 4, 4), out_channels
        self.pyramid = FeaturePyramidNetwork(
            stage_channels(model),
            out_channels,
            extra_blocks=LastLevelMaxPool(),
            norm_layer=nn.BatchNorm2d,
        )

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Return the five levels of the pyramid."""
        return self.pyramid(self.stages(images))


def stage_channels(model: nn.Module) -> list[int]:
    """Return the number of channels of each stage, res2 to res5."""
    return [info["num_chs"] for info in model.feature_info[-4:]]  # type: ignore[index]


def check_backbone(model: nn.Module, name: str) -> None:
    """Raise ValueError if the network is not a ResNet of timm."""
    if not all(hasattr(model, module) for module in (*STEM, "layer1", "layer4", "feature_info")):
        raise ValueError(
            "backbone.name: detection needs a ResNet of timm, with stages layer1 to layer4, but "
            f"{name} has no such stages; evaluate it with eval.linear"
        )


def build(
    model: nn.Module,
    num_classes: int,
    protocol: Protocol,
    mean: Sequence[float],
    std: Sequence[float],
) -> nn.Module:
    """Build the protocol's detector, whose backbone is `model` itself, not a copy.

    Args:
        model: A timm ResNet without classifier. Its parameters are trained further.
        num_classes: Number of classes without the background.
        protocol: Architecture and sizes.
        mean: Mean of each channel in pretraining, for pixel values from 0 to 1.
        std: Standard deviation of each channel in pretraining.
    """
    before, after, before_in_tests, after_in_tests = protocol.proposals
    settings: dict[str, Any] = {
        "num_classes": None,
        "image_mean": list(mean),
        "image_std": list(std),
        "min_size": tuple(protocol.short_sides),
        "max_size": protocol.max_side,
        "rpn_pre_nms_top_n_train": before,
        "rpn_post_nms_top_n_train": after,
        "rpn_pre_nms_top_n_test": before_in_tests,
        "rpn_post_nms_top_n_test": after_in_tests,
        "box_batch_size_per_image": protocol.regions,
    }
    build_modules = _c4_modules if protocol.architecture == "c4" else _fpn_modules
    settings |= build_modules(model, num_classes + 1, protocol)
    return MaskRCNN(**settings) if protocol.masks else FasterRCNN(**settings)


def _anchor_sizes(protocol: Protocol) -> list[int]:
    """Return the sizes of the anchors in pixels."""
    return [protocol.smallest_anchor * 2**level for level in range(5)]


def _c4_modules(model: nn.Module, num_outputs: int, protocol: Protocol) -> dict[str, Any]:
    """Return the modules of a detector on res4, whose box and mask heads share res5."""
    channels, sizes = stage_channels(model)[3], tuple(_anchor_sizes(protocol))
    # res5 has a batch norm after it, as in MoCo's box head.
    res5 = nn.Sequential(model.get_submodule("layer4"), nn.BatchNorm2d(channels))
    modules: dict[str, Any] = {
        "backbone": Stages(model, num_stages=3, num_outputs=1),
        "rpn_anchor_generator": AnchorGenerator((sizes,), (ASPECT_RATIOS,)),
        "box_roi_pool": MultiScaleRoIAlign(["0"], 14, sampling_ratio=0),
        "box_head": nn.Sequential(res5, nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        "box_predictor": FastRCNNPredictor(channels, num_outputs),
    }
    if protocol.masks:
        modules["mask_predictor"] = MaskRCNNPredictor(channels, 256, num_outputs)
        modules["mask_roi_pool"] = MultiScaleRoIAlign(["0"], 14, sampling_ratio=0)
        modules["mask_head"] = res5
    return modules


def _fpn_modules(model: nn.Module, num_outputs: int, protocol: Protocol) -> dict[str, Any]:
    """Return the modules of a detector on a feature pyramid."""
    channels, ratios = protocol.pyramid_channels, (ASPECT_RATIOS,) * 5
    modules: dict[str, Any] = {"backbone": Pyramid(model, channels)}
    if protocol.convolutions:
        convolutions = [channels] * protocol.convolutions
        modules["box_head"] = FastRCNNConvFCHead(
            (channels, 7, 7), convolutions, [protocol.head_dim], norm_layer=nn.BatchNorm2d
        )
    else:
        modules["box_head"] = TwoMLPHead(channels * 49, protocol.head_dim)
    sizes = tuple((size,) for size in _anchor_sizes(protocol))
    modules["rpn_anchor_generator"] = AnchorGenerator(sizes, ratios)
    modules["box_roi_pool"] = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, sampling_ratio=0)
    modules["box_predictor"] = FastRCNNPredictor(protocol.head_dim, num_outputs)
    if protocol.masks:
        layers = [channels] * 4
        modules["mask_head"] = MaskRCNNHeads(channels, layers, 1, norm_layer=nn.BatchNorm2d)
        modules["mask_predictor"] = MaskRCNNPredictor(channels, channels, num_outputs)
    return modules


def batch_norms(detector: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Return the detector's batch norms."""
    kind = nn.modules.batchnorm._BatchNorm
    return [module for module in detector.modules() if isinstance(module, kind)]


def with_norm(detector: nn.Module, norm: Norm, local_batch_size: int) -> nn.Module:
    """Return the detector with batch norms of this kind, which may change it in place.

    Args:
        detector: The detector.
        norm: "sync" normalizes by the statistics of all ranks, "batch" by those of this rank, and
            "frozen" by those of pretraining. "sync" uses torch's SyncBatchNorm on GPUs and ours on
            CPUs. On one rank it is the same as "batch".
        local_batch_size: Images per step on this rank.
    """
    if norm == "frozen":
        for module in batch_norms(detector):
            module.requires_grad_(False)
    elif norm == "sync" and process_group.world_size() > 1:
        batch_size = local_batch_size * process_group.world_size()
        return batch_norm.convert(detector, local_batch_size, batch_size)
    return detector


def set_training_mode(detector: nn.Module, norm: Norm) -> None:
    """Switch to training mode. Frozen norms stay in evaluation mode."""
    detector.train()
    if norm == "frozen":
        for module in batch_norms(detector):
            module.eval()
