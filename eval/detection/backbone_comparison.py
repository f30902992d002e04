"""Compare the average precision of detectors with a run's backbone and with a random one."""

import copy
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ssl_pretrain import rng
from ssl_pretrain.distributed import process_group
from ssl_pretrain.eval import results
from ssl_pretrain.eval.detection import detectors, metrics, training
from ssl_pretrain.eval.detection.annotations import AnnotatedImages
from ssl_pretrain.eval.detection.published_protocols import Protocol
from ssl_pretrain.eval.runs import Run
from ssl_pretrain.models import backbones


def compare(
    run: Run,
    train: AnnotatedImages,
    test: AnnotatedImages,
    protocol: Protocol,
    inits: list[str],
    seeds: list[int],
) -> dict[str, Any]:
    """Train one detector per initialization and seed, and save their average precision.

    Args:
        run: Run to evaluate. The result is written to eval/detection.json in its folder.
        train: Training images.
        test: Test images.
        protocol: Settings for building, training and evaluating the detectors.
        inits: "random", "pretrained", or both.
        seeds: Seeds of the training batches and of the weights that are not pretrained.

    Returns:
        The content of eval/detection.json.

    Raises:
        ValueError: If the protocol needs masks that the annotations lack, or if training or the
            metric fails.
    """
    start = time.monotonic()
    if protocol.predicts_masks and not all(
        objects.segments or not len(objects) for objects in train.objects
    ):
        raise ValueError(
            f"{train.name}: some boxes have no segmentation, which the protocol's masks need; "
            "choose a protocol without masks"
        )
    rows = [_compare_seeds(run, train, test, protocol, init, seeds) for init in inits]
    return results.save(
        run.path,
        "detection",
        describe_settings(run, train, test, protocol, seeds),
        rows,
        run.provenance(),
        time.monotonic() - start,
        "AP, %",
    )


def _compare_seeds(
    run: Run,
    train: AnnotatedImages,
    test: AnnotatedImages,
    protocol: Protocol,
    init: str,
    seeds: list[int],
) -> results.Row:
    """Return the mean and standard deviation over seeds, with a note on the training loss."""
    outcomes = []
    for seed in seeds:
        label = f"{init} backbone, seed {seed}"
        results.print_progress(f"{label}: {len(train)} training images")
        precision, losses = train_and_test(run, train, test, protocol, init, seed)
        numbers = ", ".join(f"{name} {value:.1f}" for name, value in precision.items())
        results.print_progress(f"{label}: {numbers}")
        outcomes.append((precision, losses))
    first_loss = np.mean([losses[:20] for _, losses in outcomes])
    last_loss = np.mean([losses[-20:] for _, losses in outcomes])
    note = f"loss {first_loss:.2f} in the first 20 steps, {last_loss:.2f} in the last 20"
    precisions = [precision for precision, _ in outcomes]
    return results.Row.over_seeds(init, precisions, {"AP": note})


def train_and_test(
    run: Run,
    train: AnnotatedImages,
    test: AnnotatedImages,
    protocol: Protocol,
    init: str,
    seed: int,
) -> tuple[dict[str, float], list[float]]:
    """Train one detector and return its average precision and its loss at every step."""
    torch.manual_seed(rng.derive_seed(seed, 0, 0))
    model: Any = copy.deepcopy(run.backbone)
    if init == "random":
        model = backbones.build(replace(run.config.backbone, init="random"), run.view_size)
        # Both detectors start from the same new layers.
        torch.manual_seed(rng.derive_seed(seed, 0, 0))
    views, num_classes = run.config.views, len(train.classes)
    detector = detectors.build(model.model, num_classes, protocol, views.mean, views.std)
    local_batch_size = protocol.global_batch_size // process_group.world_size()
    detector = detectors.convert_norms(detector.to(run.device), protocol.norm, local_batch_size)
    num_workers = run.config.data.num_workers
    losses = training.train(detector, train, protocol, seed, run.device, num_workers)
    detections, sizes = training.detect(detector, test, run.device)
    return metrics.average_precision(
        protocol.metric, test.objects, detections, test.classes, sizes
    ), losses


def describe_settings(
    run: Run,
    train: AnnotatedImages,
    test: AnnotatedImages,
    protocol: Protocol,
    seeds: list[int],
) -> dict[str, str]:
    """Describe the settings that affect the results, by topic."""
    detector_name = "Mask R-CNN" if protocol.predicts_masks else "Faster R-CNN"
    drop_steps = " and ".join(
        str(round(drop * protocol.num_steps)) for drop in protocol.lr_drop_fractions
    )
    end_sides = dict.fromkeys((protocol.short_sides[0], protocol.short_sides[-1]))
    sides = " to ".join(map(str, end_sides))
    spread_note = "; ± is the standard deviation over seeds" if len(seeds) > 1 else ""
    return {
        "network": f"{run.network} of {run.checkpoint_path.name}, {run.config.backbone.name}, "
        "fine-tuned; the random backbone is initialized from the seed",
        "detector": f"torchvision's {detector_name}, {protocol.architecture.upper()}, "
        f"batch norm: {protocol.norm}, recalibrated on {protocol.num_precise_bn_batches} batches; "
        "RoI align without Detectron2's half-pixel offset",
        "training": f"{protocol.num_steps} steps of {protocol.global_batch_size} images, SGD, "
        f"learning rate {protocol.lr:g}, divided by 10 at steps {drop_steps}, "
        f"{protocol.warmup_steps} warm-up steps, short side {sides} pixels, horizontal flips",
        "images": f"{train.name}: {len(train)} training; {test.name}: {len(test)} test; "
        f"classes: {', '.join(train.classes)}",
        "metric": f"{protocol.metric}; AP: mean over overlaps 0.5 to 0.95; "
        "boxes marked as difficult or crowd do not count",
        "seeds": f"{', '.join(map(str, seeds))}{spread_note}",
    }
