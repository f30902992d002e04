"""Compare training on a CPU with the earlier settings and with lightly's own loop.

PYTHONPATH=. .venv/bin/python tests/bench/cpu.py --data cifar10.zip [--rounds 9]

Each candidate is a process of its own that trains from the images of CIFAR-10, with the loader, on
two cores. It takes one segment of steps when its turn comes, so all candidates share the same slow
and fast minutes of the machine. The earlier settings are float32, with glibc's default of returning
freed memory to the system, and, for the CIFAR-10 preset, two ranks of one thread. lightly's loop is
that of its SimCLR example, with the same network, batch and views, in float32. Install lightly for
it, or leave it out with --without-lightly.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import torch
from measure import DATA_FOLDER, format_mib, versions

from ssl_pretrain.system.import_path import child_environment

ROOT = Path(__file__).resolve().parents[2]
NUM_CORES = 2
NUM_LIGHTLY_IMAGES = 10_000  # images that are unpacked for lightly's folder
FLOAT32, TWO_THREADS = "parallel.precision=float32", "parallel.threads=2"
QUIET = (
    "epochs=1000",
    "checkpoint.every_epochs=0",
    "online.knn_every_epochs=0",
    "log.wandb=off",
    "parallel.timeout_seconds=1e6",
)
IMAGES_96 = (
    "backbone.name=resnet10t",
    "backbone.stem=imagenet",
    "views.crops.global.size=96",
    "global_batch_size=64",
)


@dataclass
class Candidate:
    """Something to time, and the settings of its process."""

    name: str
    overrides: tuple[str, ...] = ()
    config: str = "configs/simclr_cifar10_cpu.yaml"
    num_ranks: int = 1
    keeps_memory: bool = True
    lightly_workers: int | None = None  # None for our trainer
    batch_size: int = 256
    num_steps: int = 8  # per segment
    segment_seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    @property
    def is_lightly(self) -> bool:
        """True if lightly's loop trains."""
        return self.lightly_workers is not None

    def describe(self) -> str:
        """Return the median and the range of the speed, and the peak memory."""
        num_images = self.batch_size * self.num_steps
        speeds = sorted(num_images / seconds for seconds in self.segment_seconds)
        return (
            f"{statistics.median(speeds):,.0f} images/s ({speeds[0]:,.0f} to {speeds[-1]:,.0f}), "
            f"peak memory {format_mib(self.peak_bytes)}"
        )


SCENARIOS = {
    "resnet_96px": [
        Candidate("earlier", (*IMAGES_96, FLOAT32, TWO_THREADS), batch_size=64, keeps_memory=False),
        Candidate("shipped", (*IMAGES_96, TWO_THREADS), batch_size=64),
    ],
    "cifar10": [
        Candidate("earlier", (FLOAT32, "parallel.threads=1"), num_ranks=2, keeps_memory=False),
        Candidate("shipped"),
        Candidate("lightly, no workers", lightly_workers=0),
        Candidate("lightly, 2 workers", lightly_workers=2),
    ],
}


class GatedLoader:
    """Loader that waits for the parent's word before each segment of steps."""

    def __init__(self, loader: Any, connection: Connection | None, num_steps: int):
        self.loader, self.connection, self.num_steps = loader, connection, num_steps

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def iterate_from(self, step: int) -> Iterator[Any]:
        yield from gate(self.loader.iterate_from(step), self.connection, self.num_steps)


def gate(batches: Iterator[Any], connection: Connection | None, num_steps: int) -> Iterator[Any]:
    """Yield batches. After each segment, report its seconds and wait for the next turn."""
    start = time.perf_counter()
    for number, batch in enumerate(batches):
        if number % num_steps == 0 and connection is not None:
            connection.send(time.perf_counter() - start)
            connection.recv()
            start = time.perf_counter()
        yield batch


def train_ours(candidate: Candidate, data: str, output: str, connection: Connection | None) -> None:
    """Train with the shipped trainer until the parent ends this process."""
    from contextlib import contextmanager

    from ssl_pretrain import build, config, train
    from ssl_pretrain.distributed import process_group
    from ssl_pretrain.system import allocator

    if not candidate.keeps_memory:
        allocator.keep_freed_memory = lambda: False
    build_loader = build.build_loader

    @contextmanager
    def build_gated_loader(*arguments: Any, **keywords: Any) -> Iterator[Any]:
        with build_loader(*arguments, **keywords) as loader:
            yield GatedLoader(loader, connection, candidate.num_steps)

    build.build_loader = build_gated_loader
    overrides = [f"data.root={data}", *QUIET, *candidate.overrides, f"output={output}"]
    settings = config.load(ROOT / candidate.config, overrides)
    parallel = settings.parallel
    device = process_group.start(parallel.threads, timeout_seconds=parallel.timeout_seconds)
    train.train_and_report(settings, device, None, None)


def train_lightly(candidate: Candidate, folder: str, connection: Connection) -> None:
    """Train as lightly's SimCLR example does, until the parent ends this process."""
    from lightly.data import LightlyDataset
    from lightly.loss import NTXentLoss
    from lightly.models.modules.heads import SimCLRProjectionHead
    from lightly.transforms import SimCLRTransform

    from ssl_pretrain import config
    from ssl_pretrain.models import backbones

    torch.set_num_threads(NUM_CORES)
    settings = config.load(ROOT / candidate.config, [])
    crop = settings.views.crops["global"]
    transform = SimCLRTransform(
        input_size=crop.size,
        cj_prob=crop.jitter,
        cj_bright=crop.brightness,
        cj_contrast=crop.contrast,
        cj_sat=crop.saturation,
        cj_hue=crop.hue,
        cj_strength=1.0,
        min_scale=crop.scale[0],
        random_gray_scale=crop.grayscale,
        gaussian_blur=0.0,
    )
    loader = torch.utils.data.DataLoader(
        LightlyDataset(folder, transform=transform),
        batch_size=settings.global_batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=candidate.lightly_workers or 0,
        persistent_workers=bool(candidate.lightly_workers),
    )
    backbone = backbones.build(settings.backbone, crop.size)
    hidden_dim, output_dim = settings.method.projector_dims
    head = SimCLRProjectionHead(backbone.feature_dim, hidden_dim, output_dim)
    model = torch.nn.Sequential(backbone, head)
    criterion = NTXentLoss(temperature=settings.method.temperature)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06)

    def endless() -> Iterator[Any]:
        while True:
            yield from loader

    for batch in gate(endless(), connection, candidate.num_steps):
        x0, x1 = batch[0]
        loss = criterion(model(x0), model(x1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def run_child(description: str, address: str, data: str) -> None:
    """Train as the parent has described, and connect to it on rank 0."""
    candidate = Candidate(**json.loads(description))
    connection = Client(address) if os.environ.get("RANK", "0") == "0" else None
    if candidate.is_lightly:
        assert connection is not None
        train_lightly(candidate, data, connection)
    else:
        train_ours(candidate, data, f"{address}.run", connection)


class Child:
    """The process, or the ranks, of one candidate."""

    def __init__(self, candidate: Candidate, data: str, folder: Path):
        self.candidate, address = candidate, str(folder / f"{candidate.name}.socket")
        launcher = [sys.executable]
        if candidate.num_ranks > 1:
            launcher += [
                "-m",
                "torch.distributed.run",
                "--nproc-per-node",
                str(candidate.num_ranks),
            ]
        arguments = ["--child", json.dumps(asdict(candidate)), "--address", address]
        log = folder / f"{candidate.name}.log"
        with Listener(address) as listener:
            self.process = subprocess.Popen(
                [*launcher, __file__, *arguments, "--data", data],
                env=child_environment(),
                stdout=subprocess.DEVNULL,
                stderr=log.open("w"),
            )
            self.connection = listener.accept()
        try:
            self.connection.recv()  # the first batch is ready
        except EOFError:
            raise RuntimeError(f"{candidate.name} ended:\n{log.read_text()[-2000:]}") from None

    def take_segment(self) -> float:
        """Take one segment of steps, and return its seconds."""
        self.connection.send(True)
        return float(self.connection.recv())

    def end(self) -> None:
        """Record the peak memory of all processes, and end them."""
        pids = [self.process.pid, *find_descendants(self.process.pid)]
        self.candidate.peak_bytes = sum(read_peak_bytes(pid) for pid in pids)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        self.process.wait()


def find_descendants(pid: int) -> list[int]:
    """Return the processes that a process has started, directly or not."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    children = [int(child) for child in path.read_text().split()]
    return children + [grandchild for child in children for grandchild in find_descendants(child)]


def read_peak_bytes(pid: int) -> int:
    """Return the peak of the resident memory of a process that trains, else 0."""
    if b"torch.distributed.run" in Path(f"/proc/{pid}/cmdline").read_bytes():
        return 0  # the launcher of the ranks
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def measure(candidates: list[Candidate], data: str, images: str, rounds: int) -> None:
    """Let every candidate take one segment per round, after one that warms up."""
    with tempfile.TemporaryDirectory() as name:
        children: list[Child] = []
        try:
            for candidate in candidates:
                source = images if candidate.is_lightly else data
                children.append(Child(candidate, source, Path(name)))
            for number in range(rounds + 1):
                for child in children:
                    seconds = child.take_segment()
                    if number:
                        child.candidate.segment_seconds.append(seconds)
        finally:
            for child in children:
                child.end()


def unpack_images(archive: Path, folder: Path) -> None:
    """Unpack the first training images of each class for lightly's folder data set."""
    with zipfile.ZipFile(archive) as file:
        names = [name for name in file.namelist() if name.startswith("train/")]
        names = [name for name in names if not name.endswith("/")]
        file.extractall(folder, names[:: max(1, len(names) // NUM_LIGHTLY_IMAGES)])


def compare(slow: Candidate, fast: Candidate) -> float:
    """Return the median over the rounds of the ratio of two candidates' times per step."""
    pairs = zip(slow.segment_seconds, fast.segment_seconds)
    return statistics.median(a / slow.num_steps / (b / fast.num_steps) for a, b in pairs)


def measure_scenarios(data: str, images: str, rounds: int, with_lightly: bool) -> dict[str, float]:
    """Measure all scenarios, print their speeds, and return the ratios by name."""
    ratios = {}
    for scenario, candidates in SCENARIOS.items():
        candidates = [one for one in candidates if with_lightly or not one.is_lightly]
        measure(candidates, data, images, rounds)
        for candidate in candidates:
            print(f"{scenario}, {candidate.name}: {candidate.describe()}", flush=True)
        earlier, shipped, *peers = candidates
        ratios[scenario] = compare(earlier, shipped)
        ratios[f"{scenario}_peak_memory"] = shipped.peak_bytes / earlier.peak_bytes
        if peers:
            fastest = min(peers, key=lambda peer: statistics.median(peer.segment_seconds))
            ratios[f"{scenario}_vs_lightly"] = compare(fastest, shipped)
    return ratios


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the options. The last two are for the processes of candidates."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=DATA_FOLDER / "cifar10.zip")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--without-lightly", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    options = build_parser().parse_args()
    if options.child:
        run_child(options.child, options.address, str(options.data))
        return
    with_lightly = not options.without_lightly
    torch.set_num_threads(NUM_CORES)
    print(versions("timm", *(["lightly"] if with_lightly else [])))
    with tempfile.TemporaryDirectory() as folder:
        if with_lightly:
            unpack_images(options.data, Path(folder))
        images = f"{folder}/train"
        ratios = measure_scenarios(str(options.data), images, options.rounds, with_lightly)
    print("ratios:", *(f"{name}={value:.2f}" for name, value in ratios.items()))


if __name__ == "__main__":
    main()
