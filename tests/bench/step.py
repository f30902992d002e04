"""Compare an optimizer step in micro-batches with one on the whole batch: time and peak memory.

PYTHONPATH=. .venv/bin/python tests/bench/step.py [--images 256] [--micro-batch 32] [--size 64]

`coupled` is SimCLR, whose micro-batches are embedded twice. `uncoupled` is a method whose loss is a
mean over images (the distance of an embedding to a fixed target), whose micro-batches are
accumulated in one pass. In every run, each micro-batch is one batch norm group.
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

from ssl_pretrain.methods import simclr
from ssl_pretrain.methods.base import LossOutput
from ssl_pretrain.models.backbones import build
from ssl_pretrain.models.timm_networks import BackboneConfig
from ssl_pretrain.optim.optimizers import OptimConfig
from ssl_pretrain.parallel.execution import ParallelConfig
from ssl_pretrain.step import Stepper
from ssl_pretrain.views.batch import Batch


class FixedTargetSimCLR(simclr.SimCLR):
    """SimCLR's network with a loss that does not couple images."""

    couples = "nothing"

    def loss(self, embeddings, targets):
        loss = sum((z.float() - 1).square().mean() for z in embeddings.values())
        return LossOutput(loss, {})


def build_benchmark_stepper(
    method_class: type,
    options: argparse.Namespace,
    micro_batch_size: int,
    global_batch_size: int,
    device: torch.device,
) -> Stepper:
    torch.manual_seed(0)
    backbone = build(BackboneConfig(name=options.backbone), options.size)
    method = method_class(simclr.Config(projector_dims=[512, 128]), backbone)
    settings = ParallelConfig(bn_group_images=options.micro_batch)
    labels = torch.zeros(micro_batch_size, dtype=torch.int64, device=device)
    view = torch.zeros(micro_batch_size, 3, options.size, options.size, device=device)
    example = Batch([view] * 2, labels, labels)
    return build_stepper_halfway(
        method,
        settings,
        OptimConfig(name="lars"),
        device,
        example,
        micro_batch_size=micro_batch_size,
        global_batch_size=global_batch_size,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--micro-batch", type=int, default=32)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(1)
    views = [
        torch.randn(options.images, 3, options.size, options.size, generator=generator).to(device)
        for _ in range(2)
    ]
    labels = torch.zeros(options.images, dtype=torch.int64, device=device)
    runs = {}
    for kind, method_class in (("coupled", simclr.SimCLR), ("uncoupled", FixedTargetSimCLR)):
        for name, micro_batch_size, global_batch_size in (
            ("whole batch", options.images, options.images),
            ("micro-batches", options.micro_batch, options.images),
            ("one micro-batch", options.micro_batch, options.micro_batch),
        ):
            stepper = build_benchmark_stepper(
                method_class, options, micro_batch_size, global_batch_size, device
            )
            batch_views = [view[:global_batch_size] for view in place_views(views, stepper)]
            batch_labels = labels[:global_batch_size]
            batch = Batch(batch_views, batch_labels, batch_labels)
            runs[f"{kind}, {name}"] = lambda stepper=stepper, batch=batch: stepper(HALFWAY, batch)
    for run in runs.values():
        run()
    print(versions("timm"))
    print(
        f"{options.backbone} at {options.size} pixels, {options.images} images, 2 views, "
        f"micro-batches of {options.micro_batch}; median of {options.repeats} steps, interleaved"
    )
    seconds, peak_bytes = (
        time_interleaved(runs, options.repeats, device),
        measure_peaks(runs, device),
    )
    for name in runs:
        print(
            f"{name:28s} {seconds[name]:8.3f} s   "
            f"peak extra memory {format_mib(peak_bytes[name]):>12s}"
        )
    ratios = []
    for kind in ("coupled", "uncoupled"):
        whole_batch, micro_batches, one_micro_batch = (
            f"{kind}, {name}" for name in ("whole batch", "micro-batches", "one micro-batch")
        )
        time_ratio = seconds[micro_batches] / seconds[whole_batch]
        memory_ratio = peak_bytes[micro_batches] / peak_bytes[one_micro_batch]
        ratios.append(f"micro_batches_over_whole_{kind}={time_ratio:.2f}")
        ratios.append(f"memory_over_one_micro_batch_{kind}={memory_ratio:.2f}")
    print("ratios:", *ratios)


def place_views(views: list[torch.Tensor], stepper: Stepper) -> list[torch.Tensor]:
    """Move the views to the device and memory format of the stepper, as the loader does."""
    return stepper.execution.place_views(views)


if __name__ == "__main__":
    main()
