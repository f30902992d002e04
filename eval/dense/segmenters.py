"""Build torchvision's FCN or DeepLabV3, MoCo's FCN or DINOv2's linear head on a backbone."""

from collections import OrderedDict
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.segmentation.deeplabv3 import DeepLabHead, DeepLabV3
from torchvision.models.segmentation.fcn import FCN, FCNHead

from ssl_pretrain import rng
from ssl_pretrain.eval.dense.segmentation_protocols import TrainingProtocol
from ssl_pretrain.eval.detection.detectors import ResNetStages, is_resnet, stage_channels
from ssl_pretrain.eval.runs import Run
from ssl_pretrain.models import backbones

MOCO_CHANNELS, MOCO_DILATION = 256, 6


class DilatedResNet(nn.Module):
    """The stages of a ResNet as torchvision's segmentation models take them.

    Args:
        resnet: A timm ResNet without a classifier.
    """

    def __init__(self, resnet: nn.Module):
        super().__init__()
        self.stages = ResNetStages(resnet, 4, 2)
        self.aux_channels, self.out_channels = stage_channels(resnet)[-2:]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the outputs of layer4 as "out" and of layer3 as "aux"."""
        third, fourth = self.stages(images).values()
        return OrderedDict(out=fourth, aux=third)


class TokenMap(nn.Module):
    """The last patch tokens or feature map of any backbone, as a map.

    Images are padded on all sides to whole patches, as in DINOv2's evaluation.

    Args:
        backbone: A `Backbone` with tokens.
        is_frozen: Compute the tokens without a gradient.
    """

    def __init__(self, backbone: nn.Module, is_frozen: bool):
        super().__init__()
        network: Any = backbone
        self.backbone, self.is_frozen = backbone, is_frozen
        self.patch_size, self.out_channels = int(network.patch_size), int(network.token_dim)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the map as "out", (B, dim, rows, columns)."""
        network: Any = self.backbone
        sides = images.shape[-2:]
        height, width = (-(-side // self.patch_size) for side in sides)
        rows, columns = (-side % self.patch_size for side in sides)  # missing pixels
        padding = [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2]
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.is_frozen):
            patches = network.tokens(F.pad(images, padding)).patches
        return {"out": patches.transpose(1, 2).unflatten(2, (height, width))}


class ImageDropout(nn.Module):
    """Dropout whose choices depend on the step and on the image's slot in the global batch.

    They do not depend on the number of ranks.

    Args:
        probability: Probability that a number becomes 0.
    """

    def __init__(self, probability: float):
        super().__init__()
        self.probability = probability
        self.seed, self.step = 0, 0
        self.slots: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        """Drop numbers of x, (B, ...), in training mode."""
        if not self.training or not self.probability:
            return x
        masks = [self._draw(slot, x) for slot in self.slots]
        return x * torch.stack(masks).to(x) / (1 - self.probability)

    def _draw(self, slot: int, x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(rng.derive_seed(self.seed, self.step, slot))
        return torch.rand(x.shape[1:], generator=generator) >= self.probability


def moco_head(in_channels: int, num_classes: int) -> nn.Sequential:
    """Build MoCo's FCN head: two dilated 3x3 convolutions of 256 channels, and a classifier."""
    layers: list[nn.Module] = []
    for channels in (in_channels, MOCO_CHANNELS):
        layers += [
            nn.Conv2d(
                channels,
                MOCO_CHANNELS,
                3,
                padding=MOCO_DILATION,
                dilation=MOCO_DILATION,
                bias=False,
            ),
            nn.BatchNorm2d(MOCO_CHANNELS),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.Conv2d(MOCO_CHANNELS, num_classes, 1))


def linear_head(in_channels: int, num_classes: int) -> nn.Sequential:
    """Build DINOv2's head: batch norm and a 1x1 convolution, whose weights start with std 0.01."""
    classifier = nn.Conv2d(in_channels, num_classes, 1)
    nn.init.normal_(classifier.weight, std=0.01)
    nn.init.zeros_(classifier.bias)  # type: ignore[arg-type]
    return nn.Sequential(nn.BatchNorm2d(in_channels), classifier)


def check_tokens(run: Run) -> None:
    """Raise ValueError unless the backbone has patch tokens or a feature map."""
    backbone: Any = run.backbone
    if problem := backbone.find_token_problem():
        raise ValueError(f"segmentation: {problem}; choose a network with patches or a map")


def build(
    run: Run, num_classes: int, protocol: TrainingProtocol, init: str, seed: int
) -> FCN | DeepLabV3:
    """Build the protocol's network, with the run's weights or random ones.

    The new layers have the same weights for both.

    Args:
        run: Run to evaluate.
        num_classes: Number of classes.
        protocol: Head and dilation.
        init: "pretrained" or "random".
        seed: Seed of the random weights.

    Raises:
        ValueError: If the backbone cannot be dilated.
    """
    backbone = _build_backbone(run, protocol, init, seed)
    torch.manual_seed(rng.derive_seed(seed, 0, 1))
    if protocol.is_frozen:
        backbone.requires_grad_(False)
    if is_resnet(backbone.model) and not protocol.is_frozen:
        body: DilatedResNet | TokenMap = DilatedResNet(backbone.model)
    else:
        body = TokenMap(backbone, protocol.is_frozen)
    heads = {
        "fcn": FCNHead,
        "deeplabv3": DeepLabHead,
        "moco_fcn": moco_head,
        "bn_linear": linear_head,
    }
    head = heads[protocol.head](body.out_channels, num_classes)
    aux = None
    if protocol.aux_weight and isinstance(body, DilatedResNet):
        aux = FCNHead(body.aux_channels, num_classes)
    network = (DeepLabV3 if protocol.head == "deeplabv3" else FCN)(body, head, aux)
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Dropout) and not name.startswith("backbone."):
            network.set_submodule(name, ImageDropout(module.p))
    return network


def _build_backbone(run: Run, protocol: TrainingProtocol, init: str, seed: int) -> Any:
    """Return the backbone, dilated if it is a ResNet and the protocol says so."""
    source: Any = run.backbone
    config = replace(run.config.backbone, init="random", init_key="", init_prefix="")
    if is_dilated(run, protocol):
        config = replace(config, args={**config.args, "output_stride": protocol.output_stride})
    torch.manual_seed(rng.derive_seed(seed, 0, 0))
    backbone: Any = backbones.build(config, run.view_size)
    if init == "pretrained":
        # A dilated network has the same weights.
        origin = f"{run.checkpoint_path}, for segmentation"
        backbones.load_strict(backbone, source.state_dict(), origin, exact=True)
    if is_dilated(run, protocol) and protocol.dilates_first_block:
        _dilate_first_block(backbone.model, protocol.output_stride)
    return backbone


def is_dilated(run: Run, protocol: TrainingProtocol) -> bool:
    """Return True if the protocol dilates the run's backbone."""
    backbone: Any = run.backbone
    return bool(protocol.output_stride) and is_resnet(backbone.model)


def _dilate_first_block(resnet: Any, output_stride: int) -> None:
    """Give the 3x3 convolutions of all blocks of layer4 the same dilation.

    timm gives the first block that of layer3.
    """
    for block in resnet.layer4:
        for module in block.modules():
            if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
                module.dilation = module.padding = (32 // output_stride,) * 2
