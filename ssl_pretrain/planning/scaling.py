"""Predicted scaling from 8 to 512 GPUs, as tables: python -m ssl_pretrain.planning.scaling docs/scaling.md

Writes them between the two marks of that page, or prints them where no page is given. From data sheets, so that they are the same
on every machine; nothing in them was run on a GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from ssl_pretrain import config
from ssl_pretrain.config import RunConfig
from ssl_pretrain.parallel.memory import GIB, ROOM
from ssl_pretrain.planning.communication import Cluster
from ssl_pretrain.planning.estimate import Program, Step, backbone_step
from ssl_pretrain.planning.hardware import ATTAINED, MACHINES, Machine, from_data_sheet

BEGIN, END = (
    "<!-- predicted by python -m ssl_pretrain.planning.scaling -->",
    "<!-- end of what is predicted -->",
)
GPUS = (8, 16, 32, 64, 128, 256, 512)
PER_NODE = 8
BATCHES = (8192, 65536)
IMAGES = 1_281_167  # of ImageNet's training set
MODELS = {
    "SimCLR, ResNet-50": ("configs/simclr_imagenet.yaml", []),
    "MoCo v3, ViT-B/16": (
        "configs/moco_v3_vit_imagenet.yaml",
        ["backbone.name=vit_base_patch16_224", "backbone.args.num_heads=12"],
    ),
    "MoCo v3, ViT-L/16": (
        "configs/moco_v3_vit_imagenet.yaml",
        ["backbone.name=vit_large_patch16_224", "backbone.args.num_heads=16"],
    ),
}
# Published training speeds, images a second of 224 pixels on one GPU in mixed precision, eager, channels last where a ResNet:
# NVIDIA DeepLearningExamples (PyTorch ConvNets README, A100 40 GB); timm's results/benchmark-train-amp-*-rtx3090.csv;
# NVIDIA BioNeMo's nvSubquadratic documentation (a ViT of S size, H100, batch 256, before it is compiled)
A100_40 = from_data_sheet("A100 40 GB", 40, 312, 19.5, 1.555, 300, 200)
RTX3090 = from_data_sheet("RTX 3090", 24, 71, 35.6, 0.936, 0, 0)
PUBLISHED = [
    ("ResNet-50", "resnet50", A100_40, 2470),
    ("ResNet-50", "resnet50", RTX3090, 1218),
    ("ViT-S/16", "vit_small_patch16_224", RTX3090, 1053),
    ("ViT-B/16", "vit_base_patch16_224", RTX3090, 391),
    ("ViT-S class", "vit_small_patch16_224", MACHINES["H100"], 2305),
]


@dataclass(frozen=True)
class Row:
    """One size of the cluster: images of the global batch and of a part, those that share batch norm's statistics, the step."""

    gpus: int
    batch: int
    images: int
    group: int
    gib: float
    step: Step

    @property
    def speed(self) -> float:
        return self.batch / self.step.total


def tables(gpu: str = "H100") -> Iterator[str]:
    """Published speeds, then weak and strong scaling of one model after the other at each batch, as Markdown."""
    yield "\n".join(_published())
    for name, (path, overrides) in MODELS.items():
        run, like, lines = config.load(path, [*overrides, f"plan.gpu={gpu}"]), None, []
        for batch in BATCHES:
            for kind in ("strong", "weak"):
                rows = []
                for gpus in GPUS:
                    size = batch if kind == "strong" else batch // GPUS[-1] * gpus
                    row, like = predicted(
                        replace(run, global_batch_size=size), gpus, MACHINES[gpu], like
                    )
                    rows.append(row)
                    print(
                        f"{name}: {kind}, {row.batch:,} on {gpus}: {row.speed:,.0f} images/s",
                        file=sys.stderr,
                        flush=True,
                    )
                fixed = (
                    f"batch {batch:,}"
                    if kind == "strong"
                    else f"{batch // GPUS[-1]} images a GPU, batch {batch:,} on {GPUS[-1]}"
                )
                lines += [f"### {name} on {gpu}: {kind} scaling, {fixed}", "", *_table(rows), ""]
        yield "\n".join(lines).strip()


def predicted(
    run: RunConfig, gpus: int, machine: Machine, like: Program | None
) -> tuple[Row, Program]:
    """One row: the whole share at once where it fits, else the largest part that does, with batch norm over that part."""
    program = Program(run, Cluster(max(1, gpus // PER_NODE), min(gpus, PER_NODE)), machine, like)
    images = program.share
    while images > 1 and sum(program.memory(images).values()) > ROOM * machine.memory:
        images //= 2
    group = run.global_batch_size if images == program.share else images
    program.run = replace(run, parallel=replace(run.parallel, bn_group_images=group))
    step = program.step(images)
    return Row(
        gpus, run.global_batch_size, images, group, sum(program.memory(images).values()) / GIB, step
    ), program


def _table(rows: list[Row]) -> Iterator[str]:
    yield (
        "| GPUs | batch | at once | batch norm over | GiB a GPU | step, ms | computing | communication, exposed | loss and optimizer "
        "| images/s | of linear | ImageNet epoch | bound by |"
    )
    yield "|" + "---|" * 13
    for row in rows:
        step, linear = row.step, rows[0].speed / rows[0].gpus * row.gpus
        shares = [
            f"{part / step.total:.0%}"
            for part in (step.compute + step.views, step.exposed, step.loss + step.optimizer)
        ]
        yield (
            f"| {row.gpus} | {row.batch:,} | {row.images:,} | {row.group:,} | {row.gib:.1f} | {step.total * 1e3:,.1f} "
            f"| {' | '.join(shares)} | {row.speed:,.0f} | {row.speed / linear:.0%} | {IMAGES / row.speed:,.0f} s | {step.bound} |"
        )


def _published() -> Iterator[str]:
    """What the roofline says of speeds that others published: where `hardware.ATTAINED` comes from."""
    yield "| training step, eager, mixed precision | GPU | published images/s | roofline | attained |"
    yield "|---|---|---|---|---|"
    shares = []
    for name, backbone, machine, published in PUBLISHED:
        images = 128
        roofline = images / sum(machine.bounds(backbone_step(backbone, 224, images, bfloat16=True)))
        shares.append(published / roofline)
        yield f"| {name} | {machine.name} | {published:,} | {roofline:,.0f} | {shares[-1]:.2f} |"
    yield (
        f"\nThey attain {min(shares):.2f} to {max(shares):.2f}, {median(shares):.2f} in the median: over 1 where fused kernels move "
        f"fewer bytes than their operations one by one, and far under it where a fast GPU waits for its host. The predictions below take "
        f"{ATTAINED}, an assumption: tuned steps were published, and ours has a loss and a second network beside them."
    )


def write(page: Path, text: str) -> None:
    """Puts `text` between the page's two marks. Raises ValueError for a page without them."""
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page}: no lines {BEGIN!r} and {END!r}; the tables go between them")
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ssl_pretrain.planning.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "page", nargs="?", type=Path, help="the page between whose marks the tables go"
    )
    parser.add_argument("--gpu", default="H100", choices=list(MACHINES))
    options = parser.parse_args(arguments)
    made: list[str] = []
    try:
        for text in tables(options.gpu):
            made.append(text)
            if options.page:
                write(options.page, "\n\n".join(made))
            else:
                print(text + "\n", flush=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
