"""Describe a segmentation in words, as the entries of the protocol that its result saves."""

from collections.abc import Sequence

from ssl_pretrain.eval.dense import confusion, patch_segmentation, segmenter_training, segmenters
from ssl_pretrain.eval.dense.masked_images import MaskedImages
from ssl_pretrain.eval.dense.patch_segmentation import PatchGrid
from ssl_pretrain.eval.dense.segmentation_protocols import PatchProtocol, TrainingProtocol
from ssl_pretrain.eval.detection import detectors
from ssl_pretrain.eval.runs import Run


def describe(
    run: Run, splits: tuple[MaskedImages, MaskedImages], seeds: Sequence[int]
) -> dict[str, str]:
    """Return the entries of the saved protocol that all segmentations share."""
    train, test = splits
    spread = "; ± is the standard deviation over seeds" if len(seeds) > 1 else ""
    return {
        "network": f"{run.network} of {run.checkpoint_path.name}, {run.config.backbone.name}; the "
        "random backbone is initialized from the seed",
        "precision": run.describe_precision(),
        "images": f"{train.name}: {len(train)} training; {test.name}: {len(test)} test; "
        f"{len(train.classes)} classes: {', '.join(train.classes)}",
        "metric": f"intersection over union by torchmetrics, over the pixels of all test images "
        f"that are not void; mIoU: {confusion.ABSENT_RULE}",
        "seeds": f"{', '.join(map(str, seeds))}{spread}",
    }


def describe_patches(protocol: PatchProtocol, grid: PatchGrid, run: Run) -> dict[str, str]:
    """Describe a classifier of frozen patches, as entries of the saved protocol."""
    side = grid.resolution
    classifier = (
        "k-NN, neighbors vote for each pixel of a patch"
        if protocol.classifier == "knn"
        else f"logistic regression by scikit-learn, at most {protocol.max_iterations} iterations"
    )
    size = "the size of the mask" if protocol.scores_masks_as_stored else f"{side} x {side} pixels"
    return {
        "source": protocol.source,
        "feature": f"{grid.rows} x {grid.columns} patch tokens of the last layer, frozen and "
        "standardized over the training patches",
        "transform": f"images to {side} x {side}, bicubic; masks to the nearest pixel",
        "classifier": f"{classifier}; scored at {size}",
        "selection": f"{'; '.join(s.name for s in patch_segmentation.settings(protocol))}: by mIoU "
        "on a tenth of the training images, then fitted to all of them",
    }


def describe_training(run: Run, protocol: TrainingProtocol, num_images: int) -> dict[str, str]:
    """Describe the training of a network, as entries of the saved protocol."""
    num_steps = segmenter_training.count_steps(protocol, num_images)
    heads = {
        "fcn": "torchvision's FCNHead",
        "deeplabv3": "torchvision's DeepLabHead",
        "moco_fcn": "MoCo's two dilated convolutions",
        "bn_linear": "batch norm and a linear layer",
    }
    head = heads[protocol.head]
    if protocol.aux_weight and detectors.is_resnet(run.backbone.model):  # type: ignore[arg-type]
        head += f", FCNHead on layer3 with weight {protocol.aux_weight:g}"
    if protocol.is_frozen:
        body = "frozen"
    elif segmenters.is_dilated(run, protocol):
        body = f"fine-tuned, dilated to a stride of {protocol.output_stride}"
    else:
        body = "fine-tuned"
    schedule = (
        "divided by 10 after 70 % and 90 % of the steps"
        if protocol.schedule == "drops"
        else f"falling to 0 with power {protocol.power:g}"
    )
    base = f"short side {protocol.base_size}" if protocol.base_size else "own size"
    test = f"short side {protocol.test_size}" if protocol.test_size else "own size"
    low, high = protocol.scales
    side, stride = protocol.window
    return {
        "source": protocol.source,
        "model": f"{body}; {head}",
        "training": f"{num_steps} steps of {protocol.batch_size} images, "
        f"{protocol.optimizer.upper()}, learning rate {protocol.lr:g}, {schedule}, "
        f"{protocol.warmup_steps} warm-up steps, weight decay {protocol.weight_decay:g}",
        "views": f"{base} times {low:g} to {high:g}, crops of {protocol.crop_size}, flips"
        + (", photometric distortion" if protocol.is_distorted else ""),
        "test": f"{test}, {f'windows of {side}, stride {stride}' if side else 'whole images'}, "
        f"scored at {'that size' if protocol.scores_resized_masks else 'the size of the mask'}",
    }
