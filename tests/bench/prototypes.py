"""Measure the peak memory of a DINO step as the global batch grows and the micro-batch does not.

PYTHONPATH=. .venv/bin/python tests/bench/prototypes.py [--micro-batch 8] [--prototypes 16384]
"""

import argparse

import torch
from measure import HALFWAY, build_stepper_halfway, format_mib, measure_peaks, versions

from ssl_pretrain.methods import dino
from ssl_pretrain.models.backbones import build
from ssl_pretrain.models.timm_networks import BackboneConfig
from ssl_pretrain.optim.optimizers import OptimConfig
from ssl_pretrain.parallel.execution import Execution, ParallelConfig
from ssl_pretrain.views.batch import Batch


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--prototypes", type=int, default=16384)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps, global_batch_sizes = {}, [options.micro_batch * factor for factor in (1, 4, 16)]
    for global_batch_size in global_batch_sizes:
        torch.manual_seed(0)
        backbone = build(BackboneConfig(name="test_resnet", stem="no_pool"), 32)
        method = dino.Config(
            hidden_dim=256, bottleneck_dim=64, num_prototypes=options.prototypes
        ).build(backbone)
        settings = ParallelConfig(bn_group_images=options.micro_batch)
        numbers = torch.arange(global_batch_size, device=device)
        batch = Batch(
            [
                torch.randn(global_batch_size, 3, size, size, device=device)
                for size in (32, 32, *[16] * 8)
            ],
            numbers,
            numbers,
        )
        execution = Execution.resolve(settings, device)
        batch = Batch(execution.place_views(batch.views), numbers, numbers)
        first_micro_batch = batch.slice(0, global_batch_size // options.micro_batch)
        stepper = build_stepper_halfway(
            method,
            settings,
            OptimConfig(name="adamw"),
            device,
            first_micro_batch,
            micro_batch_size=options.micro_batch,
            global_batch_size=global_batch_size,
        )
        steps[f"{global_batch_size} images"] = lambda stepper=stepper, batch=batch: stepper(
            HALFWAY, batch
        )
    for step in steps.values():
        step()
    peak_bytes = measure_peaks(steps, device)
    print(versions("timm"))
    print(
        f"DINO, 2 global and 8 local crops, {options.prototypes:,} prototypes, micro-batches of "
        f"{options.micro_batch} images: peak extra memory of a step"
    )
    for (name, num_bytes), global_batch_size in zip(peak_bytes.items(), global_batch_sizes):
        logits = format_mib(global_batch_size * 12 * options.prototypes * 4)
        print(
            f"{name:12s} {format_mib(num_bytes):>12s}   "
            f"one copy of all logits would be {logits:>12s}"
        )
    ratio = (
        peak_bytes[f"{global_batch_sizes[2]} images"]
        / peak_bytes[f"{global_batch_sizes[0]} images"]
    )
    print(f"ratios: memory_of_16_micro_batches_over_1={ratio:.2f}")


if __name__ == "__main__":
    main()
