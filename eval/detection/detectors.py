"""A pretrained ResNet under torchvision's Faster and Mask R-CNN: over a feature pyramid (FPN), or on its fourth stage (C4)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.faster_rcnn import (
    FastRCNNConvFCHead,
    FastRCNNPredictor,
    TwoMLPHead,
)
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from ssl_pretrain.distributed import process_group
from ssl_pretrain.parallel import batch_norm

Architecture = Literal["fpn", "c4"]
Norm = Literal["sync", "batch", "frozen"]
RATIOS = (0.5, 1.0, 2.0)


class Stages(nn.Module):
    """The stem and the stages of a timm ResNet: images to {"0": res2, "1": res3, ...}, `count` of them."""

    def __init__(self, model: nn.Module, count: int):
        super().__init__()
        self.stem = nn.Sequential(
            OrderedDict(
                (name, getattr(model, name)) for name in ("conv1", "bn1", "act1", "maxpool")
            )
        )
        self.layers = nn.ModuleList(
            getattr(model, f"layer{number}") for number in range(1, count + 1)
        )

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        maps, x = OrderedDict(), self.stem(images)
        for number, layer in enumerate(self.layers):
            x = layer(x)
            maps[str(number)] = x
        return maps


class Pyramid(nn.Module):
    """Stages res2 to res5 under a feature pyramid of `out_channels`, with a fifth level by pooling."""

    def __init__(self, model: nn.Module, out_channels: int):
        super().__init__()
        self.stages, self.out_channels = Stages(model, 4), out_channels
        self.pyramid = FeaturePyramidNetwork(
            channels(model),
            out_channels,
            extra_blocks=LastLevelMaxPool(),
            norm_layer=nn.BatchNorm2d,
        )

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        return self.pyramid(self.stages(images))


class FourthStage(nn.Module):
    """res4 alone, as the one map that regions are proposed on and cut from."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.stages, self.out_channels = Stages(model, 3), channels(model)[2]

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        return OrderedDict([("0", self.stages(images)["2"])])


class FifthStage(nn.Module):
    """res5 on each region, and a batch norm after it (MoCo's ROI head with an extra norm)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.layer, self.norm = model.get_submodule("layer4"), nn.BatchNorm2d(channels(model)[3])

    def forward(self, regions: Tensor) -> Tensor:
        return self.norm(self.layer(regions))


class Pooled(nn.Module):
    """The mean over a region's places: (regions, channels)."""

    def __init__(self, stage: nn.Module):
        super().__init__()
        self.stage = stage

    def forward(self, regions: Tensor) -> Tensor:
        return self.stage(regions).mean(dim=(2, 3))


def channels(model: nn.Module) -> list[int]:
    """Of res2 to res5."""
    return [info["num_chs"] for info in model.feature_info[-4:]]  # type: ignore[index]


def check(model: nn.Module, name: str) -> None:
    """Raises ValueError for a network that is not a ResNet of timm."""
    if not all(
        hasattr(model, part)
        for part in ("conv1", "bn1", "act1", "maxpool", "layer1", "layer4", "feature_info")
    ):
        raise ValueError(
            f"backbone.name: detection needs a ResNet of timm, with stages layer1 to layer4, and {name} has none; judge it by eval.linear"
        )


def build(
    model: nn.Module,
    num_classes: int,
    architecture: Architecture,
    *,
    masks: bool = False,
    mean: Sequence[float],
    std: Sequence[float],
    short_sides: Sequence[int],
    max_side: int,
    smallest_anchor: int = 32,
    pyramid_channels: int = 256,
    head_dim: int = 1024,
    convolutions: int = 0,
    proposals: Sequence[int] = (2000, 2000, 1000, 1000),
    regions: int = 512,
) -> nn.Module:
    """Faster R-CNN, or Mask R-CNN with `masks`, whose backbone is `model` itself: torchvision's interface.

    Args:
        model: a timm ResNet without classifier; its parameters are trained further.
        num_classes: without the background.
        short_sides: in training one of them is drawn for each image; in evaluation the last one.
        smallest_anchor: in pixels; the others double it.
        head_dim: of the FPN's box head, two layers wide; with `convolutions`, so many and one layer.
        proposals: kept before and after non-maximum suppression in training, and before and after it in evaluation.
        regions: drawn of an image's proposals to train the heads on.
    """
    sizes = [smallest_anchor * 2**level for level in range(5)]
    settings: dict[str, Any] = {
        "num_classes": None, "image_mean": list(mean), "image_std": list(std), "min_size": tuple(short_sides), "max_size": max_side,
        "rpn_pre_nms_top_n_train": proposals[0], "rpn_post_nms_top_n_train": proposals[1], "rpn_pre_nms_top_n_test": proposals[2],
        "rpn_post_nms_top_n_test": proposals[3], "box_batch_size_per_image": regions,
    }  # fmt: skip
    kind = MaskRCNN if masks else FasterRCNN
    if architecture == "c4":
        head = FifthStage(model)
        settings |= {
            "backbone": FourthStage(model),
            "rpn_anchor_generator": AnchorGenerator((tuple(sizes),), (RATIOS,)),
            "box_roi_pool": MultiScaleRoIAlign(["0"], 14, sampling_ratio=0),
            "box_head": Pooled(head),
            "box_predictor": FastRCNNPredictor(channels(model)[3], num_classes + 1),
        }
        if masks:
            predictor = MaskRCNNPredictor(channels(model)[3], 256, num_classes + 1)
            settings |= {
                "mask_roi_pool": MultiScaleRoIAlign(["0"], 14, sampling_ratio=0),
                "mask_head": head,
                "mask_predictor": predictor,
            }
        return kind(**settings)
    backbone = Pyramid(model, pyramid_channels)
    if convolutions:
        box_head: nn.Module = FastRCNNConvFCHead(
            (pyramid_channels, 7, 7),
            [pyramid_channels] * convolutions,
            [head_dim],
            norm_layer=nn.BatchNorm2d,
        )
    else:
        box_head = TwoMLPHead(pyramid_channels * 49, head_dim)
    settings |= {
        "backbone": backbone,
        "rpn_anchor_generator": AnchorGenerator(tuple((size,) for size in sizes), (RATIOS,) * 5),
        "box_roi_pool": MultiScaleRoIAlign(["0", "1", "2", "3"], 7, sampling_ratio=0),
        "box_head": box_head,
        "box_predictor": FastRCNNPredictor(head_dim, num_classes + 1),
    }
    if masks:
        settings |= {
            "mask_head": MaskRCNNHeads(
                pyramid_channels, [pyramid_channels] * 4, 1, norm_layer=nn.BatchNorm2d
            ),
            "mask_predictor": MaskRCNNPredictor(
                pyramid_channels, pyramid_channels, num_classes + 1
            ),
        }
    return kind(**settings)


def with_norm(detector: nn.Module, norm: Norm, local_images: int) -> nn.Module:
    """Its batch norms as asked: statistics over all ranks (sync), over this rank's batch, or frozen as they are.

    sync is torch's SyncBatchNorm on GPUs and ours on CPU ranks; on one rank it is batch norm.
    """
    if norm == "frozen":
        for module in detector.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.requires_grad_(False)
    elif norm == "sync" and process_group.world_size() > 1:
        return batch_norm.convert(detector, local_images, local_images * process_group.world_size())
    return detector


def train_mode(detector: nn.Module, norm: Norm) -> None:
    """Training mode; with frozen norms, those stay in evaluation."""
    detector.train()
    for module in detector.modules():
        if norm == "frozen" and isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
