"""Measure one training step on a GPU and print the result as one line of JSON.

    python tests/gpu/steps.py simclr_resnet50 [--compile]

Speed has one definition. A view counts once per image of the student's input. The teacher's forward
passes are not counted. Color and the copy of the uint8 crops from pinned memory are included. There
is no loader. Beside it stands the time of a bare loop: the same network on ready views, with
forward, backward and fused SGD, compiled if ours is. lightly's step of the same network is timed
where lightly has one. All are interleaved. The line also has the largest batch that fits, the share
of color, loss and optimizer, and the fractions of the roofline and of 790 TFLOP/s. tests/gpu/run.py
runs all steps. `--tiny` uses small
networks on any device, to check this script.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "bench")]
import peers
from measure import time_interleaved, versions

from ssl_pretrain import config, methods
from ssl_pretrain.build import build_method
from ssl_pretrain.config import RunConfig
from ssl_pretrain.distributed import cuda_settings
from ssl_pretrain.optim import optimizers as optim
from ssl_pretrain.optim.schedules import Progress
from ssl_pretrain.parallel import wrap as parallel
from ssl_pretrain.parallel.execution import Execution
from ssl_pretrain.planning import hardware
from ssl_pretrain.planning.communication import Cluster
from ssl_pretrain.planning.estimate import Estimate
from ssl_pretrain.step import Stepper, build_stepper
from ssl_pretrain.views import color, recipe
from ssl_pretrain.views.batch import Batch
from ssl_pretrain.views.color_parameters import draw_colors

HALFWAY = Progress(50_000, 100_000, 1_000)

PEAK_FLOPS = 790e12  # FLOP/s of bfloat16 matrix products on an H100 or H200
ADAMW = ["backbone.args={}", "optim.name=adamw", "optim.base_lr=1e-3"]
CONFIGS = {  # name -> YAML, overrides
    "simclr_resnet50": ("simclr_imagenet", []),
    "swav_resnet50_multicrop": ("swav_imagenet", []),
    "moco_v3_vit_small": ("moco_v3_vit_imagenet", []),
    "moco_v3_vit_base": ("moco_v3_vit_imagenet", ["backbone.name=vit_base_patch16_224"]),
    "dino_vit_small": ("dino_imagenet", []),
    "dino_vit_base": ("dino_imagenet", ["backbone.name=vit_base_patch16_224"]),
    "barlow_twins_vit_small": (
        "barlow_twins_imagenet",
        ["backbone.name=vit_small_patch16_224", *ADAMW],
    ),
    "vit_large_simclr": ("simclr_imagenet", ["backbone.name=vit_large_patch16_224", *ADAMW]),
}
# Published batch sizes, by step. The other steps use the largest batch that fits.
PUBLISHED_BATCHES = {"barlow_twins_vit_small": 256, "vit_large_simclr": 384}
BATCH_SIZES = (1024, 768, 512, 384, 256, 192, 128, 96, 64, 32, 16)


def load_run(name: str, tiny: bool, compiled: bool) -> RunConfig:
    """Return the configuration of a step. `tiny` means a small network and smaller views."""
    stem, overrides = CONFIGS[name]
    overrides = [
        *overrides,
        "launch.gpus_per_node=0",
        f"parallel.compile={str(compiled).lower()}",
        "parallel.activation_checkpointing=none",  # which the bare loops do not have either
    ]
    run = config.load(ROOT / "configs" / f"{stem}.yaml", overrides)
    if tiny:
        small = methods.find(run.method.name)
        backbone = replace(run.backbone, name="test_resnet", args={}, drop_path=0.0)
        run = replace(run, method=small.Config(**small.SMALL_CONFIG), backbone=backbone)
        for crop in run.views.crops.values():
            crop.size //= 4
    return run


def random_crops(run: RunConfig, images: int) -> list[torch.Tensor]:
    """Return uint8 crops of random pixels in pinned host memory, one tensor per view."""
    generator = np.random.default_rng(0)
    crops = [
        torch.from_numpy(
            generator.integers(0, 256, (images, 3, crop.size, crop.size), dtype=np.uint8)
        )
        for crop in recipe.crop_per_view(run.views)
    ]
    return [crop.pin_memory() for crop in crops] if torch.cuda.is_available() else crops


def augment_colors(
    run: RunConfig, crops: list[torch.Tensor], epoch: int, device: torch.device
) -> list[torch.Tensor]:
    """Upload the crops and apply random colors, as the loader does in every step."""
    indices, views = np.arange(len(crops[0])), []
    dtype = Execution.resolve(run.parallel, device).view_dtype
    for crop in run.views.crops.values():
        positions = range(len(views), len(views) + crop.count)
        parameters = [draw_colors(crop, 0, epoch, indices, position) for position in positions]
        pixels = [crops[position].to(device, non_blocking=True) for position in positions]
        mean, std = run.views.mean, run.views.std
        views += color.apply_to_group(pixels, parameters, crop, mean, std, dtype)
    return views


def build_batch(run: RunConfig, views: list[torch.Tensor], device: torch.device) -> Batch:
    indices = torch.arange(len(views[0]), device=device)
    return Batch(views, indices % 10, indices)


def build_benchmark_stepper(
    run: RunConfig, images: int, device: torch.device
) -> tuple[Stepper, Batch]:
    run = replace(
        run, global_batch_size=images, parallel=replace(run.parallel, bn_group_images="global")
    )
    execution = Execution.resolve(run.parallel, device)
    views = [
        torch.randn(images, 3, crop.size, crop.size, device=device).to(execution.view_dtype)
        for crop in recipe.crop_per_view(run.views)
    ]
    method, batch = build_method(run), build_batch(run, execution.place_views(views), device)
    stepper = build_stepper(
        method,
        run.parallel,
        run.optim,
        execution,
        micro_batch_size=images,
        global_batch_size=images,
        example=batch,
    )
    optim.set_rates(stepper.optimizer, run.optim, HALFWAY, run.epochs, images)
    return stepper, batch


def find_largest_batch(
    run: RunConfig, device: torch.device, sizes: tuple[int, ...]
) -> tuple[int, Stepper, Batch]:
    """Return the first batch size at which two steps fit in memory, with its stepper and batch.

    Args:
        run: The configuration.
        device: A GPU.
        sizes: Batch sizes to try, the largest first.

    Raises:
        RuntimeError: If not even the smallest size fits.
    """
    for images in sizes:
        try:
            stepper, batch = build_benchmark_stepper(run, images, device)
            for _ in range(2):
                stepper(HALFWAY, batch)
            return images, stepper, batch
        except torch.OutOfMemoryError:
            stepper = batch = None  # type: ignore[assignment]
            torch.cuda.empty_cache()
    raise RuntimeError(f"not even {sizes[-1]} images fit")


def build_backbone_step(stepper: Stepper, batch: Batch) -> Callable[[], object]:
    """Build a step without loss or optimizer. The gradient of every embedding is 1."""
    method: Any = parallel.unwrap(stepper.model)

    def take_step() -> None:
        stepper.optimizer.zero_grad(set_to_none=True)
        with stepper.execution.forward_context():
            embeddings = stepper.model(batch)
            method.targets(batch)
        outputs = [z for z in embeddings.values() if z.requires_grad]
        torch.autograd.backward(outputs, [torch.ones_like(z) for z in outputs])

    return take_step


def build_bare_step(stepper: Stepper, batch: Batch, views: int) -> Callable[[], object]:
    """Build a step of forward, backward and fused SGD of the backbone, on the student's views.

    The backbone is the stepper's, with its compiled blocks if they are compiled. Views of one size
    go through together.
    """
    method: Any = parallel.unwrap(stepper.model)
    backbone = method.backbone
    parameters = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.0, fused=stepper.execution.device.type == "cuda")
    sizes = sorted({view.shape[-1] for view in batch.views[:views]})
    inputs = stepper.execution.place_views(
        [
            torch.cat([view for view in batch.views[:views] if view.shape[-1] == size])
            for size in sizes
        ]
    )

    def take_step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with stepper.execution.forward_context():
            features = [backbone(images) for images in inputs]
        torch.autograd.backward(features, [torch.ones_like(feature) for feature in features])
        optimizer.step()

    return take_step


def measure(
    name: str,
    device: torch.device,
    tiny: bool,
    compiled: bool,
    repeats: int,
    images: int = 0,
    trace: Path | None = None,
) -> dict[str, Any]:
    """Return the measurements of one step, as medians of `repeats` interleaved repetitions.

    Args:
        name: One of `CONFIGS`.
        device: Where the step runs.
        tiny: Use a small network and eight images.
        compiled: Compile the blocks.
        repeats: Repetitions of each step.
        images: Largest batch size to try. 0 means no limit.
        trace: File for the profile of five steps, on a GPU.
    """
    run = load_run(name, tiny, compiled)
    limit = images or PUBLISHED_BATCHES.get(name, BATCH_SIZES[0])
    sizes = (8,) if tiny else tuple(size for size in BATCH_SIZES if size <= limit) or (limit,)
    start = time.perf_counter()
    images, stepper, batch = find_largest_batch(run, device, sizes)
    result: dict[str, Any] = {"versions": versions("timm"), "images": images, "compiled": compiled}
    result["seconds_to_first_step"] = time.perf_counter() - start
    crops, view_crops = random_crops(run, images), recipe.crop_per_view(run.views)
    epochs = itertools.count()

    def take_whole_step() -> None:
        views = augment_colors(run, crops, next(epochs), device)
        stepper(HALFWAY, Batch(views, batch.labels, batch.indices))

    steps: dict[str, Callable[[], object]] = {
        "whole": take_whole_step,
        "step": lambda: stepper(HALFWAY, batch),
        "color": lambda: augment_colors(run, crops, next(epochs), device),
        "backbone": build_backbone_step(stepper, batch),
        "bare": build_bare_step(stepper, batch, len(view_crops)),
    }
    result["other_peers"] = peers.describe_other_peers()
    if not compiled:
        try:
            steps["lightly"] = peers.build_lightly_step(run, images, device)
            steps["lightly"]()
        except ImportError:
            result["lightly"] = "not installed"
        except LookupError as error:
            result["lightly"] = str(error)
        except torch.OutOfMemoryError:
            steps.pop("lightly", None)
            result["lightly"] = f"out of memory at {images} images"
    for step in steps.values():
        step()
    seconds = time_interleaved(steps, repeats, device)
    name_words = torch.cuda.get_device_name().split() if device.type == "cuda" else []
    machine = next(
        (hardware.MACHINES[word] for word in name_words if word in hardware.MACHINES), None
    )
    estimate = Estimate(
        replace(run, global_batch_size=images),
        Cluster(1, 1),
        replace(machine or hardware.MACHINES["H100"], launch_seconds=0.0),
    )
    trace_of_step = estimate.micro_batch_traces.trace_for(images)
    bound = estimate.step_time(images)  # at full rates, because the machine's shares are 1
    network = type(parallel.unwrap(stepper.model).backbone.model).__name__
    result |= {
        "ms": seconds["whole"] * 1e3,
        "ms_without_color": seconds["step"] * 1e3,
        "ms_color": seconds["color"] * 1e3,
        "images_per_second": images / seconds["whole"],
        "views_per_second": len(view_crops) * images / seconds["whole"],
        "loss_and_optimizer": 1 - seconds["backbone"] / seconds["step"],
        "color_loss_and_optimizer": 1 - seconds["backbone"] / seconds["whole"],
        "bare_over_whole": seconds["bare"] / seconds["whole"],
        "of_790_tflops": float(trace_of_step.flops.sum()) / seconds["whole"] / PEAK_FLOPS,
        "gpu": machine.name if machine else None,
        "network": network,
        "of_roofline": (bound.total_seconds - bound.color_seconds) / seconds["step"]
        if machine
        else None,
        "color_of_roofline": bound.color_seconds / seconds["color"] if machine else None,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
    }
    if "lightly" in seconds:
        result["lightly"] = {
            "images_per_second": images / seconds["lightly"],
            "ours_over_theirs": seconds["lightly"] / seconds["step"],
            "bare_over_theirs": seconds["bare"] / seconds["lightly"],
        }
    if trace is not None and device.type == "cuda":
        result["kernels"] = profile(take_whole_step, trace)
    return result


def profile(step: Callable[[], object], path: Path) -> list[str]:
    """Profile five steps, write the table of kernels and the trace, and return the costliest lines.

    Args:
        step: The step.
        path: File of the table. The trace, for Perfetto or chrome://tracing, goes beside it.
    """
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(5):
            step()
        torch.cuda.synchronize()
    averages = profiler.key_averages()
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path.with_suffix(".json.gz")))
    path.write_text(averages.table(sort_by="self_cuda_time_total", row_limit=60))
    on_gpu = [event for event in averages if event.self_device_time_total > 0]
    on_gpu.sort(key=lambda event: -event.self_device_time_total)
    return [
        f"{event.self_device_time_total / 5e3:.2f} ms {event.count / 5:.0f} x {event.key[:70]}"
        for event in on_gpu[:25]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=list(CONFIGS))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument(
        "--images", type=int, default=0, help="largest batch size to try; 0: no limit"
    )
    parser.add_argument("--trace", type=Path, help="file for the profile of five steps")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        cuda_settings.apply(torch.device("cuda", 0), deterministic=False)
    result = measure(
        options.name,
        device,
        options.tiny,
        options.compile,
        options.repeats,
        options.images,
        options.trace,
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
