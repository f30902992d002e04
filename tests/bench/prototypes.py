"""DINO's logits in parts: the peak memory of a step as the global batch grows and the part stays.

PYTHONPATH=. .venv/bin/python tests/bench/prototypes.py [--part 8] [--prototypes 16384]
"""

from __future__ import annotations

import argparse

import torch
from measure import mib, peaks, versions

from ssl_pretrain.methods import dino
from ssl_pretrain.models.backbones import BackboneConfig, build
from ssl_pretrain.optim import optimizers as optim
from ssl_pretrain.optim.optimizers import OptimConfig
from ssl_pretrain.optim.schedules import Progress
from ssl_pretrain.parallel.execution import Execution
from ssl_pretrain.parallel.parallel_config import ParallelConfig
from ssl_pretrain.step import build_stepper
from ssl_pretrain.views.batch import Batch

HALFWAY = Progress(50, 100, 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", type=int, default=8)
    parser.add_argument("--prototypes", type=int, default=16384)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    runs, sizes = {}, [options.part * times for times in (1, 4, 16)]
    for total in sizes:
        torch.manual_seed(0)
        backbone = build(BackboneConfig(name="test_resnet", stem="no_pool"), 32)
        method = dino.Config(
            hidden_dim=256, bottleneck_dim=64, num_prototypes=options.prototypes
        ).build(backbone)
        settings, numbers = (
            ParallelConfig(bn_group_images=options.part),
            torch.arange(total, device=device),
        )
        images = Batch(
            [torch.randn(total, 3, size, size, device=device) for size in (32, 32, *[16] * 8)],
            numbers,
            numbers,
        )
        execution = Execution.resolve(settings, device)
        images = Batch(execution.place_views(images.views), numbers, numbers)
        first = images.slice(0, total // options.part)
        config = OptimConfig(name="adamw")
        stepper = build_stepper(
            method,
            settings,
            config,
            execution,
            micro_batch_size=options.part,
            global_batch_size=total,
            example=first,
        )
        optim.set_rates(stepper.optimizer, config, HALFWAY, 100, total)
        runs[f"{total} images"] = lambda stepper=stepper, images=images: stepper(HALFWAY, images)
    for run in runs.values():
        run()
    found = peaks(runs, device)
    print(versions("timm"))
    print(
        f"DINO, 2 global and 8 local crops, {options.prototypes:,} prototypes, parts of {options.part} images: peak extra memory of a step"
    )
    for (name, bytes_), total in zip(found.items(), sizes):
        print(
            f"{name:12s} {mib(bytes_):>12s}   one copy of all logits would be {mib(total * 12 * options.prototypes * 4):>12s}"
        )
    print(
        f"ratios: memory_of_16_parts_over_1={found[f'{sizes[2]} images'] / found[f'{sizes[0]} images']:.2f}"
    )


if __name__ == "__main__":
    main()
