"""Measure the time and peak memory of a step of every method, relative to SimCLR's.

PYTHONPATH=. .venv/bin/python tests/bench/methods.py [--images 256] [--backbone test_resnet]

The network and the heads are those of the CPU preset. DINO and SwAV also get only its two views.
"""

import argparse
from pathlib import Path

import torch
from measure import (
    HALFWAY,
    build_stepper_halfway,
    format_mib,
    measure_peaks,
    time_interleaved,
    versions,
)

from ssl_pretrain import config, methods
from ssl_pretrain.launch import study
from ssl_pretrain.models import backbones
from ssl_pretrain.optim.optimizers import OptimConfig
from ssl_pretrain.parallel.execution import ParallelConfig
from ssl_pretrain.views import masks, recipe
from ssl_pretrain.views.batch import Batch

PRESET = Path(__file__).parents[2] / "configs/methods_cifar10_cpu.yaml"


def build_step(name: str, options: argparse.Namespace, device: torch.device):
    torch.manual_seed(0)
    overrides = study.small_model_overrides([f"method.name={name}"])
    run = config.load(PRESET, [*overrides, f"views.crops.global.size={options.size}"])
    if run.backbone.name == "test_resnet":
        run.backbone.name = options.backbone  # methods with masks keep their ViT
    method = run.method.build(backbones.build(run.backbone, options.size))
    generator = torch.Generator().manual_seed(0)
    views = [
        torch.randn(options.images, 3, options.size, options.size, generator=generator)
        for _ in recipe.crop_per_view(run.views)
    ]
    settings = ParallelConfig(bn_group_images=run.parallel.bn_group_images)
    batch = Batch(
        [view.to(device) for view in views],
        torch.arange(options.images, device=device) % 10,
        torch.arange(options.images, device=device),
        masks.blank(run.views, options.images, device),
    )
    stepper = build_stepper_halfway(
        method,
        settings,
        OptimConfig(name="adamw"),
        device,
        batch,
        micro_batch_size=options.images,
        global_batch_size=options.images,
    )
    return lambda: stepper(HALFWAY, batch)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--backbone", default="test_resnet")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps = {name: build_step(name, options, device) for name in methods.names()}
    for step in steps.values():  # warm up
        step()
    seconds, peak_bytes = (
        time_interleaved(steps, options.repeats, device),
        measure_peaks(steps, device),
    )
    print(versions("timm"))
    print(
        f"{options.images} images of {options.size} pixels, {options.backbone}, "
        f"median of {options.repeats}"
    )
    print("| method | time | peak memory |\n|---|---|---|")
    for name in methods.names():
        time = f"{seconds[name] / seconds['simclr']:.2f} ({seconds[name]:.2f} s)"
        peak = f"{peak_bytes[name] / peak_bytes['simclr']:.2f} ({format_mib(peak_bytes[name])})"
        print(f"| {name} | {time} | {peak} |")


if __name__ == "__main__":
    main()
