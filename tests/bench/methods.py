"""Measure the time and peak memory of a step of every method, relative to SimCLR's.

PYTHONPATH=. .venv/bin/python tests/bench/methods.py [--images 256] [--vit]

The network and the heads are those of the CPU preset. DINO and SwAV also get only its two views.
MAE and I-JEPA need a ViT. With --vit all methods get that ViT, and CPC, which needs a ResNet, is
left out.
"""

import argparse
from pathlib import Path

import numpy as np
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
from ssl_pretrain.launch import study_plan
from ssl_pretrain.models import backbones
from ssl_pretrain.optim.optimizers import OptimConfig
from ssl_pretrain.parallel.execution import ParallelConfig
from ssl_pretrain.views import masks, recipe
from ssl_pretrain.views.batch import Batch

PRESET = Path(__file__).parents[2] / "configs/methods_cifar10_cpu.yaml"
VIT = ["backbone.name=test_vit", "backbone.stem=imagenet", "backbone.args.patch_size=4"]


def build_step(name: str, options: argparse.Namespace, device: torch.device):
    torch.manual_seed(0)
    overrides = study_plan.small_model_overrides([f"method.name={name}"])
    network = VIT if options.vit else []
    run = config.load(PRESET, [*network, *overrides, f"views.crops.global.size={options.size}"])
    method = run.method.build(backbones.build(run.backbone, options.size))
    generator = torch.Generator().manual_seed(0)
    views = [
        torch.randn(options.images, 3, options.size, options.size, generator=generator)
        for _ in recipe.crop_per_view(run.views)
    ]
    settings = ParallelConfig(bn_group_images=run.parallel.bn_group_images)
    position = masks.Position(
        seed=0,
        epoch=0,
        step=0,
        indices=np.arange(options.images),
        first_slot=0,
        global_batch_size=options.images,
    )
    batch = Batch(
        views,
        torch.arange(options.images) % 10,
        torch.arange(options.images),
        masks.draw(run.views, position),
    ).to(device)
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
    parser.add_argument("--vit", action="store_true", help="train all methods but CPC on one ViT")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = [name for name in methods.image_methods() if not (options.vit and name == "cpc")]
    steps = {name: build_step(name, options, device) for name in names}
    for step in steps.values():  # warm up
        step()
    seconds, peak_bytes = (
        time_interleaved(steps, options.repeats, device),
        measure_peaks(steps, device),
    )
    print(versions("timm"))
    print(
        f"{options.images} images of {options.size} pixels, "
        f"{'test_vit' if options.vit else 'networks of the preset'}, median of {options.repeats}"
    )
    print("| method | time | peak memory |\n|---|---|---|")
    ratios = []
    for name in names:
        time_ratio = seconds[name] / seconds["simclr"]
        memory_ratio = peak_bytes[name] / peak_bytes["simclr"]
        time = f"{time_ratio:.2f} ({seconds[name]:.2f} s)"
        print(f"| {name} | {time} | {memory_ratio:.2f} ({format_mib(peak_bytes[name])}) |")
        ratios += [f"{name}_time={time_ratio:.2f}", f"{name}_memory={memory_ratio:.2f}"]
    print("ratios:", *ratios)


if __name__ == "__main__":
    main()
