"""Measures this machine in about a minute, for `--plan`: python -m ssl_pretrain.planning.calibrate [--output runs/calibration.json]

Rates of products and convolutions, memory bandwidth, what an operation's launch costs, the share of the roofline that training
steps of a ResNet and a ViT attain, the bandwidth and latency of collectives between two ranks (gloo; NCCL between all GPUs, where
there are several), and how many JPEGs a core decodes and cuts. `plan.gpu=here` and the GPU's own name then use these numbers.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ssl_pretrain.data import loader, sources
from ssl_pretrain.data.sources import DataConfig
from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.models import backbones
from ssl_pretrain.models.backbones import BackboneConfig
from ssl_pretrain.parallel import memory
from ssl_pretrain.planning.estimate import backbone_step
from ssl_pretrain.planning.hardware import MACHINES, Machine
from ssl_pretrain.schema import FROM_ZERO
from ssl_pretrain.views.recipe import Crop, ViewsConfig

_STEPS = (
    ("resnet18", 96, 16),
    ("vit_tiny_patch16_224", 224, 4),
)  # backbone, pixels, images on a CPU


def measure(device: torch.device) -> Machine:
    """This machine: the device's own rates, and its links where two ranks can meet here."""
    cpu = device.type == "cpu"
    narrow = torch.float32 if cpu else torch.bfloat16
    name = _cpu_name() if cpu else torch.cuda.get_device_name(device)
    sheet = next((machine for key, machine in MACHINES.items() if key in name.split()), None)
    matmul = products(device, narrow)
    machine = Machine(
        name=name,
        memory=float(
            memory.available(device)
            if cpu
            else torch.cuda.get_device_properties(device).total_memory
        ),
        matmul=matmul,
        wide_matmul=matmul if cpu else products(device, torch.float32),
        convolution=convolutions(device, narrow),
        bandwidth=copies(device),
        intra_node=sheet.intra_node if sheet else 0.0,
        inter_node=sheet.inter_node if sheet else 0.0,
        launch_seconds=launches(device),
        decoded_per_core=decoding(),
        on_cpu=cpu,
        source=f"python -m ssl_pretrain.planning.calibrate, {date.today()}, torch {torch.__version__}, {torch.get_num_threads()} threads",
    )
    ranks = 2 if cpu else torch.cuda.device_count()
    if ranks > 1:
        bandwidth, latency = links(ranks)
        machine = replace(
            machine,
            intra_node=bandwidth,
            inter_node=machine.inter_node or bandwidth,
            latency_seconds=latency,
        )
    shares = [attained(machine, device, *one) for one in _STEPS]
    return replace(machine, attained=math.prod(shares) ** (1 / len(shares)))


def seconds_of(run: Callable[[], object], device: torch.device, least: float = 0.5) -> float:
    """The median of repetitions over about `least` seconds, after one that is not counted.

    With one thread on a CPU, its own seconds: what else runs on the machine does not count.
    """
    clock = (
        time.process_time
        if device.type == "cpu" and torch.get_num_threads() == 1
        else time.perf_counter
    )
    run()
    times: list[float] = []
    while sum(times) < least or len(times) < 3:
        _synchronize(device)
        start = clock()
        run()
        _synchronize(device)
        times.append(clock() - start)
    return float(np.median(times))


def products(device: torch.device, dtype: torch.dtype) -> float:
    """Floating point operations a second of a large product."""
    side = 1024 if device.type == "cpu" else 8192
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / seconds_of(lambda: a @ b, device)


def convolutions(device: torch.device, dtype: torch.dtype) -> float:
    """Of a 3 x 3 convolution as in the middle of a ResNet-50, forward and backward."""
    images = 8 if device.type == "cpu" else 256
    layer = torch.nn.Conv2d(128, 128, 3, padding=1, bias=False, device=device, dtype=dtype)
    layer.weight.data = layer.weight.data.to(memory_format=torch.channels_last)
    x = (
        torch.randn(images, 128, 28, 28, device=device)
        .to(dtype, memory_format=torch.channels_last)
        .requires_grad_()
    )
    gradient = torch.randn_like(x)
    return (
        3
        * 2
        * images
        * 28**2
        * 128**2
        * 9
        / seconds_of(lambda: layer(x).backward(gradient), device)
    )


def copies(device: torch.device) -> float:
    """Bytes a second that a sum of two large arrays reads and writes."""
    size = 2**24 if device.type == "cpu" else 2**28
    a, b, c = (torch.ones(size, device=device) for _ in range(3))
    return 3 * 4 * size / seconds_of(lambda: torch.add(a, b, out=c), device)


def launches(device: torch.device) -> float:
    """Seconds of the host for an operation of a training step: forward and backward of small ones, each with its graph."""
    x = torch.ones(8, 8, device=device, requires_grad=True)

    def chain() -> None:
        y = x
        for _ in range(100):
            y = y * 1.5
        y.sum().backward()

    return seconds_of(chain, device) / 200


def attained(machine: Machine, device: torch.device, name: str, size: int, images: int) -> float:
    """The share of the roofline, so far `machine`'s, that a training step of one backbone reaches."""
    images = images if machine.on_cpu else 32 * images
    traced = backbone_step(name, size, images, bfloat16=not machine.on_cpu)
    took = seconds_of(real_step(name, size, images, device), device, 1.0)
    computing = sum(machine.bounds(traced))
    launching = machine.seconds(traced) - computing if machine.on_cpu else 0.0
    return min(1.0, computing / max(took - launching, 1e-9))


def real_step(name: str, size: int, images: int, device: torch.device) -> Callable[[], object]:
    """Forward and backward of a backbone on random views."""
    backbone = backbones.build(BackboneConfig(name=name), size).to(
        device, memory_format=torch.channels_last
    )  # type: ignore[call-overload]
    views = torch.randn(images, 3, size, size, device=device).to(memory_format=torch.channels_last)

    def step() -> None:
        backbone.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            features = backbone(views)
        features.float().mean().backward()

    return step


def decoding() -> float:
    """Images a second that one core makes into two views of 224 pixels: JPEGs of 500 x 375, by FFCV from a .beton where it is there."""
    recipe = ViewsConfig(crops={"global": Crop(count=2, size=224)})
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "images" / "train" / "one"
        root.mkdir(parents=True)
        for number in range(64):
            rough = Image.fromarray(generator.integers(0, 256, (47, 63, 3), dtype=np.uint8))
            rough.resize((500, 375), Image.Resampling.BICUBIC).save(
                root / f"{number:03d}.jpg", quality=90
            )
        data = DataConfig(
            source="folder", root=_as_beton(root.parent.parent), cache_dir=folder, num_workers=1
        )
        source = sources.open_source(data, "train")
        how, _ = loader.choose(data, source)
        with loader.Loader(
            source, recipe, seed=0, global_batch_size=32, num_workers=1, how=how
        ) as batches:
            coming = batches.starting_at(0)
            next(coming)  # compiled, and the workers are there
            made, seconds = batches.num_made, batches.seconds
            for _ in range(8):
                next(coming)
            return (batches.num_made - made) / (batches.seconds - seconds)


def _as_beton(root: Path) -> str:
    written = root / "train.beton"
    command = [sys.executable, "-m", "ssl_pretrain.data.beton", "write", str(root), str(written)]
    done = subprocess.run(command, capture_output=True, check=False)
    return str(written) if done.returncode == 0 else str(root)


def links(ranks: int) -> tuple[float, float]:
    """Bytes a second, one way, of an all-reduce between ranks on this machine, and seconds of a small one per level of a tree."""
    ours = ["-m", "ssl_pretrain.planning.calibrate", "--links"]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
        *ours,
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        raise RuntimeError(
            f"calibrate: {ranks} ranks could not measure their links: {done.stderr.strip().splitlines()[-1]}"
        )
    bandwidth, latency = json.loads(done.stdout.strip().splitlines()[-1])
    return bandwidth, latency


def _measure_links() -> None:
    device = process_group.start(threads=1)
    ranks = process_group.world_size()
    large, small = torch.zeros(2**24, device=device), torch.zeros(8, device=device)
    times = {}
    for name, tensor, repeats in (("large", large, 10), ("small", small, 200)):
        collectives.reduce_sum(tensor)
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(repeats):
            collectives.reduce_sum(tensor)
        _synchronize(device)
        times[name] = (time.perf_counter() - start) / repeats
    if process_group.is_main():
        bandwidth = 2 * (ranks - 1) / ranks * large.nbytes / times["large"]
        print(json.dumps([bandwidth, times["small"] / math.ceil(math.log2(ranks))]), flush=True)
    process_group.stop()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ssl_pretrain.planning.calibrate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/calibration.json"),
        help="what plan.calibration names",
    )
    parser.add_argument("--threads", type=FROM_ZERO, default=0, help="of the CPU; 0: all cores")
    parser.add_argument(
        "--links", action="store_true", help=argparse.SUPPRESS
    )  # of the ranks that `links` starts
    options = parser.parse_args(arguments)
    if options.links:
        _measure_links()
        return 0
    machine = measure(process_group.start(options.threads))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(asdict(machine), indent=2) + "\n")
    print(
        f"{machine.name}: {machine.source}\n"
        f"  products {machine.matmul / 1e12:.3g} TFLOP/s, convolutions {machine.convolution / 1e12:.3g}, "
        f"memory {machine.bandwidth / 1e9:.3g} GB/s\n"
        f"  a launch {machine.launch_seconds * 1e6:.1f} us; training steps attain {machine.attained:.0%} of the roofline of these\n"
        f"  links {machine.intra_node / 1e9:.3g} GB/s one way, {machine.latency_seconds * 1e6:.0f} us; "
        f"{machine.decoded_per_core:.0f} JPEGs a second and core\n"
        f"written to {options.output}: --plan plan.gpu=here uses it"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
