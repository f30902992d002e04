"""Loaders compared in one run, interleaved and warm: PYTHONPATH=. OMP_NUM_THREADS=1 python tests/bench/loader.py

The images are those of imagenet_sample.zip, written by `ssl_pretrain.data.beton` at each --sides and repeated; every
contender reads the same JPEGs of the same file. Two cores (--threads) for each.

    ours                 data/threads.py: decoded once, all crops, into the ring: all that the CPU does for a GPU
    FFCV per view        as FFCV-SSL: a pipeline, and so a decoding, for each view
    torchvision tensors  worker processes, decode_jpeg, RandomResizedCrop on uint8 tensors, flip
    torchvision PIL      worker processes, SimCLR's whole augmentation on Pillow images

Colour is compared by itself, on one batch of 256 x 3 x 224 x 224 on the CPU: `color.py` beside this.
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.io import decode_jpeg
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

sys.path[:0] = [str(Path(__file__).parent)]

import color as color_bench

from ssl_pretrain.data.beton import writer as beton_writer
from ssl_pretrain.data.beton.beton_source import Beton
from ssl_pretrain.data.chunks import ChunkRequest
from ssl_pretrain.data.native.threads import ThreadPool
from ssl_pretrain.data.order import Plan
from ssl_pretrain.data.sources import DataConfig, open_source
from ssl_pretrain.views.recipe import Crop

BATCH = 100
RECIPES = {
    "2x224+6x96": [Crop(size=224, scale=[0.25, 1.0])] * 2 + [Crop(size=96, scale=[0.05, 0.25])] * 6,
    "2x224": [Crop(size=224, scale=[0.25, 1.0])] * 2,
}
Contender = Callable[[int], int]  # makes about so many images, and says how many


def cpu_seconds(processes: list[int]) -> float:
    """User and system time of this process and of `processes`."""
    ticks = 0
    for process in [os.getpid(), *processes]:
        fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


class Ours:
    def __init__(self, source: Beton, each: list[Crop], threads: int):
        jobs = (
            ChunkRequest(step, np.random.default_rng(step).integers(0, len(source), BATCH))
            for step in itertools.count()
        )
        self.pool = ThreadPool(
            source, each, Plan(0, len(source), BATCH), threads, 2, torch.device("cpu")
        )
        self.chunks = self.pool.take(jobs)
        self.processes: list[int] = []
        self.ahead = 4 * BATCH

    def __call__(self, images: int) -> int:
        for _ in range(images // BATCH):
            next(self.chunks)
        return images // BATCH * BATCH

    def close(self) -> None:
        self.pool.close()


class PerView:
    def __init__(self, source: Beton, each: list[Crop], threads: int):
        from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
        from ffcv.loader import Loader, OrderOption
        from ffcv.pipeline.pipeline_spec import PipelineSpec

        def decoder(crop: Crop):
            return RandomResizedCropRGBImageDecoder(
                (crop.size, crop.size), tuple(crop.scale), tuple(crop.ratio)
            )

        pipelines = {"image": [decoder(each[0])], "label": [IntDecoder()]}
        pipelines |= {
            f"view{number}": PipelineSpec("image", decoder=decoder(crop))
            for number, crop in enumerate(each[1:], 1)
        }
        indices = np.tile(np.arange(len(source)), 50)
        options = {
            "order": OrderOption.RANDOM,
            "os_cache": True,
            "drop_last": True,
            "indices": indices,
            "pipelines": pipelines,
        }
        self.batches = iter(Loader(source.where, batch_size=BATCH, num_workers=threads, **options))
        self.processes: list[int] = []
        self.ahead = 4 * BATCH

    def __call__(self, images: int) -> int:
        for _ in range(images // BATCH):
            next(self.batches)
        return images // BATCH * BATCH

    def close(self) -> None:
        self.batches.close()


class Crops(Dataset):
    """Every crop of an image, by torchvision: on uint8 tensors, or on Pillow images with all of SimCLR's colour."""

    def __init__(self, source: Beton, each: list[Crop], with_pillow: bool):
        self.source, self.each, self.with_pillow = source, each, with_pillow
        mode = F.InterpolationMode(each[0].interpolation)
        self.crops = [
            v2.RandomResizedCrop(crop.size, tuple(crop.scale), interpolation=mode, antialias=True)
            for crop in each
        ]
        strong = v2.ColorJitter(0.8, 0.8, 0.8, 0.2)
        self.colors = [
            v2.Compose([v2.RandomHorizontalFlip(), v2.RandomApply([strong], 0.8), v2.RandomGrayscale(0.2),
                        v2.RandomApply([v2.GaussianBlur(max(3, crop.size // 10 | 1), (0.1, 2.0))], 0.5), v2.PILToTensor()])
            for crop in each
        ]  # fmt: skip

    def __len__(self) -> int:
        return 50 * len(self.source)

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        content = self.source.read_bytes(index % len(self.source))
        if self.with_pillow:
            image = Image.open(io.BytesIO(content)).convert("RGB")
            return [colors(crop(image)) for crop, colors in zip(self.crops, self.colors)]
        image = decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        image = image if len(image) == 3 else image.expand(3, -1, -1)
        views = [crop(image) for crop in self.crops]
        return [view.flip(-1) if torch.rand(()) < 0.5 else view for view in views]


class Torchvision:
    def __init__(self, source: Beton, each: list[Crop], threads: int, with_pillow: bool):
        torch.manual_seed(0)
        self.batch = 16 if with_pillow else BATCH
        loader = DataLoader(
            Crops(source, each, with_pillow),
            self.batch,
            shuffle=True,
            num_workers=threads,
            drop_last=True,
            multiprocessing_context="fork",
        )
        self.batches: Iterator = iter(loader)
        self.processes = [worker.pid for worker in self.batches._workers]
        self.ahead = 2 * threads * self.batch

    def __call__(self, images: int) -> int:
        for _ in range(max(1, images // self.batch)):
            next(self.batches)
        return max(1, images // self.batch) * self.batch

    def close(self) -> None:
        self.batches._shutdown_workers()


def paced(contender: Contender, images: int) -> tuple[float, float]:
    """(images a second, CPU milliseconds an image), what was made ahead before the clock began being used up first."""
    contender(contender.ahead)
    cpu, began = cpu_seconds(contender.processes), time.perf_counter()
    made = contender(images)
    seconds = time.perf_counter() - began
    return made / seconds, 1000 * (cpu_seconds(contender.processes) - cpu) / made


def settle(processes: list[int]) -> None:
    """Waits until every contender has filled its buffers and nobody computes."""
    while True:
        before = cpu_seconds(processes)
        time.sleep(1.0)
        if cpu_seconds(processes) - before < 0.05:
            return


def race(
    source: Beton, each: list[Crop], threads: int, rounds: int, images: int
) -> dict[str, list[tuple[float, float]]]:
    """Rounds of each contender, one after the other within a round; those that wait have all their buffers full and do nothing."""
    bicubic = [Crop(size=crop.size, scale=crop.scale, interpolation="bicubic") for crop in each]
    contenders = {  # processes are forked before there are threads
        "torchvision tensors": Torchvision(source, each, threads, False),
        "torchvision PIL": Torchvision(source, each, threads, True),
        "FFCV per view": PerView(source, each, threads),
        "ours": Ours(source, each, threads),
        "ours, bicubic": Ours(source, bicubic, threads),
    }
    few = {"FFCV per view": images // 3, "torchvision PIL": images // 16}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for contender in contenders.values():
        contender(contender.ahead)  # compiled, and the file in memory
    everyone = [process for contender in contenders.values() for process in contender.processes]
    for _ in range(rounds):
        for name, contender in contenders.items():
            settle(everyone)
            times[name].append(paced(contender, few.get(name, images)))
    for contender in contenders.values():
        contender.close()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(
            os.environ.get("SSL_PRETRAIN_DATA", Path(__file__).parents[3] / "shared" / "data")
        ),
    )
    parser.add_argument("--sides", type=int, nargs="+", default=[500, 400, 256])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--images",
        type=int,
        default=1200,
        help="of each contender and round (FFCV: a third, PIL: a 16th)",
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        zipped = open_source(
            DataConfig(root=str(given.data / "imagenet_sample.zip"), cache_dir=folder), "train"
        )
        for side in given.sides:
            path = Path(folder) / f"{side}.beton"
            beton_writer.write(zipped, path, beton_writer.Settings(max_side=side), num_workers=1)
            source = open_source(DataConfig(root=str(path)), "train")
            assert isinstance(source, Beton)
            print(f"max side {side}: {path.stat().st_size / 600e3:.0f} KB an image", flush=True)
            for recipe in given.recipes:
                times = race(source, RECIPES[recipe], given.threads, given.rounds, given.images)
                for name, rounds in times.items():
                    speeds, cpu = zip(*rounds)
                    spread = f"{min(speeds):.0f} to {max(speeds):.0f}"
                    print(
                        f"  {recipe:<11} {name:<20} {statistics.median(speeds):7.0f} images/s ({spread}), {statistics.median(cpu):6.2f} CPU ms an image"
                    )
                versus, by_cpu = ({
                    f"{mine}/{theirs}": statistics.median(ratio(a, b) for a, b in zip(times[mine], times[theirs]))
                    for mine in ("ours", "ours, bicubic") for theirs in list(times)[:3]
                } for ratio in (lambda a, b: a[0] / b[0], lambda a, b: b[1] / a[1]))  # fmt: skip
                print(
                    "  "
                    + "; ".join(
                        f"{name} {ratio:.2f} (by CPU time {by_cpu[name]:.2f})"
                        for name, ratio in versus.items()
                    ),
                    flush=True,
                )
                if side == given.sides[0]:
                    ratios |= {f"{recipe} {name}": ratio for name, ratio in versus.items()}
    compared = color_bench.compare()
    print(
        f"color, 256 x 3 x 224 x 224: ours {compared['ours']:.2f} s, kornia {compared['kornia']:.2f} s, "
        f"difference at most {compared['largest']:.2f} grey levels, {compared['mean']:.3f} in the mean"
    )
    multi = "2x224+6x96 ours"
    print(
        f"ratios: multicrop_vs_ffcv_per_view={ratios.get(f'{multi}/FFCV per view', float('nan')):.2f} "
        f"multicrop_vs_torchvision_tensor={ratios.get(f'{multi}/torchvision tensors', float('nan')):.2f} "
        f"multicrop_vs_pil={ratios.get(f'{multi}/torchvision PIL', float('nan')):.1f} "
        f"two_views_vs_ffcv_per_view={ratios.get('2x224 ours/FFCV per view', float('nan')):.2f} "
        f"color_vs_kornia={compared['ratio']:.2f}"
    )


if __name__ == "__main__":
    main()
