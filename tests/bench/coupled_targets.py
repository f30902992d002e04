"""Memory of a step whose loss combines the targets of the whole batch, in 2, 4 and 8 micro-batches.

    PYTHONPATH=. .venv/bin/python tests/bench/coupled_targets.py

The method is that of tests/coupled_targets.py with so many prototypes that logits take most of the
memory, as in DINOv2. The logits of an image are 3,000 times as large as its bottleneck features.
Each size runs in a process of its own.
"""

import argparse
import multiprocessing
import sys
from dataclasses import replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]

import torch
from coupled_targets import MAX_MASKED, CoupledTargets, cast, random_batch

from ssl_pretrain.optim.optimizers import OptimConfig, set_rates
from ssl_pretrain.optim.schedules import Progress
from ssl_pretrain.parallel import memory
from ssl_pretrain.parallel.execution import Execution, ParallelConfig
from ssl_pretrain.step import build_stepper
from ssl_pretrain.system import allocator

MIB = 2**20
CPU = torch.device("cpu")
BOTTLENECK = 5  # numbers per token that are kept, besides one for its validity


def measure(num_micro_batches: int, micro_batch_size: int, num_prototypes: int) -> int:
    """Return the additional memory of a step at its peak, in bytes."""
    torch.set_num_threads(1)
    allocator.release_freed_memory()
    torch.manual_seed(0)
    num_images = num_micro_batches * micro_batch_size
    settings = ParallelConfig(precision="float32", bn_group_images=micro_batch_size)
    optim_config = OptimConfig(name="sgd", base_lr=0.01, lr_scaling="none", warmup_epochs=0)
    execution = Execution.resolve(settings, CPU)
    batch = cast(random_batch(0, num_images), torch.float32)
    batch = replace(batch, views=execution.place_views(batch.views))
    stepper = build_stepper(
        CoupledTargets(num_prototypes, koleo_weight=0.0),
        settings,
        optim_config,
        execution,
        micro_batch_size=micro_batch_size,
        global_batch_size=num_images,
        example=batch.slice(0, num_micro_batches),
    )
    progress = Progress(0, 20, 2)
    set_rates(stepper.optimizer, optim_config, progress, 10, num_images)
    stepper(progress, batch)  # allocates the optimizer's state
    return memory.measure_peak_bytes(lambda: stepper(progress, batch), CPU)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=64, help="images per micro-batch")
    parser.add_argument("--prototypes", type=int, default=16384)
    options = parser.parse_args()
    context, peaks = multiprocessing.get_context("spawn"), {}
    print(f"torch {torch.__version__}, {options.images} images per micro-batch")
    for k in (1, 2, 4, 8):
        with context.Pool(1) as pool:
            peaks[k] = pool.apply(measure, (k, options.images, options.prototypes))
        features = kept_bytes(k * options.images)
        logits = k * options.images * (1 + MAX_MASKED) * options.prototypes * 4
        print(
            f"{k} micro-batches: peak {peaks[k] / MIB:.1f} MiB; kept features "
            f"{features / MIB:.2f} MiB; the logits of all images would take {logits / MIB:.0f} MiB"
        )
    growth = peaks[8] - peaks[2]
    kept = kept_bytes(8 * options.images) - kept_bytes(2 * options.images)
    print(f"growth from 2 to 8 micro-batches: {growth / MIB:.2f} MiB; kept {kept / MIB:.2f} MiB")
    print(f"ratios: peak_8_vs_2_micro_batches={peaks[8] / peaks[2]:.3f}")


def kept_bytes(num_images: int) -> int:
    """Return the bytes of the targets of a batch, of which a concatenated copy is made."""
    return 2 * num_images * ((1 + MAX_MASKED) * BOTTLENECK * 4 + MAX_MASKED)


if __name__ == "__main__":
    main()
