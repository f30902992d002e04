"""Map the convolutional networks ResNet, ConvNeXt and ConvNeXt V2 of timm to transformers.

The weights get the names that published checkpoints have.
"""

from typing import Any

from timm.models import convnext, resnet
from torch import Tensor, nn

from ssl_pretrain.eval.exporting.transformers_mapping import (
    MappedNetwork,
    activation_name,
    is_exactly,
)

KINDS = (resnet.Bottleneck, resnet.BasicBlock)
POOLED = "outputs.pooler_output.flatten(1)"
NORM_EPS = 1e-6  # transformers' ConvNeXt has it in all inner norms, where it cannot be set
BATCH_NORM_EPS = 1e-5  # transformers' ResNet has it in all norms


def find_resnet_problem(model: Any) -> str:
    """Return what transformers' ResNet does not have of a ResNet, or an empty string."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if not _has_plain_stem(model):
        return "has another stem than a 7x7 convolution of stride 2 and max-pooling"
    if not norms or any(norm.eps != BATCH_NORM_EPS for norm in norms):
        return "has another normalization than batch norm with epsilon 1e-5"
    if model.global_pool.pool_type != "avg":
        return "pools by another operation than the mean"
    kind = type(model.layer1[0])
    for number, stage in enumerate(_resnet_stages(model)):
        for index, block in enumerate(stage):
            stride = 2 if number and not index else 1
            if problem := _find_resnet_block_problem(block, kind, (stride, stride)):
                return problem
    return ""


def _has_plain_stem(model: Any) -> bool:
    stem, pool = model.conv1, model.maxpool
    return (
        isinstance(stem, nn.Conv2d)
        and (stem.kernel_size, stem.stride, stem.padding) == ((7, 7), (2, 2), (3, 3))
        and stem.bias is None
        and isinstance(pool, nn.MaxPool2d)
        and (pool.kernel_size, pool.stride, pool.padding) == (3, 2, 1)
        and isinstance(model.act1, nn.ReLU)
    )


def _find_resnet_block_problem(block: Any, kind: type, stride: tuple[int, int]) -> str:
    is_bottleneck = kind is resnet.Bottleneck
    if not is_exactly(block, kind) or kind not in KINDS:
        return "has blocks of another kind"
    if block.se is not None or not isinstance(block.aa, nn.Identity):
        return "has blocks of another kind"
    if not isinstance(block.act1, nn.ReLU):
        return f"has the activation {type(block.act1).__name__}"
    strided = block.conv2 if is_bottleneck else block.conv1
    if strided.stride != stride or block.conv2.dilation != (1, 1):
        return "has dilated convolutions or other strides"
    is_wide = is_bottleneck and 4 * block.conv2.out_channels != block.conv3.out_channels
    if is_wide or block.conv2.groups != 1:
        return "has grouped or wide convolutions"
    if block.downsample is not None:
        is_plain = len(block.downsample) == 2 and isinstance(block.downsample[0], nn.Conv2d)
        if not is_plain or block.downsample[0].kernel_size != (1, 1):
            return "has shortcuts of another kind than a 1x1 convolution"
    return ""


def map_resnet(model: Any) -> MappedNetwork:
    """Return transformers' ResNet with the weights of a ResNet of timm."""
    weights = _conv_and_norm("embedder.embedder", model.conv1, model.bn1)
    stages = _resnet_stages(model)
    is_bottleneck = is_exactly(stages[0][0], resnet.Bottleneck)
    for number, stage in enumerate(stages):
        for index, block in enumerate(stage):
            name = f"encoder.stages.{number}.layers.{index}"
            for layer in range(3 if is_bottleneck else 2):
                convolution = getattr(block, f"conv{layer + 1}")
                norm = getattr(block, f"bn{layer + 1}")
                weights |= _conv_and_norm(f"{name}.layer.{layer}", convolution, norm)
            if block.downsample is not None:
                weights |= _conv_and_norm(f"{name}.shortcut", *block.downsample)
    last_norms = [getattr(stage[-1], "bn3" if is_bottleneck else "bn2") for stage in stages]
    config = {
        "num_channels": model.conv1.in_channels,
        "embedding_size": model.conv1.out_channels,
        "hidden_sizes": [norm.num_features for norm in last_norms],
        "depths": [len(stage) for stage in stages],
        "layer_type": "bottleneck" if is_bottleneck else "basic",
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,
    }
    return MappedNetwork("resnet", "ResNetModel", config, weights, POOLED)


def find_convnext_problem(model: Any) -> str:
    """Return what transformers' ConvNeXt does not have of a ConvNeXt, or an empty string."""
    stem = model.stem
    blocks = [block for stage in model.stages for block in stage.blocks]
    norms = [stem[-1], *(block.norm for block in blocks)]
    norms += [stage.downsample[0] for stage in model.stages[1:]]
    problems = {
        "has an overlapping stem": len(stem) != 2 or stem[0].kernel_size != stem[0].stride,
        "has convolutions without a bias": stem[0].bias is None,
        "normalizes before pooling": not isinstance(model.norm_pre, nn.Identity),
        "has a hidden layer in its head": _has_hidden_layer(model.head),
        "pools by another operation than the mean": model.head.global_pool.pool_type != "avg",
        "has another downsampling than a 2x2 convolution between stages": any(
            not isinstance(stage.downsample, nn.Identity)
            if number == 0
            else stage.downsample[1].kernel_size != (2, 2)
            for number, stage in enumerate(model.stages)
        ),
        "has kernels of another size than 7": any(
            block.conv_dw.kernel_size != (7, 7) or block.conv_dw.dilation != (1, 1)
            for block in blocks
        ),
        "has another norm than layer norm with epsilon 1e-6": any(
            not isinstance(norm, nn.LayerNorm) or norm.eps != NORM_EPS for norm in norms
        ),
        "has both layer scale and response normalization, or neither": any(
            (block.gamma is None) != _has_response_norm(block) for block in blocks
        ),
        f"has the activation {type(blocks[0].mlp.act).__name__}": (
            not activation_name(blocks[0].mlp.act)
        ),
    }
    return next((problem for problem, applies in problems.items() if applies), "")


def _has_hidden_layer(head: Any) -> bool:
    layer = getattr(head, "pre_logits", None)  # missing if the norm is before pooling
    return layer is not None and not isinstance(layer, nn.Identity)


def map_convnext(model: Any) -> MappedNetwork:
    """Return transformers' ConvNeXt with the weights of a ConvNeXt of timm."""
    weights = _named("embeddings.patch_embeddings", model.stem[0])
    weights |= _named("embeddings.layernorm", model.stem[1])
    for number, stage in enumerate(model.stages):
        name = f"encoder.stages.{number}"
        if number:
            for index in (0, 1):
                weights |= _named(f"{name}.downsampling_layer.{index}", stage.downsample[index])
        for index, block in enumerate(stage.blocks):
            weights |= _convnext_layer(f"{name}.layers.{index}", block)
    weights |= _named("layernorm", model.head.norm)
    has_response_norm = _has_response_norm(model.stages[0].blocks[0])
    config = {
        "num_channels": model.stem[0].in_channels,
        "patch_size": model.stem[0].stride[0],
        "hidden_sizes": [stage.blocks[-1].conv_dw.out_channels for stage in model.stages],
        "depths": [len(stage.blocks) for stage in model.stages],
        "hidden_act": activation_name(model.stages[0].blocks[0].mlp.act),
        "layer_norm_eps": model.head.norm.eps,
        "drop_path_rate": 0.0,
    }
    if has_response_norm:
        return MappedNetwork("convnextv2", "ConvNextV2Model", config, weights, POOLED)
    return MappedNetwork("convnext", "ConvNextModel", config, weights, POOLED)


def _convnext_layer(name: str, block: Any) -> dict[str, Tensor]:
    weights = _named(f"{name}.dwconv", block.conv_dw) | _named(f"{name}.layernorm", block.norm)
    for number in (1, 2):
        layer = getattr(block.mlp, f"fc{number}")
        # A 1x1 convolution of timm is a linear layer in transformers.
        weights[f"{name}.pwconv{number}.weight"] = layer.weight.flatten(1)
        weights[f"{name}.pwconv{number}.bias"] = layer.bias
    if _has_response_norm(block):
        for key, value in block.mlp.grn.state_dict().items():
            weights[f"{name}.grn.{key}"] = value.reshape(1, 1, 1, -1)
    else:
        weights[f"{name}.layer_scale_parameter"] = block.gamma
    return weights


def _has_response_norm(block: Any) -> bool:
    return hasattr(block.mlp, "grn")


def _resnet_stages(model: Any) -> list[list[Any]]:
    return [list(model.get_submodule(f"layer{number}")) for number in range(1, 5)]


def _conv_and_norm(name: str, convolution: nn.Module, norm: nn.Module) -> dict[str, Tensor]:
    return _named(f"{name}.convolution", convolution) | _named(f"{name}.normalization", norm)


def _named(name: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{name}.{key}": value for key, value in module.state_dict().items()}


def find_convnet_problem(model: nn.Module) -> str:
    """Return what transformers does not have of a convolutional network, or an empty string."""
    if is_exactly(model, resnet.ResNet):
        return find_resnet_problem(model)
    if is_exactly(model, convnext.ConvNeXt):
        return find_convnext_problem(model)
    return f"has no {type(model).__name__} with these weights"


def map_convnet(model: nn.Module) -> MappedNetwork:
    """Return the network of transformers that computes the features of a ResNet or ConvNeXt."""
    return map_resnet(model) if is_exactly(model, resnet.ResNet) else map_convnext(model)
