"""Load `ssl-pretrain serve` with mixed requests, verify every answer, and compare the time with
the same ONNX model called directly, in interleaved rounds of the same run.

    PYTHONPATH=. python tests/bench/serving.py exported/demo --requests 10000
    PYTHONPATH=. python tests/bench/serving.py exported/resnet50 --model int8 --requests 400

The images are those of --images, by default imagenet_sample.zip. Of the requests, 40 % ask for a
vector, 40 % for the similarity of a pair, 20 % for neighbors, and --malformed of all are malformed.
Expected vectors are computed by torch from the export, and for int8 by ONNX Runtime. In every round
a single client compares pairs first, then the direct calls take the same pairs, then --concurrency
clients send the mix.
"""

import argparse
import asyncio
import io
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import aiohttp
import numpy as np
import torch
from PIL import Image
from scipy.stats import spearmanr

sys.path[:0] = [str(Path(__file__).parent)]

from measure import DATA_FOLDER, versions

from ssl_pretrain.eval import export
from ssl_pretrain.eval.embedding.vector_index import VectorIndex, build_index
from ssl_pretrain.eval.exporting import onnx
from ssl_pretrain.eval.serving.served_network import FILES

TOLERANCE = 1e-4  # for a vector relative to its largest value, and for a cosine
NUM_NEIGHBORS = 5
PAIRS_PER_ROUND = 10  # for the single client, and for the direct calls
MIX = ("embed",) * 4 + ("similarity",) * 4 + ("neighbors",) * 2


@dataclass
class Truth:
    """Images and what the service must answer for them."""

    contents: list[bytes]
    vectors: np.ndarray  # features of the served model, computed offline
    float_vectors: np.ndarray  # features of torch
    index: VectorIndex

    def cosine(self, first: int, second: int, vectors: np.ndarray | None = None) -> float:
        a, b = (self.vectors if vectors is None else vectors)[[first, second]].astype(np.float64)
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@dataclass
class Record:
    """Measurements of all rounds."""

    seconds: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    cosines: list[tuple[float, float]] = field(default_factory=list)  # served, of torch
    load_seconds: float = 0.0
    num_loaded: int = 0


def main() -> None:
    """Run the rounds and print the tables."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    contents = read_images(options.images, options.num_images, options.side)
    session = onnx.open_session(options.export / FILES[options.model])
    truth = compute_truth(options.export, session, contents, options.model)
    record = Record()
    with tempfile.TemporaryDirectory() as folder:
        truth.index.save(Path(folder) / "index")
        with (Path(folder) / "log").open("w+") as log:
            server, address = start_server(options, Path(folder) / "index", log)
            try:
                metrics = asyncio.run(run_rounds(options, address, truth, session, record))
            finally:
                server.send_signal(signal.SIGTERM)
                status = server.wait(60)
            log.seek(0)
            if status or "Traceback" in log.read():
                record.wrong.append(f"the service ended with status {status}, or with a traceback")
    print_results(options, truth, record, metrics)
    sys.exit(1 if record.wrong else 0)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("export", type=Path)
    parser.add_argument("--model", choices=list(FILES), default="float")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--malformed", type=float, default=0.05)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--images", type=Path, default=DATA_FOLDER / "imagenet_sample.zip")
    parser.add_argument("--num-images", type=int, default=64)
    parser.add_argument("--side", type=int, help="shorter side of the images in pixels")
    return parser.parse_args()


def read_images(path: Path, num_images: int, side: int | None) -> list[bytes]:
    """Return JPEGs from a zip, spread over it, as they are or with this shorter side."""
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.lower().endswith((".jpeg", ".jpg"))]
        chosen = names[:: max(1, len(names) // num_images)][:num_images]
        contents = [archive.read(name) for name in chosen]
    return contents if side is None else [shrink(content, side) for content in contents]


def shrink(content: bytes, side: int) -> bytes:
    with Image.open(io.BytesIO(content)) as image:
        share = side / min(image.size)
        size = [max(1, round(length * share)) for length in image.size]
        file = io.BytesIO()
        image.convert("RGB").resize(size).save(file, "JPEG", quality=90)
    return file.getvalue()


@torch.no_grad()
def compute_truth(
    folder: Path, session: onnx.ImageEmbedder, contents: list[bytes], model: str
) -> Truth:
    backbone, transform = export.load(folder), export.load_transform(folder)
    images = [transform(content)[None] for content in contents]
    float_vectors = torch.cat([backbone(image) for image in images]).numpy()
    is_float = model == "float"
    vectors = float_vectors if is_float else torch.cat([session(i) for i in images]).numpy()
    index = build_index(vectors, [f"image_{number}" for number in range(len(contents))])
    return Truth(contents, vectors, float_vectors, index)


def start_server(
    options: argparse.Namespace, index: Path, log: TextIO
) -> tuple["subprocess.Popen[str]", str]:
    """Start the service on a free port and return it with its address."""
    command = [sys.executable, "-m", "ssl_pretrain.cli", "serve", str(options.export)]
    arguments = ["--index", str(index), "--port", "0", "--model", options.model]
    arguments += ["--threads", str(options.threads)]
    server = subprocess.Popen(command + arguments, stdout=subprocess.PIPE, stderr=log, text=True)
    assert server.stdout is not None
    line = server.stdout.readline()
    found = re.search(r"http://[^ ,]+", line)
    if found is None:
        log.seek(0)
        raise SystemExit(f"the service did not start: {line}{log.read()}")
    return server, found[0]


async def run_rounds(
    options: argparse.Namespace,
    address: str,
    truth: Truth,
    session: onnx.ImageEmbedder,
    record: Record,
) -> str:
    """Run all rounds and return the metrics of the service."""
    rng = np.random.default_rng(0)
    per_round = options.requests // options.rounds - PAIRS_PER_ROUND
    if per_round < 1:
        fewest = options.rounds * (PAIRS_PER_ROUND + 1)
        raise SystemExit(
            f"--requests {options.requests}: give at least {fewest}, or fewer --rounds"
        )
    transform = export.load_transform(options.export)
    timeout = aiohttp.ClientTimeout(total=120)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(address, timeout=timeout, connector=connector) as client:
        for _ in range(options.rounds):
            pairs = rng.integers(len(truth.contents), size=(PAIRS_PER_ROUND, 2))
            for first, second in pairs:
                await compare(client, truth, record, first, second, "alone: similarity")
            await asyncio.to_thread(call_directly, transform, session, truth, pairs, record)
            plans = [plan(rng, options.malformed, len(truth.contents)) for _ in range(per_round)]
            queue = iter(plans)
            start = time.perf_counter()
            await asyncio.gather(
                *(work(client, truth, record, queue) for _ in range(options.concurrency))
            )
            record.load_seconds += time.perf_counter() - start
            record.num_loaded += per_round
        async with client.get("/readyz") as answer:
            if answer.status != 200:
                record.wrong.append("the service is not ready after the load")
        async with client.get("/metrics") as answer:
            return await answer.text()


def call_directly(
    transform: Callable[[bytes], torch.Tensor],
    session: onnx.ImageEmbedder,
    truth: Truth,
    pairs: np.ndarray,
    record: Record,
) -> None:
    """Time the network on pairs, and the whole of decoding, transform and network."""
    for pair in pairs:
        start = time.perf_counter()
        images = torch.stack([transform(truth.contents[number]) for number in pair])
        decoded = time.perf_counter()
        session(images)
        end = time.perf_counter()
        record.seconds["direct: network"].append(end - decoded)
        record.seconds["direct: decode, transform, network"].append(end - start)


def plan(rng: np.random.Generator, malformed: float, num_images: int) -> tuple[str, int, int]:
    """Choose a request: its kind, and its two images or the number of a malformed one."""
    first, second = (int(number) for number in rng.integers(num_images, size=2))
    if rng.random() < malformed:
        return "malformed", int(rng.integers(len(MALFORMED))), second
    return MIX[rng.integers(len(MIX))], first, second


async def work(
    client: aiohttp.ClientSession,
    truth: Truth,
    record: Record,
    queue: Iterator[tuple[str, int, int]],
) -> None:
    """Send requests one after another until none is left."""
    for kind, first, second in queue:
        try:
            if kind == "malformed":
                await send_malformed(client, truth, record, first, second)
            elif kind == "embed":
                await embed(client, truth, record, first)
            elif kind == "similarity":
                await compare(client, truth, record, first, second, "similarity")
            else:
                await find_neighbors(client, truth, record, first)
        except (TimeoutError, aiohttp.ClientError) as error:
            record.wrong.append(f"{kind}: {type(error).__name__} {error}")


async def post(
    client: aiohttp.ClientSession, record: Record, kind: str, path: str, **body: object
) -> dict:
    """Send a request, record its time, and return its answer, or {} after a wrong status."""
    start = time.perf_counter()
    async with client.post(path, **body) as answer:
        content = await answer.read()
    record.seconds[kind].append(time.perf_counter() - start)
    record.statuses[answer.status] += 1
    if answer.status != 200:
        record.wrong.append(f"{kind}: status {answer.status}: {content[:200]!r}")
        return {}
    return json.loads(content)


def form(**files: bytes) -> aiohttp.FormData:
    data = aiohttp.FormData()
    for name, content in files.items():
        data.add_field(name, content, filename=f"{name}.jpg")
    return data


async def embed(client: aiohttp.ClientSession, truth: Truth, record: Record, number: int) -> None:
    answer = await post(client, record, "embed", "/embed", data=truth.contents[number])
    if answer:
        expected = truth.vectors[number]
        difference = np.abs(np.array(answer["vector"], np.float32) - expected).max()
        if not difference <= TOLERANCE * np.abs(expected).max():
            record.wrong.append(f"embed: image {number} differs by {difference:.2g}")


async def compare(
    client: aiohttp.ClientSession,
    truth: Truth,
    record: Record,
    first: int,
    second: int,
    kind: str,
) -> None:
    data = form(image_a=truth.contents[first], image_b=truth.contents[second])
    answer = await post(client, record, kind, "/similarity", data=data)
    if answer:
        expected = truth.cosine(first, second)
        if not abs(answer["cosine"] - expected) <= TOLERANCE:
            record.wrong.append(f"similarity: {answer['cosine']} instead of {expected}")
        if first != second:
            offline = truth.cosine(first, second, truth.float_vectors)
            record.cosines.append((answer["cosine"], offline))


async def find_neighbors(
    client: aiohttp.ClientSession, truth: Truth, record: Record, number: int
) -> None:
    path = f"/neighbors?k={NUM_NEIGHBORS}"
    answer = await post(client, record, "neighbors", path, data=form(image=truth.contents[number]))
    if answer:
        _, (expected,) = truth.index.search(truth.vectors[[number]], NUM_NEIGHBORS)
        scores = [neighbor["score"] for neighbor in answer["neighbors"]]
        numbers = [int(neighbor["id"].removeprefix("image_")) for neighbor in answer["neighbors"]]
        own = [truth.cosine(number, other) for other in numbers]  # ids may swap places in a tie
        if not (
            np.allclose(scores, expected, atol=TOLERANCE, rtol=0)
            and np.allclose(scores, own, atol=TOLERANCE, rtol=0)
        ):
            record.wrong.append(f"neighbors: of image {number}: {answer['neighbors']}")


def png_of_many_pixels(content: bytes) -> bytes:
    size = (60_000).to_bytes(4)
    return b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4) + b"IHDR" + size * 2 + b"\x08\x02\0\0\0\0\0\0\0"


# Malformed requests: path, body made of an image, and the status that must answer it.
MALFORMED: list[tuple[str, Callable[[bytes], object], int]] = [
    ("/embed", lambda content: content[: len(content) // 2], 422),
    ("/embed", lambda content: b"", 422),
    ("/embed", lambda content: b"%PDF-1.7" + content, 415),
    ("/embed", lambda content: content[::-1], 415),
    ("/embed", png_of_many_pixels, 413),
    ("/embed", lambda content: bytes(21_000_000), 413),
    ("/embed", lambda content: form(file=content), 422),
    ("/similarity", lambda content: form(image_a=content), 422),
    ("/similarity", lambda content: form(image_a=content, image_b=content[:999]), 422),
    ("/similarity", lambda content: content, 422),
    ("/neighbors?k=0", lambda content: content, 422),
    ("/neighbors?k=many", lambda content: content, 422),
    ("/nowhere", lambda content: content, 404),
]


async def send_malformed(
    client: aiohttp.ClientSession, truth: Truth, record: Record, number: int, image: int
) -> None:
    path, make, expected = MALFORMED[number]
    body = make(truth.contents[image])
    async with client.post(path, data=body) as answer:
        content = await answer.json()
    record.statuses[answer.status] += 1
    if answer.status != expected or not content.get("error") or not content.get("remedy"):
        record.wrong.append(f"malformed {number}: status {answer.status}, {content}")


def print_results(options: argparse.Namespace, truth: Truth, record: Record, metrics: str) -> None:
    print(versions("onnxruntime", "fastapi", "uvicorn"))
    print(
        f"{options.model}, {truth.vectors.shape[1]} numbers per image, {len(truth.contents)} images"
        f" of {np.mean([len(content) for content in truth.contents]) / 1000:.0f} kB on average,"
        f" {options.threads} threads, {options.concurrency} clients\n"
    )
    print(f"{'milliseconds':36} {'number':>7} {'p50':>8} {'p95':>8} {'p99':>8}")
    for kind, seconds in sorted(record.seconds.items()):
        p50, p95, p99 = 1000 * np.percentile(seconds, [50, 95, 99])
        print(f"{kind:36} {len(seconds):7,} {p50:8.2f} {p95:8.2f} {p99:8.2f}")
    for stage in ("read", "decode", "wait", "network"):
        total, number = (
            metric(metrics, f'ssl_pretrain_stage_seconds_{kind}{{stage="{stage}"}}')
            for kind in ("sum", "count")
        )
        print(
            f"{'service, mean of stage: ' + stage:36} {number:7,.0f} {1000 * total / number:8.2f}"
        )
    batches = metric(metrics, "ssl_pretrain_batch_images_count")
    print(
        f"\n{record.num_loaded:,} requests of {options.concurrency} clients in"
        f" {record.load_seconds:.0f} s: {record.num_loaded / record.load_seconds:.1f} per second;"
        f" {metric(metrics, 'ssl_pretrain_batch_images_sum') / batches:.2f} images per batch"
    )
    print(f"statuses: {dict(sorted(record.statuses.items()))}")
    print(f"memory of the service: {metric(metrics, 'process_resident_memory_bytes') / 1e6:.0f} MB")
    served, offline = np.array(record.cosines).T
    correlation = spearmanr(served, offline).statistic
    print(
        f"similarity beside torch's: rank correlation {correlation:.4f}, largest difference"
        f" {np.abs(served - offline).max():.1e}, over {len(served):,} pairs"
    )
    print(f"wrong answers: {len(record.wrong)}")
    for text in record.wrong[:10]:
        print(f"  {text}")
    medians = {kind: np.median(seconds) for kind, seconds in record.seconds.items()}
    whole = medians["direct: decode, transform, network"]
    images = metric(metrics, "ssl_pretrain_batch_images_sum")
    ratios = {
        "pair_to_network": medians["alone: similarity"] / medians["direct: network"],
        "pair_to_decode_and_network": medians["alone: similarity"] / whole,
        "throughput_to_decode_and_network": images / record.load_seconds / (2 / whole),
        "wrong": len(record.wrong),
        "rank_correlation": correlation,
    }
    print("ratios:", *(f"{name}={ratio:.3f}" for name, ratio in ratios.items()))


def metric(metrics: str, name: str) -> float:
    """Return the value of a metric."""
    lines = (line for line in metrics.splitlines() if line.startswith(f"{name} "))
    return float(next(lines).split()[-1])


if __name__ == "__main__":
    main()
