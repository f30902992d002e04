"""Write, open and build the indexes of tar shards with 1.28 million images.

    PYTHONPATH=. .venv/bin/python tests/bench/tar_index.py [--images 1280000] [--shards 128]

The shards are sparse files of the right size, and their indexes are synthetic, with keys, labels
and captions. Opening verifies the size and the date of every shard. The memory is that of a new
process that opens the data set, less what it used before. The build reads the headers of one real
shard of --build images, each with a label and a JSON, from the page cache.
"""

import argparse
import io
import os
import pickle
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np

from ssl_pretrain.data.sources import DataConfig, open_source
from ssl_pretrain.data.tar.index_files import build_index, index_beside, local_shard
from ssl_pretrain.data.tar.shard_index import ShardIndex, save_index

IMAGE_BYTES = 110_000  # mean size of an image of ImageNet
OPEN = """
import resource, sys, time
import numpy as np
from ssl_pretrain.data.sources import DataConfig, open_source
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start, start_cpu = time.perf_counter(), time.process_time()
source = open_source(DataConfig(root=sys.argv[1]), "train")
seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(len(source), seconds, cpu_seconds, kib / 1024)
"""


def write_synthetic_shards(folder: Path, num_images: int, num_shards: int) -> float:
    """Write the indexes, and return the CPU seconds of that, without the sparse shards."""
    generator = np.random.default_rng(0)
    seconds = 0.0
    per_shard = num_images // num_shards
    for number in range(num_shards):
        lengths = generator.integers(IMAGE_BYTES // 2, IMAGE_BYTES * 3 // 2, per_shard)
        offsets = np.cumsum(lengths // 512 * 512 + 4 * 512)
        path = folder / f"train-{number:06d}.tar"
        with path.open("wb") as file:
            file.truncate(int(offsets[-1] + lengths[-1]))
        keys = [b"%09d" % (number * per_shard + row) for row in range(per_shard)]
        shard = local_shard(path)
        start = time.process_time()
        index = ShardIndex(
            shard.size,
            shard.version,
            packed_keys=np.frombuffer(b"".join(keys), np.uint8),
            key_ends=np.cumsum([len(key) for key in keys]),
            offset=offsets,
            length=lengths,
            label=generator.integers(0, 1000, per_shard),
            caption_offset=offsets + lengths,
            caption_length=np.full(per_shard, 60),
            label_names=tuple(map(str, range(1000))),
        )
        save_index(index, index_beside(path))
        seconds += time.process_time() - start
    return seconds


def measure_build(folder: Path, num_images: int) -> float:
    """Return the images per second of CPU time of building an index."""
    path = folder / "real.tar"
    with tarfile.open(path, "w") as archive:
        for number in range(num_images):
            for suffix, size in (("jpg", 20_000), ("cls", 3), ("json", 60)):
                header = tarfile.TarInfo(f"{number:09d}.{suffix}")
                header.size = size
                content = {"jpg": bytes(size), "cls": b"123"}.get(
                    suffix, b'{"label": 123}'.ljust(size)
                )
                archive.addfile(header, io.BytesIO(content))
    build_index(local_shard(path))  # fills the page cache
    start = time.process_time()
    index = build_index(local_shard(path))
    seconds = time.process_time() - start
    assert len(index) == num_images
    path.unlink()
    return num_images / seconds


def main() -> None:
    """Print the measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1_280_000)
    parser.add_argument("--shards", type=int, default=128)
    parser.add_argument("--build", type=int, default=10_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_rate = measure_build(folder, args.build)
        write_seconds = write_synthetic_shards(folder, args.images, args.shards)
        num_bytes = sum(path.stat().st_size for path in folder.glob("*.index"))
        output = subprocess.run(
            [sys.executable, "-c", OPEN, name],
            env=os.environ | {"PYTHONPATH": "."},
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split()
        assert int(output[0]) == args.images // args.shards * args.shards
        open_seconds, open_cpu_seconds, open_mib = map(float, output[1:])
        source = open_source(DataConfig(root=name), "train")
        start = time.process_time()
        pickled = pickle.dumps(source, protocol=5)
        pickle_seconds = time.process_time() - start
        start = time.process_time()
        _ = source.fingerprint
        fingerprint_seconds = time.process_time() - start
    print(f"{args.images:,} images in {args.shards} shards; index {num_bytes / 1e6:.1f} MB")
    print(f"build: {build_rate:,.0f} images per second of one core, from the page cache")
    print(f"write: {write_seconds:.2f} s of CPU time")
    print(
        f"open: {open_seconds:.2f} s, {open_cpu_seconds:.2f} s of CPU time, {open_mib:.0f} MiB "
        "more memory at the peak"
    )
    print(
        f"pickled source: {len(pickled) / 1e6:.1f} MB in {pickle_seconds:.2f} s; fingerprint "
        f"{fingerprint_seconds:.2f} s"
    )
    print(
        f"ratios: index_bytes_per_image={num_bytes / args.images:.1f} "
        f"open_cpu_seconds_per_million={open_cpu_seconds / args.images * 1e6:.2f} "
        f"open_mib_per_million={open_mib / args.images * 1e6:.0f} "
        f"build_thousand_images_per_second={build_rate / 1000:.1f}"
    )


if __name__ == "__main__":
    main()
