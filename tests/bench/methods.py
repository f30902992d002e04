"""Measure the time and peak memory of a step of every method, relative to SimCLR's.

PYTHONPATH=. .venv/bin/python tests/bench/methods.py [--images 256] [--backbone test_resnet]

The network and the heads are those of the CPU preset. DINO and SwAV also get only its two views.
"""

import argparse

import torch
from measure import (
    HALFWAY,
    build_stepper_halfway,
    format_mib,
    measure_peaks,
    time_interleaved,
    versions,
)

from ssl_pretrain import methods
from ssl_pretrain.models.backbones import build
from ssl_pretrain.models.timm_networks import BackboneConfig
from ssl_pretrain.optim.optimizers import OptimConfig
from ssl_pretrain.parallel.execution import ParallelConfig
from ssl_pretrain.views.batch import Batch


def build_step(name: str, options: argparse.Namespace, device: torch.device):
    torch.manual_seed(0)
    module = methods.find(name)
    args = {"norm_layer": "groupnorm1"} if name == "cpc" else {}
    backbone = build(BackboneConfig(name=options.backbone, stem="no_pool", args=args), options.size)
    method = module.Config(**module.SMALL_CONFIG).build(backbone)
    generator = torch.Generator().manual_seed(0)
    views = [
        torch.randn(options.images, 3, options.size, options.size, generator=generator)
        for _ in range(1 if name == "cpc" else 2)
    ]
    settings = ParallelConfig(bn_group_images=32 if name == "moco" else "global")
    batch = Batch(
        [view.to(device) for view in views],
        torch.arange(options.images, device=device) % 10,
        torch.arange(options.images, device=device),
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
