"""Compare threads with worker processes that read image files, in interleaved rounds.

    PYTHONPATH=. OMP_NUM_THREADS=1 python tests/bench/image_files.py

The images are the 600 of imagenet_sample.zip, once as its JPEGs and once as PNGs of the same size.
Pillow decodes a PNG, and holds Python's global lock for a part of that. Both contenders make the
two crops of SimCLR's recipe, which are the same bits.
"""

import argparse
import io
import itertools
import statistics
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from PIL import Image

sys.path[:0] = [str(Path(__file__).parent)]

from loader import BATCH, RECIPES, measure, wait_until_idle
from measure import DATA_FOLDER

from ssl_pretrain.data.chunks import ChunkRequest
from ssl_pretrain.data.image_source import Source
from ssl_pretrain.data.order import BatchPlan
from ssl_pretrain.data.readers import ReaderKind, build_reader
from ssl_pretrain.data.sources import DataConfig, open_source
from ssl_pretrain.views.recipe import ViewsConfig

KINDS = {"processes": ReaderKind.PROCESSES, "threads": ReaderKind.THREADS}


class ImageFileReader:
    """Threads or worker processes that make the views of image files, as in a run."""

    def __init__(self, source: Source, kind: ReaderKind, num_workers: int):
        views = ViewsConfig(crops={"global": RECIPES["2x224"][0]})
        views.crops["global"].count = 2
        plan = BatchPlan(0, len(source), BATCH)
        self.reader = build_reader(source, views, plan, kind, num_workers=num_workers)
        self.chunks = self.reader.pool.make_chunks(self._requests(plan))
        loader = getattr(self.reader.pool, "_loader", None)
        has_processes = loader is not None
        self.pids = [worker.pid for worker in loader._iterator._workers] if has_processes else []
        self.num_buffered = 6 * BATCH

    def _requests(self, plan: BatchPlan):
        for step in itertools.count():
            indices = plan.indices(step)
            for start in range(0, BATCH, self.reader.chunk_size):
                chunk = indices[start : start + self.reader.chunk_size]
                yield ChunkRequest(plan.epoch(step), chunk, step, start)

    def __call__(self, images: int) -> int:
        num_images = 0
        while num_images < images:
            num_images += len(next(self.chunks).labels)
        return num_images


def write_pngs(archive: Path, path: Path) -> None:
    """Write the images of a zip as PNGs to another zip."""
    with zipfile.ZipFile(archive) as images, zipfile.ZipFile(path, "w") as output:
        for name in images.namelist():
            if not name.lower().endswith((".jpg", ".jpeg")):
                continue
            file = io.BytesIO()
            Image.open(io.BytesIO(images.read(name))).convert("RGB").save(
                file, "PNG", compress_level=1
            )
            output.writestr(str(Path(name).with_suffix(".png")), file.getvalue())


def compare(root: Path, num_workers: int, rounds: int, images: int, cache: str) -> float:
    """Print the speed of both contenders, and return the median ratio of threads to processes."""
    source = open_source(DataConfig(root=str(root), cache_dir=cache), "train")
    readers = {name: ImageFileReader(source, kind, num_workers) for name, kind in KINDS.items()}
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in readers}
    for reader in readers.values():
        reader(reader.num_buffered)  # compiles, and reads the files into memory
    for _ in range(rounds):
        for name, reader in readers.items():
            wait_until_idle(readers["processes"].pids)
            results[name].append(measure(reader, images))
    for reader in readers.values():
        reader.reader.pool.close()
    for name, values in results.items():
        speeds, cpu = zip(*values)
        print(
            f"  {name:<10} {statistics.median(speeds):6.0f} images/s "
            f"({min(speeds):.0f} to {max(speeds):.0f}), {statistics.median(cpu):5.2f} CPU ms per "
            "image",
            flush=True,
        )
    pairs = zip(results["threads"], results["processes"])
    return statistics.median(threads[0] / processes[0] for threads, processes in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=DATA_FOLDER,
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=1200, help="images per contender and round")
    args = parser.parse_args()
    torch.set_num_threads(1)
    jpegs = args.data / "imagenet_sample.zip"
    with tempfile.TemporaryDirectory() as folder:
        pngs = Path(folder) / "pngs.zip"
        write_pngs(jpegs, pngs)
        ratios = {}
        for name, path in {"jpeg": jpegs, "png": pngs}.items():
            print(f"{name}, 2 x 224, {args.workers} workers:")
            ratios[name] = compare(path, args.workers, args.rounds, args.images, folder)
    texts = [f"{name}_threads_vs_processes={ratio:.3g}" for name, ratio in ratios.items()]
    print(f"ratios: {' '.join(texts)}")


if __name__ == "__main__":
    main()
