"""Compare loaders in one run, warmed up and in interleaved rounds.

    PYTHONPATH=. OMP_NUM_THREADS=1 python tests/bench/loader.py

The images are those of imagenet_sample.zip, written by `ssl_pretrain.data.beton` at each of
--sides and repeated. All contenders read the same JPEGs from the same file with the same number of
threads.

    ours                 native/threads.py: each image is decoded once for all crops
    ours, FFCV decodes   the same with data.loader=ffcv, if FFCV is installed
    FFCV per view        like FFCV-SSL: one pipeline per view, which decodes the image again
    torchvision tensors  worker processes, decode_jpeg, RandomResizedCrop on uint8 tensors, flip
    torchvision PIL      worker processes, SimCLR's whole augmentation on Pillow images

Colors are compared by `color.py`, on one batch of 256 x 3 x 224 x 224 on the CPU.
"""

import argparse
import importlib.util
import io
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
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
from measure import DATA_FOLDER

from ssl_pretrain.data.beton import beton_writer
from ssl_pretrain.data.beton.beton_source import Beton
from ssl_pretrain.data.beton.encoder import EncodingSettings
from ssl_pretrain.data.chunks import ChunkRequest
from ssl_pretrain.data.native.threads import ThreadPool
from ssl_pretrain.data.native.view_makers import DecodedImages, FFCVImages
from ssl_pretrain.data.order import BatchPlan
from ssl_pretrain.data.sources import DataConfig, open_source
from ssl_pretrain.views.recipe import Crop

BATCH = 100
HAS_FFCV = importlib.util.find_spec("ffcv") is not None
RECIPES = {
    "2x224+6x96": [Crop(size=224, scale=[0.25, 1.0])] * 2 + [Crop(size=96, scale=[0.05, 0.25])] * 6,
    "2x224": [Crop(size=224, scale=[0.25, 1.0])] * 2,
}
Contender = Callable[[int], int]  # loads about that many images and returns the exact number


def cpu_seconds(pids: list[int]) -> float:
    """Return the user and system time of this process and of the processes `pids`."""
    ticks = 0
    for pid in [os.getpid(), *pids]:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


class Ours:
    """Threads of compiled code that decode each image once for all crops."""

    def __init__(self, source: Beton, view_crops: list[Crop], threads: int, images=DecodedImages):
        requests = (
            ChunkRequest(step, np.random.default_rng(step).integers(0, len(source), BATCH))
            for step in itertools.count()
        )
        self.pool = ThreadPool(
            source,
            images(source, view_crops, BATCH, seed=0),
            view_crops,
            BatchPlan(0, len(source), BATCH),
            threads,
            2,
            torch.device("cpu"),
        )
        self.chunks = self.pool.make_chunks(requests)
        self.pids: list[int] = []
        self.num_buffered = 4 * BATCH

    def __call__(self, images: int) -> int:
        for _ in range(images // BATCH):
            next(self.chunks)
        return images // BATCH * BATCH

    def close(self) -> None:
        self.pool.close()


class FFCVPerView:
    """FFCV's loader with one pipeline per view."""

    def __init__(self, source: Beton, view_crops: list[Crop], threads: int):
        from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
        from ffcv.loader import Loader, OrderOption
        from ffcv.pipeline.pipeline_spec import PipelineSpec

        def build_decoder(crop: Crop):
            return RandomResizedCropRGBImageDecoder(
                (crop.size, crop.size), tuple(crop.scale), tuple(crop.ratio)
            )

        pipelines = {"image": [build_decoder(view_crops[0])], "label": [IntDecoder()]}
        pipelines |= {
            f"view{number}": PipelineSpec("image", decoder=build_decoder(crop))
            for number, crop in enumerate(view_crops[1:], 1)
        }
        indices = np.tile(np.arange(len(source)), 50)
        options = {
            "order": OrderOption.RANDOM,
            "os_cache": True,
            "drop_last": True,
            "indices": indices,
            "pipelines": pipelines,
        }
        self.batches = iter(
            Loader(source.full_path, batch_size=BATCH, num_workers=threads, **options)
        )
        self.pids: list[int] = []
        self.num_buffered = 4 * BATCH

    def __call__(self, images: int) -> int:
        for _ in range(images // BATCH):
            next(self.batches)
        return images // BATCH * BATCH

    def close(self) -> None:
        self.batches.close()


class CropDataset(Dataset):
    """Crops by torchvision, on uint8 tensors or on Pillow images with SimCLR's colors."""

    def __init__(self, source: Beton, view_crops: list[Crop], with_pillow: bool):
        self.source, self.view_crops, self.with_pillow = source, view_crops, with_pillow
        mode = F.InterpolationMode(view_crops[0].interpolation)
        self.crops = [
            v2.RandomResizedCrop(crop.size, tuple(crop.scale), interpolation=mode, antialias=True)
            for crop in view_crops
        ]
        jitter = v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8)
        self.colors = []
        for crop in view_crops:
            blur = v2.RandomApply([v2.GaussianBlur(max(3, crop.size // 10 | 1), (0.1, 2.0))], 0.5)
            operations = [v2.RandomHorizontalFlip(), jitter, v2.RandomGrayscale(0.2), blur]
            self.colors.append(v2.Compose([*operations, v2.PILToTensor()]))

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


class TorchvisionLoader:
    """Worker processes of torch's loader with torchvision's transforms."""

    def __init__(self, source: Beton, view_crops: list[Crop], threads: int, with_pillow: bool):
        torch.manual_seed(0)
        self.batch = 16 if with_pillow else BATCH
        loader = DataLoader(
            CropDataset(source, view_crops, with_pillow),
            self.batch,
            shuffle=True,
            num_workers=threads,
            drop_last=True,
            multiprocessing_context="fork",
        )
        self.batches: Iterator = iter(loader)
        self.pids = [worker.pid for worker in self.batches._workers]
        self.num_buffered = 2 * threads * self.batch

    def __call__(self, images: int) -> int:
        for _ in range(max(1, images // self.batch)):
            next(self.batches)
        return max(1, images // self.batch) * self.batch

    def close(self) -> None:
        self.batches._shutdown_workers()


def measure(contender: Contender, images: int) -> tuple[float, float]:
    """Return images per second and CPU milliseconds per image, with empty buffers at the start."""
    contender(contender.num_buffered)
    cpu, start = cpu_seconds(contender.pids), time.perf_counter()
    num_images = contender(images)
    seconds = time.perf_counter() - start
    return num_images / seconds, 1000 * (cpu_seconds(contender.pids) - cpu) / num_images


def wait_until_idle(pids: list[int]) -> None:
    """Wait until all contenders have filled their buffers and none computes."""
    while True:
        before = cpu_seconds(pids)
        time.sleep(1.0)
        if cpu_seconds(pids) - before < 0.05:
            return


def measure_all(
    source: Beton, view_crops: list[Crop], threads: int, rounds: int, images: int
) -> dict[str, list[tuple[float, float]]]:
    """Measure the contenders in turn, in several rounds. The others idle with full buffers."""
    bicubic = [replace(crop, interpolation="bicubic") for crop in view_crops]
    contenders = {  # torchvision's processes must be forked before threads start
        "torchvision tensors": TorchvisionLoader(source, view_crops, threads, False),
        "torchvision PIL": TorchvisionLoader(source, view_crops, threads, True),
        "ours": Ours(source, view_crops, threads),
        "ours, bicubic": Ours(source, bicubic, threads),
    }
    if HAS_FFCV:
        contenders["ours, FFCV decodes"] = Ours(source, view_crops, threads, FFCVImages)
        contenders["FFCV per view"] = FFCVPerView(source, view_crops, threads)
    num_images = {"FFCV per view": images // 3, "torchvision PIL": images // 16}
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for contender in contenders.values():
        contender(contender.num_buffered)  # compiles, and reads the file into memory
    pids = [pid for contender in contenders.values() for pid in contender.pids]
    for _ in range(rounds):
        for name, contender in contenders.items():
            wait_until_idle(pids)
            results[name].append(measure(contender, num_images.get(name, images)))
    for contender in contenders.values():
        contender.close()
    return results


def compare(results: dict[str, list[tuple[float, float]]]) -> dict[str, tuple[float, float]]:
    """Return the median speedup of ours over the others, by wall clock and by CPU time."""
    speedups = {}
    for mine in ("ours", "ours, bicubic"):
        for other in results.keys() - {"ours", "ours, bicubic"}:
            rounds = list(zip(results[mine], results[other]))
            wall = statistics.median(ours[0] / theirs[0] for ours, theirs in rounds)
            cpu = statistics.median(theirs[1] / ours[1] for ours, theirs in rounds)
            speedups[f"{mine}/{other}"] = (wall, cpu)
    return speedups


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=DATA_FOLDER,
    )
    parser.add_argument("--sides", type=int, nargs="+", default=[500, 400, 256])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--images",
        type=int,
        default=1200,
        help="images per contender and round (FFCV: a third, PIL: a 16th)",
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        zip_source = open_source(
            DataConfig(root=str(args.data / "imagenet_sample.zip"), cache_dir=folder), "train"
        )
        for side in args.sides:
            path = Path(folder) / f"{side}.beton"
            beton_writer.write(zip_source, path, EncodingSettings(max_side=side), num_workers=1)
            source = open_source(DataConfig(root=str(path)), "train")
            assert isinstance(source, Beton)
            print(f"max side {side}: {path.stat().st_size / 600e3:.0f} KB per image", flush=True)
            for recipe in args.recipes:
                results = measure_all(
                    source, RECIPES[recipe], args.threads, args.rounds, args.images
                )
                for name, rounds in results.items():
                    speeds, cpu = zip(*rounds)
                    spread = f"{min(speeds):.0f} to {max(speeds):.0f}"
                    print(
                        f"  {recipe:<11} {name:<20} {statistics.median(speeds):7.0f} images/s "
                        f"({spread}), {statistics.median(cpu):6.2f} CPU ms per image"
                    )
                speedups = compare(results)
                texts = [
                    f"{name} {wall:.2f} (by CPU time {cpu:.2f})"
                    for name, (wall, cpu) in speedups.items()
                ]
                print("  " + "; ".join(texts), flush=True)
                if side == args.sides[0]:
                    ratios |= {f"{recipe} {name}": wall for name, (wall, _) in speedups.items()}
    colors = color_bench.compare()
    print(
        f"color, 256 x 3 x 224 x 224: ours {colors['ours']:.2f} s, "
        f"kornia {colors['kornia']:.2f} s, difference at most {colors['largest']:.2f} gray levels, "
        f"{colors['mean']:.3f} on average"
    )
    names = {
        "wheel_vs_ffcv": "2x224+6x96 ours/ours, FFCV decodes",
        "multicrop_vs_ffcv_per_view": "2x224+6x96 ours/FFCV per view",
        "multicrop_vs_torchvision_tensor": "2x224+6x96 ours/torchvision tensors",
        "multicrop_vs_pil": "2x224+6x96 ours/torchvision PIL",
        "two_views_vs_ffcv_per_view": "2x224 ours/FFCV per view",
    }
    texts = [f"{name}={ratios[pair]:.3g}" for name, pair in names.items() if pair in ratios]
    print(f"ratios: {' '.join(texts)} color_vs_kornia={colors['ratio']:.2f}")


if __name__ == "__main__":
    main()
